"""The longer open texts of the everyday data: messages to pass on, tasks to remember, phrases to translate.

In: nothing. Out: sorted tuples of short phrases. Messages are statements, so that they read well after `that`; tasks
are what follows `to`; no phrase holds a digit, a comma or a final stop. Refuses to know sentences and calls.
"""

from __future__ import annotations

from scripts.everyday.words import words

MESSAGES = words(
    """I'm running late, I'm on my way, I'm stuck in traffic, dinner is ready, the meeting has moved, we are outside, I
    missed the bus, the train is delayed, I got the job, we won the game, I can't come, all is well, I'm at the door,
    the kids are asleep, the door is open, my phone is broken, happy birthday, I love you, thanks for the flowers, the
    parcel has arrived, I'm feeling better, we need to talk, the plan has changed, I forgot my wallet, it's raining,
    the shop is closed, the car won't start, the food was great, I'm home now, lunch is on me, the cat is back, I'm
    proud of you, I'm almost there, see you soon, I'll bring the drinks, I'll bring a salad, I left the keys at work,
    we need more chairs, I found your scarf, I'm waiting at the station, I'll be ten minutes late, the baby is
    sleeping"""
)
TASKS = words(
    """pay the rent, pay the gas bill, pick up the parcel, pick up the kids, pick up the cake, water the plants, buy
    stamps, water the roses, buy a birthday card, buy dog food, book a table, book the ferry, book a hotel, return the
    drill, return the library books, renew my passport, renew the bus pass, clean the oven, clean the fish tank, charge
    the laptop, charge the camera, take out the bins, take my vitamins, walk the dog, send the invoice, send the
    contract, check the mail, submit the report, feed the cat, feed the rabbits, fix the bike, fix the printer, back up
    my photos, practise the piano, write a review, order printer ink, order the curtains, call the bank, call the
    landlord, wash the car"""
)
PHRASES = words(
    """good morning, good night, thank you, thank you very much, where is the station, I am hungry, cheers, excuse me,
    how are you, see you tomorrow, a table for two, I am lost, happy birthday, no problem, I don't understand, welcome,
    how much is it, where is the toilet, nice to meet you, I am sorry, bread, cheese, water, butterfly, spoon,
    umbrella, my friend, I need a doctor, can you help me, it is too expensive, have a nice trip, the train is late, I
    feel sick, we are closed, keep the change, best wishes"""
)
