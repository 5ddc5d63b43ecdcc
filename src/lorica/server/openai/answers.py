"""Answers as OpenAI's clients read them: whole ones, chunks of streams, log-probabilities and usage.

In: a job and parts of its samples. Out: JSON values. Numbers that JSON lacks are null, or -9999.0 where the protocol
wants a number. Refuses to know how they travel.
"""

from __future__ import annotations

import math
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from lorica.engine.arrays import numpy
from lorica.engine.commands import Sampled
from lorica.server.openai.draws import rows
from lorica.server.openai.jobs import Job, Prompt
from lorica.server.openai.writer import Part, Said, Top
from lorica.server.text import Pieces

NEVER = -9999.0
"""The log-probability of what cannot happen, as OpenAI writes it."""


class Answers(ABC):
    """The shapes of one request's answers; all of them carry the same id and time."""

    kind: str
    chunk: str
    prefix: str

    def __init__(self, job: Job) -> None:
        self.job = job
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The one answer of a request that does not stream."""
        return {**self._head(self.kind), "choices": choices, "usage": usage(self.job)}

    def piece(self, choices: list[dict[str, Any]], *, told_usage: bool, last: bool = False) -> dict[str, Any]:
        """One chunk; the last one of a stream that tells its usage has no choices."""
        told: dict[str, Any] = {"usage": usage(self.job) if last else None} if told_usage else {}
        return {**self._head(self.chunk), "choices": choices, **told}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.job.model.name}

    @abstractmethod
    def choice(self, index: int, part: Part) -> dict[str, Any]:
        """One sample of an answer."""

    @abstractmethod
    def delta(self, index: int, part: Part, *, first: bool) -> list[dict[str, Any]]:
        """The next part of a sample as choices of chunks, one chunk each."""


class Completions(Answers):
    """`text_completion`."""

    kind = chunk = "text_completion"
    prefix = "cmpl"

    def choice(self, index: int, part: Part) -> dict[str, Any]:
        prompt, draw = self.job.prompts[index // self.job.n], self.job.draws[index // self.job.n]
        text, said = part.text, part.tokens
        if self.job.echo:
            text, said = prompt.text + text, [*echoed(prompt, draw.reply), *said]
        return self._shape(index, text, said, part.reason)

    def delta(self, index: int, part: Part, *, first: bool) -> list[dict[str, Any]]:
        return [self.choice(index, part) if first else self._shape(index, part.text, part.tokens, part.reason)]

    def _shape(self, index: int, text: str, said: Sequence[Said], reason: str | None) -> dict[str, Any]:
        told = None if self.job.tops is None else completion_logprobs(said, self.job.text.pieces)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": reason}


class Chats(Answers):
    """`chat.completion` and its chunks."""

    kind = "chat.completion"
    chunk = "chat.completion.chunk"
    prefix = "chatcmpl"

    def choice(self, index: int, part: Part) -> dict[str, Any]:
        message = {"role": "assistant", "content": part.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(part), "finish_reason": part.reason}

    def delta(self, index: int, part: Part, *, first: bool) -> list[dict[str, Any]]:
        told = []
        if first:
            told.append(self._shape(index, {"role": "assistant", "content": ""}, None))
        if part.text or part.tokens:
            told.append(self._shape(index, {"content": part.text}, None, self._logprobs(part)))
        if part.reason is not None:
            told.append(self._shape(index, {}, part.reason))
        return told

    def _shape(self, index: int, delta: dict[str, Any], reason: str | None, logprobs: Any = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, part: Part) -> dict[str, Any] | None:
        if self.job.tops is None:
            return None
        pieces = self.job.text.pieces
        return {"content": [_chat_token(said, pieces) for said in part.tokens], "refusal": None}


def usage(job: Job) -> dict[str, Any]:
    """Tokens: a prompt counts once for all its samples; a sample counts with the token that ended it."""
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": job.drawn_tokens,
        "total_tokens": job.prompt_tokens + job.drawn_tokens,
        "prompt_tokens_details": {"cached_tokens": job.cached_tokens},
    }


def echoed(prompt: Prompt, reply: Sampled | None) -> list[Said]:
    """The prompt's tokens; the first has no log-probability, for nothing came before it."""
    count = len(prompt.tokens)
    values: list[float | None] = [None] * count
    tops: list[Top | None] = [None] * count
    if reply is not None and reply.prompt_logprobs is not None:
        values[1:] = numpy(reply.prompt_logprobs).tolist()[1:]
        found = [[]] * count if reply.topk_prompt is None else rows(reply.topk_prompt)
        tops[1:] = found[1:]
    return [Said(*row) for row in zip(prompt.tokens, values, prompt.offsets, tops, strict=True)]


def completion_logprobs(said: Sequence[Said], pieces: Pieces) -> dict[str, Any]:
    """Four lists, one entry for each token. The token itself is always among its likeliest."""
    return {
        "tokens": [pieces.spell(one.token) for one in said],
        "token_logprobs": [None if one.logprob is None else _number(one.logprob) for one in said],
        "top_logprobs": [_tops(one, pieces) for one in said],
        "text_offset": [one.offset for one in said],
    }


def _tops(said: Said, pieces: Pieces) -> dict[str, float | None] | None:
    if said.logprob is None:
        return None
    told: dict[str, float | None] = {}
    for token, value in [*(said.top or []), (said.token, said.logprob)]:
        told[pieces.spell(token)] = _number(value)
    return told


def _chat_token(said: Said, pieces: Pieces) -> dict[str, Any]:
    top = [_chat_entry(token, value, pieces) for token, value in said.top or []]
    return {**_chat_entry(said.token, said.logprob, pieces), "top_logprobs": top}


def _chat_entry(token: int, value: float | None, pieces: Pieces) -> dict[str, Any]:
    piece = pieces[token]
    return {"token": pieces.spell(token), "logprob": _number(value, NEVER), "bytes": list(piece)}


def _number(value: float | None, unknown: float | None = None) -> float | None:
    if value is None or math.isnan(value):
        return unknown
    return value if math.isfinite(value) else NEVER
