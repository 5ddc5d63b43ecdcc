"""Sentence templates: how one is read, and how a random sentence is made from it.

In: a template and a function that says a slot. Out: a sentence. `(a|b)` is one of several, `[a]` is there or not,
`{name}` is said by the function, `<name>` stands for a part that several templates share.
Refuses to know slots, calls and what a sentence means.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

T = TypeVar("T")


class Dice:
    """Random choices from `Random.random` alone: Python promises that one to stay the same in later versions."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def chance(self, share: float) -> bool:
        return self._random() < share

    def pick(self, values: Sequence[T]) -> T:
        return values[int(self._random() * len(values))]

    def between(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return low + int(self._random() * (high - low + 1))

    def shuffled(self, values: Sequence[T]) -> list[T]:
        """The values in a random order."""
        keys = [self._random() for _ in values]
        return [values[i] for i in sorted(range(len(values)), key=keys.__getitem__)]


@dataclass(frozen=True)
class Slot:
    """A place that the speaker of slots fills."""

    name: str


@dataclass(frozen=True)
class Choice:
    """One of several parts."""

    options: tuple[Part, ...]


Part = tuple["str | Slot | Choice", ...]


@cache
def parse(template: str) -> Part:
    """The parts of a template whose shared parts have been put in."""
    tokens = re.findall(r"[()\[\]|]|\{[^{}]*\}|[^()\[\]|{}]+", template)
    assert "".join(tokens) == template, template
    options, rest = _options(tokens)
    assert (len(options), rest) == (1, []), template
    return options[0]


def _options(tokens: list[str]) -> tuple[list[Part], list[str]]:
    options: list[list[str | Slot | Choice]] = [[]]
    while tokens and tokens[0] not in (")", "]"):
        token, tokens = tokens[0], tokens[1:]
        if token in ("(", "["):
            inner, tokens = _options(tokens)
            assert tokens[:1] == [{"(": ")", "[": "]"}[token]]
            tokens = tokens[1:]
            options[-1].append(Choice((*inner, ()) if token == "[" else tuple(inner)))
        elif token == "|":
            options.append([])
        elif token.startswith("{"):
            options[-1].append(Slot(token[1:-1]))
        else:
            options[-1].append(token)
    return [tuple(option) for option in options], tokens


def with_shared(template: str, shared: Mapping[str, str]) -> str:
    """The template with each `<name>` replaced by what it stands for."""
    while "<" in template:
        template = re.sub(r"<(\w+)>", lambda match: shared[match[1]], template)
    return template


def expand(part: Part, say: Callable[[str], str], dice: Dice) -> str:
    """A random sentence; blanks are single."""
    text = ""
    for piece in part:
        if isinstance(piece, Choice):
            text += expand(dice.pick(piece.options), say, dice)
        elif isinstance(piece, Slot):
            text += say(piece.name)
        else:
            text += piece
    return re.sub(r" +", " ", text)


def variants(part: Part) -> int:
    """How many wordings a template has, its slots aside."""
    count = 1
    for piece in part:
        if isinstance(piece, Choice):
            count *= sum(variants(option) for option in piece.options)
    return count
