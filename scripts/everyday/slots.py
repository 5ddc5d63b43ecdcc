"""How each slot of the everyday data is said in a sentence.

In: the name of a slot in a template, dice, and whether the row is for testing. Out: its words; the canonical values
that they stand for are kept. Training rows never hold a reserved word; test rows take all words alike.
Refuses to know templates and answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from scripts.everyday import phrases, spoken, words
from scripts.everyday.grammar import Dice
from scripts.everyday.schema import COLOURS, LANGUAGES
from scripts.everyday.words import bare

OPEN = (
    *(words.PEOPLE, words.CITIES, words.PLACES, words.SONGS, words.ARTISTS, words.GENRES, words.COOKING, words.FOOD),
    *(words.GEAR, phrases.MESSAGES, phrases.TASKS, phrases.PHRASES),
)
RESERVED = frozenset(bare(value) for values in OPEN for value in values[5::10])
"""Every tenth open word: no training row holds one as the value of a slot."""

LINES = {
    "mobile": ("on his mobile", "on her mobile", "on their mobile", "on the mobile"),
    "work": ("at work", "at the office"),
    "home": ("at home", "on the landline"),
}
MODES = {"video": ("on video", "with video"), "speaker": ("on speaker", "on speakerphone")}
APPS = {"whatsapp": ("WhatsApp",), "signal": ("Signal",), "telegram": ("Telegram",)}
TRAVEL = {
    "car": ("by car",),
    "bike": ("by bike", "on my bike"),
    "foot": ("on foot",),
    "train": ("by train",),
    "bus": ("by bus",),
}
ALARM_HOURS = (5, 6, 6, 7, 7, 7, 8, 8, 9, 10, 11, 12, 15, 18, 21)
DAY_HOURS = (*range(7, 24), *range(8, 21), 12, 0)


class Speaker:
    """Says the slots of one sentence and keeps what they mean."""

    def __init__(self, call: str, dice: Dice, testing: bool) -> None:
        self.call = call
        self.dice = dice
        self.testing = testing
        self.values: dict[str, Any] = {}
        self._measures: tuple[str, str] | None = None

    def __call__(self, name: str) -> str:
        key, sets, value = name.partition("=")
        if sets:
            self.values[key] = value
            return ""
        return (SAYERS.get(f"{self.call}.{name}") or SAYERS[name])(self)

    def choose(self, values: tuple[str, ...]) -> str:
        """An open word; for training, one that is not kept for the test rows."""
        return self.dice.pick([value for value in values if self.testing or bare(value) not in RESERVED])

    @property
    def measures(self) -> tuple[str, str]:
        """The two measures of one conversion."""
        if self._measures is None:
            first, second, *_ = self.dice.shuffled(self.dice.pick((*spoken.KINDS, spoken.KINDS[-1], spoken.KINDS[-1])))
            self._measures = (first, second)
        return self._measures


Sayer = Callable[[Speaker], str]


def copied(key: str, values: tuple[str, ...], speaker: Speaker) -> str:
    """Words that are copied as they stand."""
    speaker.values[key] = text = speaker.choose(values)
    return text


def named(key: str, values: tuple[str, ...], speaker: Speaker) -> str:
    """A name or a thing, whose article is not copied."""
    text = speaker.choose(values)
    speaker.values[key] = bare(text)
    return text


def closed(key: str, ways: Mapping[str, tuple[str, ...]], speaker: Speaker) -> str:
    text, speaker.values[key] = spoken.one_of(speaker.dice, ways)
    return text


def pair(key: str, say: Callable[[Dice], tuple[str, Any]], speaker: Speaker) -> str:
    text, speaker.values[key] = say(speaker.dice)
    return text


def several(say: Callable[[Dice], tuple[str, Mapping[str, Any]]], speaker: Speaker) -> str:
    text, values = say(speaker.dice)
    speaker.values.update(values)
    return text


def before(words: str, say: Sayer, speaker: Speaker) -> str:
    return words + say(speaker)


def whole(key: str, low: int, high: int, units: tuple[str, ...], sign: int, speaker: Speaker) -> str:
    """A whole number with its unit; `units` are what may follow it."""
    value = speaker.dice.between(low, high)
    speaker.values[key] = sign * value
    unit = speaker.dice.pick(units)
    return spoken.number(speaker.dice, value) + (unit.removesuffix("s") if value == 1 else unit)


def brightness(speaker: Speaker) -> str:
    speaker.values["brightness"] = value = 10 * speaker.dice.between(1, 10)
    if value == 50 and speaker.dice.chance(0.3):
        return "half"
    if speaker.dice.chance(0.4):
        return f"{value}%"
    return f"{spoken.number(speaker.dice, value)} percent"


def items(counted: tuple[str, ...], plain: tuple[str, ...], articles: tuple[str, ...], speaker: Speaker) -> str:
    """One or two things, seldom three; some with a number."""
    dice = speaker.dice
    texts: list[str] = []
    values: list[str] = []
    for _ in range(dice.pick((1, 1, 1, 2, 2, 2, 3))):
        count = dice.between(2, 12) if counted and dice.chance(0.25) else 0
        thing = speaker.choose(counted if count else plain)
        if any(value.endswith(thing) for value in values):
            continue
        article = dice.pick(articles) if dice.chance(0.2) else ""
        texts.append(f"{spoken.number(dice, count, 0.5)} {thing}" if count else article + thing)
        values.append(f"{count} {thing}" if count else thing)
    speaker.values["items"] = values
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


def unit(speaker: Speaker) -> str:
    speaker.values["from"] = speaker.measures[0]
    return speaker.dice.pick(spoken.MEASURES[speaker.measures[0]])


def into(speaker: Speaker) -> str:
    speaker.values["to"] = speaker.measures[1]
    return speaker.dice.pick(spoken.MEASURES[speaker.measures[1]])


def quoted(text: str, speaker: Speaker) -> str:
    mark = speaker.dice.pick(("", "", "'", '"'))
    return f"{mark}{text}{mark}" if "'" not in text or mark != "'" else text


def phrase(speaker: Speaker) -> str:
    return quoted(copied("text", phrases.PHRASES, speaker), speaker)


def short(article: bool, speaker: Speaker) -> str:
    text = several(spoken.short_duration, speaker)
    vowel = text.startswith(("8", "11", "18", "eight", "eleven"))
    return f"{'an' if vowel else 'a'} {text}" if article else text


ROOM = partial(closed, "room", spoken.ROOMS)
CITY = partial(named, "city", words.CITIES)
SAYERS: dict[str, Sayer] = {
    "time": partial(pair, "time", partial(spoken.clock, hours=DAY_HOURS)),
    "set_alarm.time": partial(pair, "time", partial(spoken.clock, hours=ALARM_HOURS)),
    "days": partial(closed, "days", spoken.ALARM_DAYS),
    "set_alarm.label": partial(copied, "label", words.ALARMS),
    "set_timer.label": partial(copied, "label", words.COOKING),
    "duration": partial(several, spoken.duration),
    "short": partial(short, False),
    "a_short": partial(short, True),
    "task": partial(copied, "task", phrases.TASKS),
    "day": partial(pair, "day", spoken.day),
    "part_of_day": partial(several, spoken.part_of_day),
    "send_message.to": partial(named, "to", words.PEOPLE),
    "send_message.text": partial(copied, "text", phrases.MESSAGES),
    "app": partial(closed, "app", APPS),
    "who": partial(named, "who", words.PEOPLE),
    "line": partial(closed, "line", LINES),
    "mode": partial(closed, "mode", MODES),
    "song": partial(copied, "song", words.SONGS),
    "artist": partial(copied, "artist", words.ARTISTS),
    "genre": partial(copied, "genre", words.GENRES),
    "room": ROOM,
    "in_room": partial(before, "in the ", ROOM),
    "city": CITY,
    "in_city": partial(before, "in ", CITY),
    "what": partial(closed, "what", {name: (name,) for name in ("rain", "snow", "wind", "sun")}),
    "falls": partial(closed, "what", {name: (name,) for name in ("rain", "snow")}),
    "colour": partial(closed, "colour", {name: (name,) for name in COLOURS}),
    "brightness": brightness,
    "degrees": partial(whole, "degrees", 14, 26, (" degrees", " degrees", ""), 1),
    "more": partial(whole, "change", 1, 5, (" degrees",), 1),
    "less": partial(whole, "change", 1, 5, (" degrees",), -1),
    "items": partial(items, words.COUNTED, words.FOOD, ("some ",)),
    "gear": partial(items, (), words.GEAR, ("my ", "the ")),
    "navigate.to": partial(named, "to", (*words.PLACES, *words.CITIES)),
    "from": partial(named, "from", (*words.CITIES, *words.PLACES)),
    "by": partial(closed, "by", TRAVEL),
    "amount": partial(pair, "amount", spoken.amount),
    "unit": unit,
    "into": into,
    "translate.text": phrase,
    "translate.to": partial(closed, "to", {name: (name.title(),) for name in LANGUAGES}),
}
