"""A real engine in this process: it answers `Sample` commands from a stream of samples, as an engine process does."""

from __future__ import annotations

import asyncio
import itertools

import numpy as np

from lorica.engine.commands import Progress, Sample, Sampled, Sequence, TopK
from lorica.engine.host import Host
from lorica.engine.link import EngineError, EngineGone
from lorica.engine.requests import Failed, Finished, StreamRequest, Token
from lorica.engine.stream import Stream
from lorica.sampling.params import SamplingParams
from lorica.server.wire.tensors import array, numpy


def table(topk):
    return None if topk is None else TopK(array(topk.ids), array(topk.logprobs))


class LocalEngine:
    """`sent` are the commands that came. After telling `dies_after` tokens it is gone once, as a killed engine is."""

    def __init__(self, backbone):
        self.host = Host(backbone)
        self.queue = Stream(self.host)
        self.ready = asyncio.Event()
        self.ready.set()
        self.sent = []
        self.cancelled = []
        self.told = 0
        self.dies_after = None
        self._adapters = {}
        self._inbox = {}
        self._keys = itertools.count()

    def load(self, folder):
        if folder not in self._adapters:
            self._adapters[folder] = self.host.load(folder, f"adapter {len(self._adapters)}")
        return self._adapters[folder]

    async def stream(self, command):
        assert isinstance(command, Sample)
        self.sent.append(command)
        params = SamplingParams(
            max_tokens=command.max_tokens,
            temperature=command.temperature,
            top_k=command.top_k,
            top_p=command.top_p,
            seed=command.seed,
            stop_ids=tuple(command.stop_ids),
        )
        key = next(self._keys)
        request = StreamRequest(
            key,
            numpy(command.prompt).tolist(),
            tuple(map(self.load, command.adapters)),
            params,
            command.num_samples,
            prompt_logprobs=command.prompt_logprobs,
            topk_prompt=command.topk_prompt,
            topk_sample=command.topk_sample,
        )
        try:
            self.queue.add(request)
        except ValueError as error:
            raise EngineError("user", error.code, error.message) from None
        try:
            async for event in self._events(key):
                if isinstance(event, Token) and command.stream:
                    yield Progress(command.id, event.index, [event.token], [event.logprob])
                    self.told += 1
                    if self.told == self.dies_after:
                        raise EngineGone("The engine died.")
                elif isinstance(event, Finished):
                    yield self._sampled(command, event.result)
                elif isinstance(event, Failed):
                    raise EngineError("user", "data", str(event.error))
        finally:
            if self.queue.cancel(key):
                self.cancelled.append(key)

    async def _events(self, key):
        while not self.queue.idle:
            if not self._inbox.get(key):
                for event in self.queue.turn():
                    self._inbox.setdefault(event.key, []).append(event)
            for event in self._inbox.pop(key, []):
                yield event
                if not isinstance(event, Token):
                    return
            await asyncio.sleep(0)
        for event in self._inbox.pop(key, []):
            yield event

    def _sampled(self, command, result):
        sequences = [
            Sequence(
                array(np.array(sample.tokens, np.int32)),
                array(np.array(sample.logprobs, np.float32)),
                "stop" if sample.stopped else "length",
                table(sample.topk),
            )
            for sample in result.samples
        ]
        scores = None if result.prompt_logprobs is None else array(result.prompt_logprobs)
        return Sampled(command.id, sequences, scores, table(result.topk_prompt), result.cached)
