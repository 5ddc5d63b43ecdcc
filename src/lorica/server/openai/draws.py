"""Samples from an engine as they come: one command for each prompt, all prompts at once.

In: commands and a writer for each sample. Out: a word whenever a sample has grown. An engine that dies is asked again,
and what was written already is not written twice: a draw depends on its seed alone. Nothing is drawn for a client that
left, or past the end of every sample. Refuses to know text and JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Protocol, cast

from lorica.engine.arrays import numpy
from lorica.engine.commands import Command, Progress, Reply, Sample, Sampled, TopK
from lorica.engine.link import EngineGone
from lorica.server.errors import ApiError
from lorica.server.items import DEATHS
from lorica.server.openai.writer import Top, Writer


class Engine(Protocol):
    """What is needed of a backbone."""

    ready: asyncio.Event

    def stream(self, command: Command) -> AsyncIterator[Reply]:
        """Progress, then the final reply. Closing it before cancels the command."""


class Draw:
    """The samples of one prompt. `reply` is the engine's last word; None where the samples ended before it."""

    def __init__(self, engine: Engine, command: Sample, writers: Sequence[Writer]) -> None:
        self._engine = engine
        self._command = command
        self.writers = writers
        self.reply: Sampled | None = None

    @property
    def most_tokens(self) -> int:
        """What the samples can have together."""
        return self._command.num_samples * self._command.max_tokens

    async def run(self) -> AsyncIterator[int]:
        """The index of a sample, each time that it has grown. Raises EngineError, ApiError."""
        deaths = 0
        while True:
            await self._engine.ready.wait()
            try:
                async for index in self._once():
                    yield index
                return
            except EngineGone:
                deaths += 1
                if deaths >= DEATHS:
                    raise ApiError(500, "engine", f"The engine died {deaths} times with this request.") from None

    async def _once(self) -> AsyncIterator[int]:
        known = [writer.count for writer in self.writers]
        replies = cast(AsyncGenerator[Reply], self._engine.stream(self._command))
        async with contextlib.aclosing(replies):
            async for reply in replies:
                if isinstance(reply, Progress):
                    skip = min(known[reply.index], len(reply.tokens))
                    known[reply.index] -= skip
                    self.writers[reply.index].feed(reply.tokens[skip:], reply.logprobs[skip:])
                    yield reply.index
                    if all(writer.done for writer in self.writers):
                        return
                elif isinstance(reply, Sampled):
                    self._finish(reply)
                    for index in range(len(self.writers)):
                        yield index

    def _finish(self, reply: Sampled) -> None:
        self.reply = reply
        for writer, sequence in zip(self.writers, reply.sequences, strict=False):
            tokens, logprobs = numpy(sequence.tokens).tolist(), numpy(sequence.logprobs).tolist()
            tops = None if sequence.topk is None else rows(sequence.topk)
            new = writer.count
            writer.feed(tokens[new:], logprobs[new:], tops if tops is None else tops[new:])
        for writer in self.writers:
            writer.finish()


def rows(table: TopK) -> list[Top]:
    """The filled places of each row of a table."""
    ids, logprobs = numpy(table.ids).tolist(), numpy(table.logprobs).tolist()
    return [
        [(token, value) for token, value in zip(*row, strict=True) if value > -99999.0]
        for row in zip(ids, logprobs, strict=True)
    ]


async def together(draws: Sequence[Draw]) -> AsyncGenerator[tuple[int, int]]:
    """Prompt and sample, each time that one has grown; ends when all are done. Whoever stops listening cancels."""
    queue: asyncio.Queue[tuple[int, int] | Exception | None] = asyncio.Queue()

    async def pump(number: int, draw: Draw) -> None:
        try:
            async for index in draw.run():
                queue.put_nowait((number, index))
        except Exception as error:
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(number, draw)) for number, draw in enumerate(draws)]
    left = len(tasks)
    try:
        while left:
            item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
