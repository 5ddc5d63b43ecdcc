"""Sampling as the service asks for it: adapters by their folders, commands into a stream, its events into replies.

In: `commands.Sample`. Out: `Progress`, `Sampled` and `Failed`. A bounded number of adapters is on the device; a request
waits for a place while all are in use. Refuses to know runs, training and how commands travel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorica.adapters.adapter import Adapter
from lorica.core.errors import DataError, RouteError
from lorica.engine import commands
from lorica.engine.arrays import array
from lorica.engine.host import Host
from lorica.engine.intake import checked
from lorica.engine.requests import Event, Finished, Sample, StreamRequest, Token, TopK
from lorica.engine.residency import Recent
from lorica.engine.stream import Stream
from lorica.sampling.params import SamplingParams


class Samplers:
    """A stream of samples, fed with commands."""

    def __init__(self, stream: Stream, root: Path, limit: int) -> None:
        self.stream = stream
        self._adapters = Adapters(stream, root, limit)
        self._waiting: deque[commands.Sample] = deque()
        self._running: dict[int, commands.Sample] = {}

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    @property
    def waiting(self) -> int:
        """Requests of which nothing was computed."""
        return len(self._waiting) + self.stream.waiting

    @property
    def adapters(self) -> int:
        return len(self._adapters)

    def add(self, command: commands.Sample) -> None:
        """Let a command wait for its turn. Raises LoricaError where it is wrong."""
        request = self._request(command, ())
        if not len(request.prompt):
            raise DataError("The prompt is empty; a model needs at least one token to go on from.")
        self._waiting.append(command)

    def cancel(self, id: int) -> bool:
        """Forget a command; false where it is not there."""
        command = self._running.pop(id, None)
        if command is not None:
            self.stream.cancel(id)
            self._adapters.give(command.adapters)
            return True
        found = next((waiting for waiting in self._waiting if waiting.id == id), None)
        if found is not None:
            self._waiting.remove(found)
        return found is not None

    def turn(self, prompt_tokens: int) -> list[commands.Reply | tuple[int, Exception]]:
        """One turn of the stream. An error stands with the id of the command that it ended."""
        replies: list[commands.Reply | tuple[int, Exception]] = self._start()
        for event in self.stream.turn(prompt_tokens) if self._running else []:
            replies.append(self._told(event))
        return replies

    def _start(self) -> list[commands.Reply | tuple[int, Exception]]:
        """Hand over what waits, in order, as far as adapters have places."""
        errors: list[commands.Reply | tuple[int, Exception]] = []
        while self._waiting:
            command = self._waiting[0]
            stack: tuple[Adapter, ...] | None = None
            try:
                stack = self._adapters.take(command.adapters)
                if stack is None:
                    break
                self.stream.add(self._request(command, stack))
                self._running[command.id] = command
            except Exception as error:
                if stack is not None:
                    self._adapters.give(command.adapters)
                errors.append((command.id, error))
            self._waiting.popleft()
        return errors

    def _request(self, command: commands.Sample, stack: tuple[Adapter, ...]) -> StreamRequest:
        prompt = checked(command.prompt, "The prompt")
        if prompt.ndim != 1 or prompt.dtype.kind != "i":
            raise DataError(f"The prompt is {prompt.dtype} of shape {prompt.shape}; one row of token ids is right.")
        params = SamplingParams(
            max_tokens=command.max_tokens,
            temperature=command.temperature,
            top_k=command.top_k,
            top_p=command.top_p,
            seed=command.seed,
            stop_ids=tuple(command.stop_ids),
            stop_sequences=tuple(tuple(tokens) for tokens in command.stop_sequences),
        )
        return StreamRequest(
            command.id,
            prompt.tolist(),
            stack,
            params,
            num_samples=command.num_samples,
            prompt_logprobs=command.prompt_logprobs,
            topk_prompt=command.topk_prompt,
            topk_sample=command.topk_sample,
            tells=command.stream,
        )

    def _told(self, event: Event) -> commands.Reply | tuple[int, Exception]:
        id: Any = event.key
        command = self._running[id]
        if isinstance(event, Token):
            return commands.Progress(id, event.index, [event.token], [event.logprob])
        del self._running[id]
        self._adapters.give(command.adapters)
        if not isinstance(event, Finished):
            return id, event.error
        result = event.result
        return commands.Sampled(
            id,
            [_sequence(sample) for sample in result.samples],
            None if result.prompt_logprobs is None else array(result.prompt_logprobs.astype(np.float32, copy=False)),
            _topk(result.topk_prompt),
            result.cached,
        )


def _sequence(sample: Sample) -> commands.Sequence:
    tokens, logprobs = np.array(sample.tokens, np.int32), np.array(sample.logprobs, np.float32)
    reason: Any = "stop" if sample.stopped else "length"
    return commands.Sequence(array(tokens), array(logprobs), reason, _topk(sample.topk))


def _topk(table: TopK | None) -> commands.TopK | None:
    return None if table is None else commands.TopK(array(table.ids), array(table.logprobs))


class Adapters:
    """Adapters by their folders, of which nothing changes; at most `limit` of them."""

    def __init__(self, stream: Stream, root: Path, limit: int) -> None:
        self._stream = stream
        self._host: Host = stream.host
        self._root = root
        self._recent = Recent(limit)
        self._users: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._recent)

    def take(self, paths: Sequence[str]) -> tuple[Adapter, ...] | None:
        """The adapters of a stack, in use until `give`; None while all places are in use. Raises what `load_adapter`
        raises, and RouteError for a stack that can never be held.
        """
        limit = self._recent.limit
        if len(set(paths)) != len(paths) or len(paths) > limit:
            raise RouteError(f"A stack holds at most {limit} adapters, each once; this one has {len(paths)}.")
        absent = [path for path in paths if path not in self._recent]
        gone = self._recent.surplus(len(absent), {*paths, *self._users})
        if len(self._recent) - len(gone) + len(absent) > limit:
            return None
        for path in gone:
            self._stream.forget(self._host.adapter(_key(path)))
            self._host.delete(_key(path))
            self._recent.drop(path)
        for path in absent:
            self._host.load(self._root / path, _key(path))
            self._recent.use(path)
        for path in paths:
            self._recent.use(path)
            self._users[path] = self._users.get(path, 0) + 1
        return tuple(self._host.adapter(_key(path)) for path in paths)

    def give(self, paths: Sequence[str]) -> None:
        """A stack is no longer in use."""
        for path in paths:
            self._users[path] -= 1
            if not self._users[path]:
                del self._users[path]


def _key(path: str) -> str:
    return f"path {path}"
