"""How each slot of the everyday data is said in a sentence.

In: the name of a slot in a template, and dice. Out: its words; the canonical values that they stand for are kept.
Refuses to know templates and answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from scripts.everyday import spoken, words
from scripts.everyday.grammar import Dice
from scripts.everyday.schema import COLOURS
from scripts.everyday.words import bare


class Speaker:
    """Says the slots of one sentence and keeps what they mean."""

    def __init__(self, call: str, dice: Dice) -> None:
        self.call = call
        self.dice = dice
        self.values: dict[str, Any] = {}
        self._measures: tuple[str, str] | None = None

    def __call__(self, name: str) -> str:
        key, sets, value = name.partition("=")
        if sets:
            self.values[key] = value
            return ""
        return (SAYERS.get(f"{self.call}.{name}") or SAYERS[name])(self)

    @property
    def measures(self) -> tuple[str, str]:
        """The two measures of one conversion."""
        if self._measures is None:
            first, second = self.dice.shuffled(self.dice.pick(spoken.KINDS))
            self._measures = (first, second)
        return self._measures


Sayer = Callable[[Speaker], str]


def named(key: str, values: tuple[str, ...], speaker: Speaker) -> str:
    """A name or a thing, whose article is not copied."""
    text = speaker.dice.pick(values)
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


def degrees(speaker: Speaker) -> str:
    speaker.values["degrees"] = value = speaker.dice.between(12, 28)
    return f"{value}{speaker.dice.pick((' degrees', ' degrees', ''))}"


def brightness(speaker: Speaker) -> str:
    speaker.values["brightness"] = value = 10 * speaker.dice.between(1, 10)
    return f"{value}%" if speaker.dice.chance(0.4) else f"{value} percent"


def unit(speaker: Speaker) -> str:
    speaker.values["from"] = speaker.measures[0]
    return speaker.dice.pick(spoken.MEASURES[speaker.measures[0]])


def into(speaker: Speaker) -> str:
    speaker.values["to"] = speaker.measures[1]
    return speaker.dice.pick(spoken.MEASURES[speaker.measures[1]])


ROOM = partial(closed, "room", spoken.ROOMS)
CITY = partial(named, "city", words.CITIES)
SAYERS: dict[str, Sayer] = {
    "time": partial(pair, "time", spoken.clock),
    "day": partial(closed, "day", spoken.ALARM_DAYS),
    "on": partial(closed, "day", spoken.DAYS),
    "duration": partial(several, spoken.duration),
    "short": partial(several, spoken.short_duration),
    "who": partial(named, "who", words.PEOPLE),
    "genre": partial(named, "genre", words.GENRES),
    "room": ROOM,
    "in_room": partial(before, "in the ", ROOM),
    "city": CITY,
    "in_city": partial(before, "in ", CITY),
    "colour": partial(closed, "colour", {name: (name,) for name in COLOURS}),
    "brightness": brightness,
    "degrees": degrees,
    "amount": partial(pair, "amount", spoken.amount),
    "unit": unit,
    "into": into,
}
