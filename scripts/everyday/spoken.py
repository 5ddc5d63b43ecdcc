"""How people say numbers, times of day, days, durations and the other closed values of the everyday data.

In: dice. Out: the words and the canonical value they stand for, as a pair or as words with slots.
A time that names no part of the day is read as it is said: seven is 07:00, noon is 12:00.
Refuses to know sentences and calls.
"""

from __future__ import annotations

from collections.abc import Mapping

from scripts.everyday.grammar import Dice
from scripts.everyday.schema import WEEK

UNITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
TEENS = ("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
MINUTES = (0, 0, 0, 0, 15, 30, 30, 45, 5, 10, 20, 25, 35, 40, 50, 55)
"""Minutes of an hour; round ones are commoner."""
FRACTIONS = {
    "half an hour": {"minutes": 30},
    "a quarter of an hour": {"minutes": 15},
    "an hour": {"hours": 1},
    "an hour and a half": {"hours": 1, "minutes": 30},
    "a minute": {"minutes": 1},
    "a minute and a half": {"minutes": 1, "seconds": 30},
}
ALARM_DAYS = {
    "tomorrow": ("tomorrow",),
    "weekdays": ("on weekdays", "every weekday", "Monday to Friday"),
    "weekends": ("on weekends", "every weekend", "at the weekend"),
    "daily": ("every day", "each day", "daily"),
    **{day: tuple(f"{how} {day.title()}" for how in ("on", "every", "this")) for day in WEEK},
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
    "basement": ("basement", "cellar"),
    "attic": ("attic", "loft"),
}
MEASURES = {
    "km": ("kilometres", "kilometers", "km"),
    "miles": ("miles",),
    "metres": ("metres", "meters"),
    "feet": ("feet",),
    "cm": ("centimetres", "centimeters", "cm"),
    "inches": ("inches",),
    "kg": ("kilograms", "kilos", "kg"),
    "pounds": ("pounds", "lbs"),
    "litres": ("litres", "liters"),
    "gallons": ("gallons",),
    "celsius": ("degrees celsius", "celsius"),
    "fahrenheit": ("degrees fahrenheit", "fahrenheit"),
    "euros": ("euros",),
    "dollars": ("dollars", "US dollars"),
    "yen": ("yen",),
    "francs": ("francs", "Swiss francs"),
    "rupees": ("rupees",),
}
KINDS = (
    ("km", "miles"),
    ("metres", "feet"),
    ("cm", "inches"),
    ("kg", "pounds"),
    ("litres", "gallons"),
    ("celsius", "fahrenheit"),
    ("euros", "dollars", "yen", "francs", "rupees"),
)
"""Measures of one kind; only these are turned into each other."""


def number_words(number: int) -> str:
    """A number from 1 to 99 in words."""
    if number < 20:
        return (*UNITS, *TEENS)[number - 1]
    return TENS[number // 10 - 2] + (f" {UNITS[number % 10 - 1]}" if number % 10 else "")


def number(dice: Dice, value: int, words: float = 0.3) -> str:
    """In words or in digits."""
    return number_words(value) if 1 <= value <= 99 and dice.chance(words) else str(value)


def dial(dice: Dice, hour: int, minute: int) -> str:
    """A time on a dial of twelve hours: `7:15`, `seven thirty`, `quarter past seven`."""
    hour = (hour - 1) % 12 + 1
    word, following = UNITS[hour - 1], UNITS[hour % 12]
    if minute == 0:
        return dice.pick((str(hour), word, word, f"{word} o'clock"))
    if dice.chance(0.5):
        return f"{hour}:{minute:02}"
    if minute == 30 and dice.chance(0.3):
        return f"{word} thirty"
    if minute <= 30:
        return f"{ {15: 'quarter', 30: 'half'}.get(minute, number_words(minute)) } past {word}"
    return f"{'quarter' if minute == 45 else number_words(60 - minute)} to {following}"


def clock(dice: Dice, hours: tuple[int, ...]) -> tuple[str, str]:
    """A time of day within the hours, in words or digits, and as HH:MM."""
    hour, minute = dice.pick(hours), dice.pick(MINUTES)
    if hour in (0, 12):
        return ("noon", "12:00") if hour else ("midnight", "00:00")
    value, style = f"{hour:02}:{minute:02}", dice.between(0, 9)
    if style < 2:
        return value, value
    if style < 5 or (hour > 12 and style < 8):
        shown = f"{(hour - 1) % 12 + 1}" + (f":{minute:02}" if minute else "")
        return f"{shown}{dice.pick((' ', ''))}{'am' if hour < 12 else 'pm'}", value
    if hour < 12 and style < 9:
        return dial(dice, hour, minute), value
    part = "the morning" if hour < 12 else "the afternoon" if hour < 17 else "the evening"
    return f"{dial(dice, hour, minute)} in {part}", value


def day(dice: Dice) -> tuple[str, str]:
    """A day as it stands in a sentence."""
    value = dice.pick(("today", "tomorrow", "tomorrow", *WEEK))
    return (f"{dice.pick(('on', 'on', 'this'))} {value.title()}" if value in WEEK else value), value


def part_of_day(dice: Dice) -> tuple[str, dict[str, str]]:
    """A day, a part of it and a time: `tomorrow evening at eight`, `at nine tonight`."""
    part, low, high = dice.pick((("morning", 7, 11), ("evening", 5, 10), ("tonight", 7, 11)))
    hour, minute = dice.between(low, high), dice.pick((0, 0, 0, 15, 30, 45))
    text, value = ("", "tonight") if part == "tonight" else day(dice)
    while value == "today":
        text, value = day(dice)
    time = f"at {dial(dice, hour, minute)}"
    when = f"{text} {part}".strip()
    values = {"day": value, "time": f"{hour + (0 if part == 'morning' else 12):02}:{minute:02}"}
    return (f"{when} {time}" if dice.chance(0.6) else f"{time} {when}"), values


def duration(dice: Dice) -> tuple[str, dict[str, int]]:
    """A span of time; its numbers are kept in the units they are said in."""
    style = dice.between(0, 9)
    if style < 1:
        text = dice.pick(sorted(FRACTIONS))
        return text, dict(FRACTIONS[text])
    if style < 7:
        value = dice.between(2, 20) if dice.chance(0.6) else 5 * dice.between(5, 11)
        return f"{number(dice, value)} {dice.pick(('minutes', 'minutes', 'mins'))}", {"minutes": value}
    if style == 7:
        value = 5 * dice.between(2, 18)
        return f"{number(dice, value)} seconds", {"seconds": value}
    hours = dice.between(1, 6)
    text = f"{number(dice, hours)} hour{'s' if hours > 1 else ''}"
    if style == 8:
        return text, {"hours": hours}
    past = 10 * dice.between(1, 5)
    return f"{text}{dice.pick((' and ', ' '))}{number(dice, past)} minutes", {"hours": hours, "minutes": past}


def short_duration(dice: Dice) -> tuple[str, dict[str, int]]:
    """A span of time that stands before a noun: `ten minute`."""
    unit, values = dice.pick(
        (("minute", range(2, 21)), ("minute", range(20, 61, 5)), ("hour", range(2, 5)), ("second", range(20, 91, 10)))
    )
    value = dice.pick(values)
    return f"{number(dice, value)} {unit}", {f"{unit}s": value}


def one_of(dice: Dice, ways: Mapping[str, tuple[str, ...]]) -> tuple[str, str]:
    """A way of saying one of several canonical values, and the value."""
    value = dice.pick(sorted(ways))
    return dice.pick(ways[value]), value


def amount(dice: Dice) -> tuple[str, int | float]:
    """How much there is of something."""
    style = dice.between(0, 9)
    if style < 3:
        value = dice.between(2, 20)
        return number(dice, value, 0.6), value
    if style < 9:
        whole = dice.pick((dice.between(10, 99), 5 * dice.between(4, 60), 100 * dice.between(1, 20)))
        return str(whole), whole
    exact = dice.between(1, 9) + 0.5
    return f"{exact:.1f}", exact
