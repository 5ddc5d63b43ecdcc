"""One sample as it is written: tokens come in, text that is certain goes out, with each token's place in it.

In: tokens with log-probabilities. Out: parts of text and their tokens; how the sample ended. A stop string and what
follows it are no part of the text; the tokens that were drawn are all told. Refuses to know engines and JSON.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from lorica.server.text import Reader, StopFinder, Text, overlap

Top = list[tuple[int, float]]


@dataclass(slots=True)
class Said:
    """A token, its log-probability (None where there is none), where it begins, and the likeliest tokens there."""

    token: int
    logprob: float | None
    offset: int
    top: Top | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """Text, and the tokens that it began with; `reason` with the last part."""

    text: str
    tokens: list[Said]
    reason: Literal["stop", "length"] | None = None


class Writer:
    """`begin` is where the text stands in a longer one. With `turn`, what the chat template puts before and after an
    assistant's words is taken away.
    """

    def __init__(
        self,
        text: Text,
        stops: list[str],
        stop_ids: Collection[int],
        *,
        begin: int = 0,
        turn: tuple[str, str] = ("", ""),
    ) -> None:
        self._reader = Reader(text.pieces)
        self._finder = StopFinder(stops)
        self._stop_ids = frozenset(stop_ids)
        self._begin = begin
        self._before, self._after = turn
        self._lead = self._tail = self._new = ""
        self._written = 0
        self._pending: deque[Said] = deque()
        self.count = 0
        self.reason: Literal["stop", "length"] | None = None

    @property
    def done(self) -> bool:
        """Whether nothing that comes can change the text."""
        return self.reason is not None

    def feed(self, tokens: Sequence[int], logprobs: Sequence[float], tops: Sequence[Top] | None = None) -> None:
        """Tokens that were drawn; those after the end are not looked at."""
        for index, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            if self.done:
                return
            self.count += 1
            top = None if tops is None else tops[index]
            self._pending.append(Said(token, logprob, self._begin + self._reader.length, top))
            if token in self._stop_ids:
                self._end("stop", by_token=True)
            else:
                self._show(self._finder.feed(self._reader.feed(token)))
                if self._finder.found:
                    self._end("stop")

    def finish(self) -> None:
        """No more tokens come. What ended before stays as it ended."""
        if not self.done:
            self._end("length")

    def take(self) -> Part:
        """What is certain and was not taken yet."""
        text, self._new = self._new, ""
        end = self._begin + self._written
        tokens = []
        while self._pending and (self.done or self._pending[0].offset < end):
            said = self._pending.popleft()
            said.offset = min(said.offset, end)
            tokens.append(said)
        return Part(text, tokens, self.reason)

    def _end(self, reason: Literal["stop", "length"], *, by_token: bool = False) -> None:
        if not self._finder.found:
            self._show(self._finder.feed(self._reader.finish()))
        if self._finder.found:
            reason = "stop"
        else:
            self._show(self._finder.finish())
        rest = self._lead + self._tail  # at most one of them holds anything
        if by_token and self._tail:
            rest = rest.removesuffix(self._after)
        self._put(rest)
        self.reason = reason

    def _show(self, text: str) -> None:
        """Text before any stop string, on its way past what the template puts around the words."""
        if self._before:
            self._lead += text
            if self._before.startswith(self._lead) and len(self._lead) < len(self._before):
                return
            text, self._lead = self._lead.removeprefix(self._before), ""
            self._before = ""
        self._tail += text
        cut = len(self._tail) - (overlap(self._tail, [self._after]) if self._after else 0)
        text, self._tail = self._tail[:cut], self._tail[cut:]
        self._put(text)

    def _put(self, text: str) -> None:
        self._new += text
        self._written += len(text)
