"""Where a sample ends: end tokens, stop tokens, and stop strings that a sample's text may complete anywhere.

In: a request's `stop`, a tokenizer file. Out: token ids that the engine watches for, and a watcher that finds the token
which completes a stop string. `stop` null is the model's end tokens, an empty list is none; strings and ids come on top
of the end tokens. Refuses to know engines and HTTP.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from lorica.core.errors import DataError
from lorica.server.text import Reader, StopFinder, text_of


@dataclass(frozen=True, slots=True)
class Stops:
    """`ids` end a sample by themselves; `strings` must be looked for in its text."""

    ids: list[int]
    strings: list[str] = field(default_factory=list)


def stops(given: str | list[int] | list[str] | None, eos_ids: list[int], directory: str) -> Stops:
    """What a request's `stop` means. Raises DataError for an empty string and for strings without a
    tokenizer, and what `text_of` raises for a tokenizer that cannot be read.
    """
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
        if not directory:
            raise DataError("This model has no tokenizer here, so stop strings cannot be found; give stop token ids.")
        special = text_of(directory).tokenizer.fast.token_to_id(word)
        if special is not None and special in added_ids(directory):
            ids.append(special)  # only this one token writes it
        else:
            strings.append(word)
    return Stops(sorted(set(ids)), strings)


@functools.lru_cache(maxsize=8)
def added_ids(directory: str) -> frozenset[int]:
    """Ids of tokens that stand outside the vocabulary proper, such as `<|im_end|>`."""
    return frozenset(text_of(directory).tokenizer.fast.get_added_tokens_decoder())


class Watcher:
    """Looks for stop strings in one sample as its tokens come."""

    def __init__(self, strings: list[str], directory: str) -> None:
        self._reader = Reader(text_of(directory).pieces)
        self._finder = StopFinder(strings)
        self.read = 0
        self.end: int | None = None

    def feed(self, tokens: list[int]) -> int | None:
        """How many tokens the sample has when a stop string is complete, once one is; None before."""
        for token in tokens:
            if self.end is not None:
                break
            self.read += 1
            self._finder.feed(self._reader.feed(token))
            self.end = self.read if self._finder.found else None
        return self.end
