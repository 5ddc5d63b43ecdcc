"""Data as the trainer sees it: what was recognised, what is trained, what is cut.

In: a data set and a renderer. Out: `Explanation`, which prints as text and converts to plain values, and
`colour_tokens`, which marks the trained tokens of an example. Refuses to know terminals: the caller says whether
colour is wanted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from lorica.data.example import Example, TruncationReport
from lorica.data.records import Dataset
from lorica.data.render import Prepared, Renderer, prepare
from lorica.data.template import Tokenizer

TRAINED = ("⟦", "⟧")
"""Around each run of trained tokens when there is no colour."""

_GREEN = ("\x1b[32m", "\x1b[92m")
_GREY = ("\x1b[90m", "\x1b[37m")
_PLAIN = "\x1b[0m"


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a data set turns into. Lengths are tokens of an example before truncation."""

    path: str
    shape: str
    reason: str
    fingerprint: str
    ignored: tuple[str, ...]
    decisions: tuple[str, ...]
    rows: int
    tokens: int
    trained_tokens: int
    lengths: dict[str, int]
    truncation: TruncationReport | None
    first: str

    @property
    def trained_share(self) -> float:
        """Trained tokens over all tokens."""
        return self.trained_tokens / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {**asdict(self), "trained_share": self.trained_share}

    def __str__(self) -> str:
        spread = ", ".join(f"{name} {value}" for name, value in self.lengths.items())
        lines = [
            f"{self.path}: {self.shape}, because {self.reason}.",
            *self.decisions,
            f"{self.rows} rows, {self.tokens} tokens, {self.trained_tokens} trained ({self.trained_share:.1%}).",
            f"Tokens of a row: {spread}.",
        ]
        if self.ignored:
            lines.append(f"Columns that are not used: {', '.join(self.ignored)}.")
        if self.truncation is not None:
            lines.append(self.truncation.sentence())
        return "\n".join([*lines, "First row:", self.first])


def explain(
    dataset: Dataset, renderer: Renderer, max_length: int | None = None, *, colour: bool = False
) -> Explanation:
    """The shape that was recognised and why, what the renderer decided, counts, lengths, truncation and the first
    example.

    Raises DataError naming the first line that cannot be rendered.
    """
    return describe(dataset, renderer, prepare(dataset, renderer, max_length), colour=colour)


def describe(dataset: Dataset, renderer: Renderer, prepared: Prepared, *, colour: bool = False) -> Explanation:
    """`explain` for a data set whose examples are at hand."""
    return Explanation(
        path=dataset.path,
        shape=dataset.shape.name,
        reason=dataset.shape.reason,
        fingerprint=dataset.fingerprint,
        ignored=dataset.ignored,
        decisions=tuple(renderer.decisions(dataset)),
        rows=len(prepared.examples),
        tokens=sum(map(len, prepared.examples)),
        trained_tokens=sum(example.trained for example in prepared.examples),
        lengths=_spread(prepared.lengths),
        truncation=prepared.truncation,
        first=colour_tokens(prepared.examples[0], renderer.tokenizer, colour=colour),
    )


def _spread(lengths: Sequence[int]) -> dict[str, int]:
    """Nearest-rank percentiles, so that every figure is the length of a real row."""
    ordered = sorted(lengths)
    ranks = {"shortest": 0.0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
    return {name: ordered[max(0, math.ceil(rank * len(ordered)) - 1)] for name, rank in ranks.items()}


def colour_tokens(example: Example, tokenizer: Tokenizer, colour: bool) -> str:
    """The example as text with its trained tokens marked: green, neighbours in two shades; everything else grey.

    Without colour, and always when the environment sets NO_COLOR, each trained run stands between ⟦ and ⟧ instead.
    Control characters in the data are shown as escapes, so that a file cannot write to the terminal.
    """
    colour = colour and not os.environ.get("NO_COLOR")
    parts: list[str] = []
    for trained, run in groupby(zip(example.tokens, example.weights, strict=True), key=lambda pair: bool(pair[1])):
        pieces = _pieces([token for token, _ in run], tokenizer)
        if colour:
            shades = _GREEN if trained else _GREY
            parts.extend(f"{shades[i % 2]}{_visible(piece)}{_PLAIN}" for i, piece in enumerate(pieces))
        else:
            text = _visible("".join(pieces))
            parts.append(f"{TRAINED[0]}{text}{TRAINED[1]}" if trained else text)
    return "".join(parts)


def _pieces(tokens: Sequence[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of each token; tokens that hold parts of one character come out together."""
    done = 0
    for end in range(1, len(tokens) + 1):
        text = str(tokenizer.decode(tokens[done:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if "\ufffd" in text and end < len(tokens) and end - done < 4:
            continue
        done = end
        yield text


def _visible(text: str) -> str:
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
