"""The open words of the everyday data: names, songs, places, things.

In: nothing. Out: sorted tuples of words. Titles and bands are made up. Most words were chosen so that the tokenizer of
`nano` splits them alike at the start of a text and after a blank, which is what a small model needs to copy them.
Refuses to know sentences, calls, and which words are kept for the test rows.
"""

from __future__ import annotations

import re


def words(text: str) -> tuple[str, ...]:
    """The comma-separated words of a text, sorted, each once."""
    return tuple(sorted({" ".join(part.split()) for part in text.split(",") if part.strip()}))


def bare(value: str) -> str:
    """Without a leading article or `my`, which are not part of a name or a thing."""
    return re.sub(r"^(the|a|an|my|some) ", "", value)


PEOPLE = words(
    """Aisha, Amara, Anders, Anna, Arjun, Ben, Bruno, Clara, Dana, Daniel, Elena, Emil, Erik, Esther, Felix, Grace,
    Hana, Hugo, Imani, Jack, Jana, Kai, Karim, Kofi, Lars, Laura, Leah, Leo, Lina, Lucas, Marco, Maria, Maya, Mei,
    Nadia, Nico, Nina, Noah, Oliver, Petra, Priya, Ravi, Ruth, Sam, Sara, Sofia, Tariq, Theo, Vera, Wei, Yara, Yusuf,
    Zoe, dad, mum, my boss, my cousin, my sister, my uncle, the dentist, the plumber, the vet"""
)
CITIES = words(
    """Athens, Auckland, Berlin, Bologna, Boston, Bristol, Cairo, Chicago, Dallas, Denver, Dublin, Florence, Ghent,
    Lagos, Leeds, Lisbon, London, Madrid, Manila, Mumbai, Munich, Naples, Oslo, Paris, Perth, Porto, Prague, Quito,
    Riga, Rome, Seattle, Seoul, Seville, Sydney, Tokyo, Toronto, Turin, Valencia, Vienna, Warsaw, York, Zurich"""
)
PLACES = words(
    """the airport, the bakery, the beach, the castle, the cinema, the harbour, the hospital, the ice rink, the
    library, the museum, the stadium, the station, the swimming pool, the zoo, school, work, Baker Row, Bridge
    Street, Church Hill, Elm Court, Kings Square, Mill Lane, Orchard Road"""
)
SONGS = words(
    """Autumn Leaves, Balcony, Blue Window, Crystal Ball, Dancing Alone, Diamond Road, Empty Streets, Golden Rivers,
    Gravity, Hollow Bones, Honey and Smoke, Hurricane Season, Lonely Planet, Marble Stairs, Midnight Train, Neon
    Garden, Over the Hill, Paper Moon, Quiet Storm, Red Umbrella, Rosewood, Satellite, Stone by Stone, Tangerine,
    Velvet Sky, Whisper, Wild Horses, Winter Sun"""
)
ARTISTS = words(
    """Ada Brook, Clara Winter, Echo Valley, Hazel Finch, Juno Reyes, Kira Moon, Lena Hart, Leo Frost, Mara Stone, Max
    Orlin, Nora Vale, Pale Horses, Red Kites, Ruby Lark, Saint Cloud, Static Youth, The Ferrymen, The Long Shadows, The
    Lost Boys, The Night Owls, The Paper Lanterns, The Velvet Drums"""
)
GENRES = words(
    """blues, classical, dance music, disco, folk, gospel, hip hop, house, indie, jazz, metal, opera, piano music, pop,
    punk, reggae, rock, salsa, samba, soul, swing, techno"""
)
ALARMS = words("airport, bins, exam, fishing, gym, meditation, pills, school run, swimming, train, work, yoga")
COOKING = words(
    """beans, bread, cake, chicken, dishwasher, dough, eggs, laundry, muffins, nap, noodles, oven, pasta, pizza, plank,
    porridge, quiz, rice, roast, sauna, soup, stew, tea, workout"""
)
FOOD = words(
    """beer, bread, butter, cereal, cheese, chicken, cinnamon, coffee, dish soap, flour, garlic, honey, ice cream, jam,
    lentils, milk, oat milk, olive oil, orange juice, peanut butter, red wine, rice, salt, sugar, toilet paper, tofu,
    vinegar, yoghurt"""
)
COUNTED = words("avocados, bananas, batteries, cucumbers, eggs, lemons, limes, mangoes, onions, pears, peppers, plums")
GEAR = words(
    """binoculars, board games, camera, flip flops, gloves, headphones, hiking boots, passport, pyjamas, scarf,
    sleeping bag, sunglasses, sunscreen, swimsuit, tent, toothbrush, torch, towel, water bottle, wool socks"""
)
