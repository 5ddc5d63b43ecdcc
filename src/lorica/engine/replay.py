"""Passes that come again, as graphs of the device: one launch in place of thousands, which take most of the time.

In: a key of all that a pass depends on besides the numbers in its inputs, adapters and weights; the inputs; the pass.
Out: its outputs, to be read before another pass is run. A pass is recorded only once it ran under the same key without
waiting for the device; whatever does not fit runs as it is. Refuses to know models, adapters and losses.
"""

from __future__ import annotations

import threading
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

KNOWN = 256
"""Keys that are remembered."""
LATELY = 4
"""A recording is in use while it is replayed once in so many runs for each recording that there may be."""
TRIES = 3
"""Runs in which a pass may show that it does not wait; what is made once for a key waits in its first."""

BESIDE = threading.Lock()
"""Held by a thread that works on the device beside the passes. Nothing is recorded meanwhile: what it asks of the
device would break a recording, or fail.
"""

Inputs = Mapping[str, Tensor]
Body = Callable[[Inputs], list[Tensor]]
T = TypeVar("T")
_HELD: list[list[object]] = []


def held(value: T) -> T:
    """What a pass reads and somebody else may let go of: a recording of it keeps this alive."""
    for found in _HELD:
        found.append(value)
    return value


class Graph(ABC):
    """Operations on fixed memory, recorded on one device."""

    @abstractmethod
    def __init__(self, device: torch.device, other: Graph | None) -> None:
        """An empty one. It may share what is between its operations with `other`, which never runs at the same time."""

    @abstractmethod
    def record(self, run: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The outputs of `run`, of which nothing was computed yet. Raises RuntimeError where it cannot be recorded."""

    @abstractmethod
    def replay(self) -> None:
        """Compute it."""

    @staticmethod
    @abstractmethod
    def watched(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], bool]:
        """What `run` gives, and whether it waited for the device."""


class CudaGraph(Graph):
    """Of a GPU."""

    def __init__(self, device: torch.device, other: Graph | None) -> None:
        self.device, self.graph = device, torch.cuda.CUDAGraph()
        self.pool: Any = other.pool if isinstance(other, CudaGraph) else torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], list[Tensor]]) -> list[Tensor]:
        with torch.cuda.device(self.device):
            try:
                with torch.cuda.graph(self.graph, pool=self.pool):
                    return run()
            except BaseException:
                self._recover()
                raise

    def _recover(self) -> None:
        """A recording that broke off leaves torch's generator as if it went on; one that ends puts it right."""
        with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device=self.device)

    def replay(self) -> None:
        self.graph.replay()

    @staticmethod
    def watched(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], bool]:
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                outputs = run()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        waits = False
        for one in heard:
            if "called a synchronizing CUDA operation" in str(one.message):
                waits = True
            elif "Synchronization debug mode is a prototype" not in str(one.message):
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        return outputs, waits


GRAPHS: dict[str, type[Graph]] = {"cuda": CudaGraph}
"""By the type of the device."""


@dataclass(slots=True, eq=False)
class _Recording:
    """A recorded pass: `inputs` and `outputs` are always the same memory; `kept` is what else it reads."""

    graph: Graph
    inputs: dict[str, Tensor]
    outputs: list[Tensor]
    kept: list[object]

    def __call__(self, inputs: Inputs) -> list[Tensor]:
        for name, own in self.inputs.items():
            own.copy_(inputs[name])
        self.graph.replay()
        return self.outputs


@dataclass(slots=True, eq=False)
class _Pass:
    """What is known of a key. `last` is the number of its last run among all; `waits` is None until one was watched."""

    runs: int = 0
    last: int = 0
    waits: bool | None = None
    recording: _Recording | None = None


class Replays:
    """Passes by their keys, on one device.

    Args:
        device: where it has no graphs, every pass runs as it is.
        most: recordings that are kept; each holds its inputs and outputs, and all share the memory of the largest. One
            that was used lately does not make room for another, or more keys than that would only ever be recorded.

    A key's first run is as it is, the second is watched, and the third is recorded, which costs about two.
    """

    def __init__(self, device: torch.device, *, most: int = 32) -> None:
        self.device, self.most = device, most
        self.active = device.type in GRAPHS
        self.replayed = 0
        self._runs = 0
        self._passes: OrderedDict[Hashable, _Pass] = OrderedDict()

    def __len__(self) -> int:
        return len(self._recorded())

    def _recorded(self) -> list[_Pass]:
        return [found for found in self._passes.values() if found.recording is not None]

    def clear(self) -> None:
        """Forget everything."""
        self._passes.clear()

    def run(self, key: Hashable | None, inputs: Inputs, body: Body) -> list[Tensor]:
        """`body(inputs)`. Without a key it is run as it is. Raises what the body raises."""
        if key is None or not self.active:
            return body(inputs)
        found = self._passes.setdefault(key, _Pass())
        self._passes.move_to_end(key)
        self._runs += 1
        found.runs, found.last = found.runs + 1, self._runs
        if found.runs == 1 or (found.waits and found.runs > TRIES):
            self._tidy()
            return body(inputs)
        if found.waits is not False:
            outputs, found.waits = GRAPHS[self.device.type].watched(partial(body, inputs))
            return outputs
        if found.recording is None and self._has_room() and BESIDE.acquire(blocking=False):
            try:
                found.recording = self._record(inputs, body)
            finally:
                BESIDE.release()
        if found.recording is None:
            return body(inputs)
        self.replayed += 1
        return found.recording(inputs)

    def _record(self, inputs: Inputs, body: Body) -> _Recording | None:
        """The pass as a graph; None where it cannot be one, and then none is tried again."""
        other = next((found.recording.graph for found in self._recorded() if found.recording), None)
        own = {name: value.clone() for name, value in inputs.items()}
        graph = GRAPHS[self.device.type](self.device, other)
        with _holding() as kept:
            try:
                outputs = graph.record(partial(body, own))
            except RuntimeError as error:
                self.active = False
                said = str(error).splitlines()[0]
                warnings.warn(f"Passes run one operation after the other from now on: {said}", RuntimeWarning, 2)
                return None
        return _Recording(graph, own, outputs, kept)

    def _has_room(self) -> bool:
        """Whether there may be one recording more; one that was not used for long goes for it."""
        recorded = self._recorded()  # the longest unused first
        if len(recorded) < self.most:
            return True
        idle = self._runs - recorded[0].last > LATELY * self.most
        if idle:
            recorded[0].recording = None
        return idle

    def _tidy(self) -> None:
        while len(self._passes) > KNOWN:
            self._passes.popitem(last=False)


@contextmanager
def _holding() -> Iterator[list[object]]:
    found: list[object] = []
    _HELD.append(found)
    try:
        yield found
    finally:
        _HELD.pop()
