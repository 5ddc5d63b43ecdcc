"""The kinds of slots of the everyday data.

In: a value. Out: whether it is canonical for its kind, and how the kind is described.
Refuses to know which call has which slot.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Time:
    """A time of day."""

    def says(self) -> str:
        return "`HH:MM`, 24 hours"

    def admits(self, value: Any) -> bool:
        return isinstance(value, str) and re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", value) is not None


@dataclass(frozen=True)
class OneOf:
    """One of a closed set of words."""

    values: tuple[str, ...]

    def says(self) -> str:
        return ", ".join(f"`{value}`" for value in self.values)

    def admits(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.values


@dataclass(frozen=True)
class Number:
    """A whole number in a range; with `decimals`, any number in it. A whole amount has no decimal point."""

    low: int
    high: int
    decimals: bool = False

    def says(self) -> str:
        return f"{'' if self.decimals else 'whole '}number, {self.low} to {self.high}"

    def admits(self, value: Any) -> bool:
        if self.decimals and type(value) is float:
            return not value.is_integer() and self.low <= value <= self.high
        return type(value) is int and self.low <= value <= self.high


@dataclass(frozen=True)
class Words:
    """Words of the request in lower case, without outer quotes or a final stop."""

    def says(self) -> str:
        return "words of the request"

    def admits(self, value: Any) -> bool:
        if not isinstance(value, str) or value != value.lower():
            return False
        return re.fullmatch(r"[^\s\"'.,;:!?](.*[^\s\".,;:!?])?", value) is not None


Kind = Time | OneOf | Number | Words
