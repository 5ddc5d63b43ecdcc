"""How people say numbers, times of day, days, durations and the other closed values of the everyday data.

In: dice. Out: the words and the canonical value they stand for, as a pair or as words with slots.
A time that names no part of the day is read as it is said: seven is 07:00, noon is 12:00.
Refuses to know sentences and calls.
"""

from __future__ import annotations

from collections.abc import Mapping

from scripts.everyday.grammar import Dice
from scripts.everyday.schema import WEEK

HOURS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
ALARM_HOURS = (5, 6, 6, 7, 7, 7, 8, 8, 9, 10, 11)
MINUTES = (0, 0, 0, 15, 30, 30, 45, 5, 10, 20, 40, 50)
"""Minutes of an hour; round ones are commoner."""
ALARM_DAYS = {
    "tomorrow": ("tomorrow",),
    "weekdays": ("on weekdays", "every weekday"),
    "weekends": ("on weekends", "every weekend"),
    "daily": ("every day", "daily"),
}
DAYS = {
    "today": ("today",),
    "tonight": ("tonight",),
    "tomorrow": ("tomorrow",),
    **{day: (f"on {day.title()}",) for day in WEEK},
}
ROOMS = {
    "kitchen": ("kitchen",),
    "bedroom": ("bedroom",),
    "bathroom": ("bathroom",),
    "living room": ("living room", "lounge"),
    "hallway": ("hallway", "hall"),
    "office": ("office", "study"),
    "garage": ("garage",),
    "garden": ("garden",),
}
MEASURES = {
    "km": ("kilometres", "km"),
    "miles": ("miles",),
    "metres": ("metres",),
    "feet": ("feet",),
    "cm": ("cm",),
    "inches": ("inches",),
    "kg": ("kilos", "kg"),
    "pounds": ("pounds",),
    "litres": ("litres",),
    "gallons": ("gallons",),
    "celsius": ("celsius",),
    "fahrenheit": ("fahrenheit",),
    "euros": ("euros",),
    "dollars": ("dollars",),
}
KINDS = (
    ("km", "miles"),
    ("metres", "feet"),
    ("cm", "inches"),
    ("kg", "pounds"),
    ("litres", "gallons"),
    ("celsius", "fahrenheit"),
    ("euros", "dollars"),
)
"""Measures of one kind; only these are turned into each other."""


def clock(dice: Dice) -> tuple[str, str]:
    """A time of day, in digits or words, and as HH:MM."""
    hour, minute, style = dice.pick(ALARM_HOURS), dice.pick(MINUTES), dice.between(0, 9)
    value = f"{hour:02}:{minute:02}"
    if style < 8 or minute not in (0, 30):
        shown = f"{hour}:{minute:02}" if minute else str(hour)
        return f"{shown} am" if style < 4 else shown, value
    return ("half past " if minute else "") + HOURS[hour - 1], value


def duration(dice: Dice) -> tuple[str, dict[str, int]]:
    """A span of time; its number is kept in the unit it is said in."""
    if dice.chance(0.08):
        return "half an hour", {"minutes": 30}
    text, values = short_duration(dice)
    (value,) = values.values()
    return f"{text}s" if value > 1 else text, values


def short_duration(dice: Dice) -> tuple[str, dict[str, int]]:
    """A span of time that stands before a noun: `ten minute`. Never with a vowel first, which would want an `an`."""
    unit, values = dice.pick(
        (("minute", range(2, 31)), ("minute", range(20, 61, 5)), ("hour", range(2, 7)), ("second", range(20, 91, 5)))
    )
    value = dice.pick([value for value in values if value not in (8, 11, 18, *range(80, 90))])
    return f"{value} {unit}", {f"{unit}s": value}


def one_of(dice: Dice, ways: Mapping[str, tuple[str, ...]]) -> tuple[str, str]:
    """A way of saying one of several canonical values, and the value."""
    value = dice.pick(sorted(ways))
    return dice.pick(ways[value]), value


def amount(dice: Dice) -> tuple[str, int]:
    """How much there is of something."""
    return str(value := dice.pick((dice.between(2, 20), dice.between(10, 99), 5 * dice.between(4, 60)))), value
