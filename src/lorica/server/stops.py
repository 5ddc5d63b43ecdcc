"""Where a sample ends: end tokens, stop tokens, and stop strings that a sample's text may complete anywhere.

In: a request's `stop`, a tokenizer file. Out: token ids that the engine watches for, and a watcher that finds the token
which completes a stop string. `stop` null is the model's end tokens, an empty list is none; strings and ids come on top
of the end tokens. Refuses to know engines and HTTP.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lorica.core.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class Stops:
    """`ids` end a sample by themselves; `strings` must be looked for in its text."""

    ids: list[int]
    strings: list[str] = field(default_factory=list)


@functools.lru_cache(maxsize=8)
def tokenizer(directory: str) -> Tokenizer:
    """The tokenizer of a model directory. Raises DataError where there is none."""
    from tokenizers import Tokenizer

    file = Path(directory) / "tokenizer.json"
    if not directory or not file.is_file():
        raise DataError("This model has no tokenizer here, so stop strings cannot be found; give stop token ids.")
    return Tokenizer.from_file(str(file))


def stops(given: str | list[int] | list[str] | None, eos_ids: list[int], directory: str) -> Stops:
    """What a request's `stop` means. Raises DataError for strings without a tokenizer, and for an empty string."""
    if given is None:
        return Stops(eos_ids)
    words = [given] if isinstance(given, str) else given
    if not words:
        return Stops([])
    ids, strings = list(eos_ids), []
    for word in words:
        if isinstance(word, int):
            ids.append(word)
            continue
        if not word:
            raise DataError("A stop string is empty.")
        special = tokenizer(directory).token_to_id(word)
        if special is not None and special in added_ids(directory):
            ids.append(special)  # only this one token writes it
        else:
            strings.append(word)
    return Stops(sorted(set(ids)), strings)


@functools.lru_cache(maxsize=8)
def added_ids(directory: str) -> frozenset[int]:
    """Ids of tokens that stand outside the vocabulary proper, such as `<|im_end|>`."""
    return frozenset(tokenizer(directory).get_added_tokens_decoder())


class Watcher:
    """Looks for stop strings in one sample as its tokens come."""

    def __init__(self, strings: list[str], directory: str) -> None:
        self._strings = strings
        self._tokenizer = tokenizer(directory)
        self._longest = max(map(len, strings))
        self._tokens: list[int] = []
        self.read = 0
        self.end: int | None = None

    def feed(self, tokens: list[int]) -> int | None:
        """How many tokens the sample has when a stop string is complete, once one is; None before."""
        self._tokens += tokens
        while self.end is None and self.read < len(self._tokens):
            self.read += 1
            # a string of n characters is written by at most 4n bytes, and a token writes at least one byte
            tail = self._tokens[max(0, self.read - 4 * self._longest - 4) : self.read]
            text = self._tokenizer.decode(tail, skip_special_tokens=False)
            if any(string in text for string in self._strings):
                self.end = self.read
        return self.end
