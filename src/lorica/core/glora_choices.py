"""The 432 configurations of a GLoRA site: an option for each of five tensors, and which part of a stored tensor it is.

In: words such as `lora,vector,none,constant,none`, stored super-parameters. Out: choices, the tensors that a choice
selects, how many values these have. Refuses to know weights, updates and how a choice is searched for.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorica.core.errors import ConfigError, did_you_mean
from lorica.core.site import Site

MATRIX = ("lora", "vector", "constant", "none")
COLUMN = ("lora", "vector", "none")
BIAS = ("vector", "constant", "none")


class Choice(NamedTuple):
    """The options of one site. A and B act on the weight, C couples it to the bias, D and E act on the bias."""

    A: str
    B: str
    C: str
    D: str
    E: str

    @classmethod
    def parse(cls, text: str) -> Choice:
        """From `A,B,C,D,E`. Raises ConfigError naming the first option that its tensor does not have."""
        words = [word.strip() for word in text.split(",")]
        if len(words) != len(OPTIONS):
            raise ConfigError(
                f"GLoRA choice {text!r} has {len(words)} options; five are right, of A, B, C, D and E in this order."
            )
        for (letter, options), word in zip(OPTIONS.items(), words, strict=True):
            if word not in options:
                near = did_you_mean(word, options) or f" It can be {', '.join(options)}."
                raise ConfigError(f"GLoRA choice {text!r} gives {letter} the option {word!r}.{near}")
        return cls(*words)

    @classmethod
    def at(cls, numbers: Tensor | Sequence[float]) -> Choice:
        """From the number of each option, as `numbers` gives them."""
        listed = numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)
        return cls(*(options[int(n)] for options, n in zip(OPTIONS.values(), listed, strict=True)))

    @classmethod
    def draw(cls, rng: torch.Generator) -> Choice:
        """One of the 432, each as likely as any other."""
        return cls(*(options[int(torch.randint(len(options), (), generator=rng))] for options in OPTIONS.values()))

    def numbers(self) -> Tensor:
        """The number of each option, [5] float32."""
        return torch.tensor([float(o.index(word)) for o, word in zip(OPTIONS.values(), self, strict=True)])

    def __str__(self) -> str:
        return ",".join(self)

    def shapes(self, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        """The tensors of this choice at a site: `Xd`, `Xu` of a LoRA pair, `X` of a vector or a constant.

        D is absent where the site has no bias to scale.
        """
        found: dict[str, tuple[int, ...]] = {}
        rest = site.shape[1:]
        for letter, option in zip(OPTIONS, self, strict=True):
            if option == "none" or (letter == "D" and not site.bias):
                continue
            rows = math.prod(rest) if letter == "C" else site.out_features
            if option == "lora":
                columns = (1,) if letter == "C" else rest
                found |= {f"{letter}d": (rows, rank), f"{letter}u": (rank, *columns)}
            else:
                found[letter] = (rows,) if option == "vector" else (1,)
        return found

    def trained(self, site: Site, rank: int) -> int:
        """Values that this choice trains at a site."""
        return sum(math.prod(shape) for shape in self.shapes(site, rank).values())

    def select(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of `shapes` as parts of a supernet's: a vector is a pair's first column, a constant its first
        entry.
        """
        found: dict[str, Tensor] = {}
        for letter, option in zip(OPTIONS, self, strict=True):
            if option == "none" or (letter == "D" and letter not in stored):
                continue
            if option == "lora":
                found |= {f"{letter}d": stored[f"{letter}d"], f"{letter}u": stored[f"{letter}u"]}
                continue
            vector = stored[letter] if letter in "DE" else stored[f"{letter}d"][:, 0]
            found[letter] = vector if option == "vector" else vector[:1]
        return found


OPTIONS: dict[str, tuple[str, ...]] = {"A": MATRIX, "B": MATRIX, "C": COLUMN, "D": BIAS, "E": BIAS}
"""What each tensor can be; a choice's number is the place in this list."""
ALL: tuple[Choice, ...] = tuple(Choice(*words) for words in itertools.product(*OPTIONS.values()))
"""Every configuration of a site: 4 · 4 · 3 · 3 · 3 = 432."""


def anywhere(pattern: str) -> str:
    """A name pattern as it is matched with `fullmatch`: against a whole name, or the part of one behind a dot."""
    return rf"(.*\.)?({pattern})"


def checked_pattern(pattern: str) -> str:
    """A name pattern. Raises ConfigError where it is no regular expression, alone or as `anywhere` writes it."""
    try:
        for written in (pattern, anywhere(pattern)):
            re.compile(written)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is no regular expression: {error}.") from None
    return pattern
