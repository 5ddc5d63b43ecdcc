"""Samples: each by itself, journalled before it is acknowledged, drawn again after a death with the same numbers.

In: checked requests and the sampler that they go to. Out: results, which wake whoever waits, and a log of completions
for each sampling client. Refuses to know HTTP and how tokens are drawn.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorica.core.errors import DataError, LoricaError
from lorica.engine.commands import Array, Cancel, Progress, Sample, Sampled, Sequence
from lorica.engine.link import EngineError, EngineGone
from lorica.server import stops, work
from lorica.server.backbones import Backbone
from lorica.server.bodies import SampleBody
from lorica.server.completions import Completions
from lorica.server.futures import PROTOBUF, Result
from lorica.server.items import DEATHS, engine_failure
from lorica.server.runtime import Runtime
from lorica.server.wire import sampling
from lorica.store import journal, runs
from lorica.store.sessions import Sampler

log = logging.getLogger("lorica.server.samples")

SAMPLE = "sample"


@dataclass(slots=True)
class Draw:
    """A request for samples that is not done. After a restart its body is the journal's bytes."""

    id: str
    seq: int
    sampler: Sampler
    body: SampleBody | bytes
    tokens: int
    count: int
    command: int = 0
    at: float = field(default_factory=time.monotonic)


class Samples:
    """Draws samples of all samplers; what is asked of it was committed to the journal."""

    def __init__(self, runtime: Runtime) -> None:
        self._rt = runtime
        self._draws: dict[str, tuple[Draw, Backbone]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.completions = Completions()

    def __len__(self) -> int:
        """How many requests are not done."""
        return len(self._draws)

    def submit(self, draw: Draw, backbone: Backbone) -> None:
        self._draws[draw.id] = (draw, backbone)
        task = asyncio.create_task(self._work(draw, backbone), name=draw.id)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self, request_id: str, tenant: str) -> bool:
        """Give a request up; False where the tenant has no such unfinished one."""
        draw, backbone = self._draws.get(request_id, (None, None))
        if draw is None or backbone is None or draw.sampler.tenant != tenant:
            return False
        if draw.command:
            backbone.send_quietly(Cancel(id=self._rt.next_id(), target=draw.command))
        return True

    def position(self, request_id: str) -> tuple[str, str]:
        """The SDK's queue state of an unfinished request, and why it waits."""
        draw, backbone = self._draws.get(request_id, (None, None))
        if draw is None or backbone is None:
            return "active", "being finished"
        if not backbone.ready.is_set():
            return "paused_capacity", "the engine is starting"
        return "active", f"one of {len(self._draws)} requests for samples"

    async def drain(self) -> None:
        """Wait until nothing is unfinished."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def _work(self, draw: Draw, backbone: Backbone) -> None:
        result, deaths = None, 0
        while result is None:
            await backbone.ready.wait()
            try:
                result = Result(PROTOBUF, await self._draw(draw, backbone))
            except EngineGone:
                deaths += 1
                if deaths >= DEATHS:
                    result = Result.failed("server", "engine", f"The engine died {deaths} times with this request.")
            except EngineError as error:
                result = engine_failure(error)
            except LoricaError as error:
                result = work.failure(error)
            except Exception:
                log.exception("request %s", draw.id)
                result = Result.failed("server", "server", "The server met an error of its own.")
        await self._finish(draw, result)

    async def _finish(self, draw: Draw, result: Result) -> None:
        tenant = draw.sampler.tenant
        self._draws.pop(draw.id, None)
        self._rt.limiter.end_samples(tenant, draw.count)
        self._rt.futures.resolve(draw.id, tenant, result)
        self.completions.add(draw.sampler.id, draw.seq, draw.id, result)
        try:
            await self._rt.database.write(
                lambda c: journal.finish(c, draw.id, result.media, result.outcome, drop_body=True)
            )
        except LoricaError as error:
            log.error("result of %s: %s", draw.id, error.message)
        self._rt.finished(SAMPLE, result, draw.tokens, tenant)

    async def _draw(self, draw: Draw, backbone: Backbone) -> bytes:
        body = draw.body if isinstance(draw.body, SampleBody) else SampleBody.model_validate(json.loads(draw.body))
        info = backbone.info
        context = info.get("context")
        sampling.check(body, context)
        found = stops.stops(
            body.sampling_params.stop, list(info.get("eos_ids") or []), str(info.get("tokenizer") or "")
        )
        command = sampling.command(
            body,
            id=self._rt.next_id(),
            tenant=draw.sampler.tenant,
            adapters=await self._adapters(draw.sampler),
            context=context,
            seed=_seed(draw.id),
            stop_ids=found.ids,
            stream=bool(found.strings),
        )
        draw.command = command.id
        self._rt.observer.sent(SAMPLE, time.monotonic() - draw.at)
        if found.strings:
            reply = await self._watched(command, backbone, found.strings, str(info.get("tokenizer")))
        else:
            reply = await backbone.send(command)
        if not isinstance(reply, Sampled):
            raise DataError(f"The engine answered a request for samples with {type(reply).__name__}.")
        return sampling.answer(reply, last=body.prompt_logprobs_last_n)

    async def _adapters(self, sampler: Sampler) -> list[str]:
        """Local folders of the sampler's stack."""
        artifacts = list(sampler.info.get("artifacts", []))
        followed = sampler.info.get("inflight")
        if followed:
            run = await self._rt.database.aread(lambda c: runs.get_run(c, followed, sampler.tenant))
            if run is None or "inflight" not in run.info:
                raise DataError(f"Run {followed} has no weights that its inflight samplers could follow.")
            artifacts = [run.info["inflight"]]
        return [await self._rt.places.read(artifact) for artifact in artifacts]

    async def _watched(self, command: Sample, backbone: Backbone, strings: list[str], tokenizer: str) -> Any:
        """Draw with stop strings: text is looked at as it comes, and nothing is drawn past the last sample's end."""
        watchers = [stops.Watcher(strings, tokenizer) for _ in range(command.num_samples)]
        whole: dict[int, tuple[list[int], list[float]]] = {i: ([], []) for i in range(command.num_samples)}
        early = not (command.topk_sample or command.topk_prompt or command.prompt_logprobs)
        cancelled = False
        try:
            async for reply in backbone.stream(command):
                if isinstance(reply, Sampled):
                    return _cut(reply, watchers)
                if isinstance(reply, Progress):
                    whole[reply.index][0].extend(reply.tokens)
                    whole[reply.index][1].extend(reply.logprobs)
                    watchers[reply.index].feed(reply.tokens)
                    if early and not cancelled and all(watcher.end is not None for watcher in watchers):
                        cancelled = True
                        backbone.send_quietly(Cancel(id=self._rt.next_id(), target=command.id))
        except EngineError:
            if not cancelled:
                raise
        return _cut(Sampled(id=command.id, sequences=[_sequence(*whole[i]) for i in sorted(whole)]), watchers)


def _sequence(tokens: list[int], logprobs: list[float]) -> Sequence:
    ids, values = np.array(tokens, np.int32), np.array(logprobs, np.float32)
    return Sequence(
        Array(ids.tobytes(), "int32", ids.shape), Array(values.tobytes(), "float32", values.shape), "length"
    )


def _cut(reply: Sampled, watchers: list[stops.Watcher]) -> Sampled:
    """Every sample up to the token that completes a stop string, which it keeps."""
    cut = []
    for sequence, watcher in zip(reply.sequences, watchers, strict=True):
        if watcher.end is None:
            watcher.feed(np.frombuffer(sequence.tokens.data, np.int32)[watcher.read :].tolist())
        cut.append(sequence if watcher.end is None else _first(sequence, watcher.end))
    return Sampled(reply.id, cut, reply.prompt_logprobs, reply.topk_prompt, reply.cached)


def _first(sequence: Sequence, count: int) -> Sequence:
    def rows(value: Array) -> Array:
        taken = np.frombuffer(value.data, value.dtype).reshape(value.shape)[:count]
        return Array(taken.tobytes(), value.dtype, taken.shape)

    topk = sequence.topk
    if topk is not None:
        topk = type(topk)(rows(topk.ids), rows(topk.logprobs))
    return Sequence(rows(sequence.tokens), rows(sequence.logprobs), "stop", topk)


def _seed(request_id: str) -> int:
    """A seed for a request without one: the same when it runs again, and different for every other request."""
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:7], "little")
