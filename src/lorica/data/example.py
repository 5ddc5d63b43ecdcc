"""A training example, and what to do with one that is too long.

In: tokens and the loss weight of each. Out: `Example`, and `truncate`, which reports every token and row that it
takes away. Refuses to know where tokens come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from lorica.core.errors import ConfigError, DataError
from lorica.data.datum import Datum


@dataclass(frozen=True, slots=True)
class Example:
    """Tokens, and for each the loss weight of predicting it from those before. `weights[0]` is 0: nothing comes
    before.
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    where: str = field(default="example", compare=False)

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.weights):
            raise DataError(
                f"{self.where} has {len(self.tokens)} tokens and {len(self.weights)} loss weights; each needs one."
            )
        if not all(map(math.isfinite, self.weights)):
            raise DataError(f"{self.where} has a loss weight that is not a finite number.")
        if self.weights and self.weights[0]:
            raise DataError(f"{self.where} has a loss weight on its first token, which nothing predicts.")

    @classmethod
    def whole(cls, tokens: Sequence[int], where: str = "example") -> Self:
        """A sequence in which every token but the first is trained, with weight 1."""
        return cls(tuple(tokens), (0.0, *[1.0] * (len(tokens) - 1)), where)

    def __len__(self) -> int:
        return len(self.tokens)

    def datum(self) -> Datum:
        """Its tokens but the last, each asked for the next one, with `weights`. Raises DataError for fewer than two
        tokens.
        """
        if len(self.tokens) < 2:
            raise DataError(f"{self.where} has {len(self.tokens)} tokens; at least two are needed to predict one.")
        tokens = np.array(self.tokens, dtype=np.int64)
        return Datum(
            tokens[:-1], tokens[1:], {"weights": np.array(self.weights[1:], dtype=np.float32)}, where=self.where
        )

    @property
    def trained(self) -> int:
        """The number of tokens whose weight is not zero."""
        return sum(1 for weight in self.weights if weight)


@dataclass(frozen=True, slots=True)
class TruncationReport:
    """What a length limit costs. `rows` were shortened and kept; `dropped` had no trained token left (indices of
    examples).
    """

    max_length: int
    total: int
    tokens_lost: int
    rows: tuple[int, ...]
    dropped: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many examples were longer than the limit."""
        return len(self.rows) + len(self.dropped)

    def sentence(self) -> str:
        """The report in words, for people."""
        if not self.count:
            return f"No row is longer than {self.max_length} tokens; nothing is truncated."
        said = (
            f"{self.count} of {self.total} rows longer than {self.max_length} tokens: {self.tokens_lost} tokens cut off"
        )
        if self.dropped:
            said += f", {len(self.dropped)} of these rows dropped because no trained token is left"
        return said + "."


def truncate(examples: Sequence[Example], max_length: int) -> tuple[list[Example], TruncationReport]:
    """Keep the first `max_length` tokens of each example, and drop those that are left with nothing to train.

    A shortened example loses its end, the stop token included. `tokens_lost` counts the tokens cut off the kept
    examples and all tokens of the dropped ones.

    Raises:
        ConfigError: `max_length` leaves no token to predict.
        DataError: nothing trainable is left of any example.
    """
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}; at least 2 tokens are needed, one to read and one to predict.")
    kept: list[Example] = []
    rows: list[int] = []
    dropped: list[int] = []
    for index, example in enumerate(examples):
        if len(example) <= max_length:
            kept.append(example)
            continue
        short = Example(example.tokens[:max_length], example.weights[:max_length], example.where)
        if short.trained:
            kept.append(short)
            rows.append(index)
        else:
            dropped.append(index)
    lost = sum(len(examples[i]) - max_length for i in rows) + sum(len(examples[i]) for i in dropped)
    if examples and not kept:
        raise DataError(
            f"Cut to {max_length} tokens, none of the {len(examples)} rows keeps a trained token.",
            hint=f"Raise max_length; the longest row has {max(map(len, examples))} tokens.",
        )
    return kept, TruncationReport(max_length, len(examples), lost, tuple(rows), tuple(dropped))
