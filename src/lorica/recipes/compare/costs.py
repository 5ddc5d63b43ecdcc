"""What one method costs on a backbone, measured for it alone: bytes that it keeps, and the time of its step.

In: a training client and a batch. Out: bytes, seconds, ratios to another client's step. Refuses to know comparisons.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from lorica.client.local import TrainingClient
from lorica.data.example import Example


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one method: numbers of values, bytes, and the time of a step over LoRA's (None where LoRA does not fit).

    `adapter_bytes` are values, gradient, what the optimiser keeps and frozen extras, after a first step; `saved_bytes`
    is what autograd keeps between forward and backward of one micro-batch.
    """

    parameters: int
    frozen: int
    share: float
    adapter_bytes: int
    saved_bytes: int
    step_time_over_lora: float | None


class Saved:
    """Bytes that autograd keeps for the backward pass: storages, each once, without those of the tensors given."""

    def __init__(self, own: Sequence[Tensor]) -> None:
        self._own = {t.untyped_storage().data_ptr() for t in own}
        self._seen: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self.bytes = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        backward = torch._C._current_graph_task_id() != -1  # what is made again there is not kept until then
        if storage.data_ptr() not in self._own and not backward:
            self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self) -> Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hooks.__exit__(kind, error, at)
        self.bytes = sum(self._seen.values())


def seconds(run: Callable[[], object]) -> float:
    """What one call costs: CPU time of this process on one thread of a CPU, else wall time with the device idle at
    both ends.
    """
    on_cuda = torch.cuda.is_available()
    clock = time.perf_counter if on_cuda or torch.get_num_threads() > 1 else time.process_time
    if on_cuda:
        torch.cuda.synchronize()
    start = clock()
    run()
    if on_cuda:
        torch.cuda.synchronize()
    return clock() - start


def step(client: TrainingClient, batch: Sequence[Example]) -> float:
    """One optimiser step; returns the mean loss."""
    loss = client.forward_backward(batch).mean
    client.optim_step()
    return loss


def step_time_over(one: TrainingClient, other: TrainingClient, work: Sequence[Sequence[Example]]) -> float:
    """The median of the times of `one`'s steps over `other`'s, measured in turns on the same batches.

    The first batch is not counted: it also pays for what is set up on first use. At least two are needed.
    """
    ratios = []
    for number, batch in enumerate(work):
        spent = {
            id(client): seconds(lambda client=client, batch=batch: step(client, batch))  # type: ignore[misc]
            for client in ((one, other) if number % 2 else (other, one))
        }
        ratios.append(spent[id(one)] / spent[id(other)])
    return statistics.median(ratios[1:])


def measure(client: TrainingClient, lora: TrainingClient | None, work: Sequence[Sequence[Example]]) -> Costs:
    """Costs of a fresh client, which is trained a few steps by that. `work` has one batch, or one more than the pairs
    that are timed. Raises what its method raises when it cannot be trained here.
    """
    adapter, engine = client.adapter, client.service.engine
    base = [*client.service.host.model.parameters(), *client.service.host.model.buffers()]
    frozen = [t for held in adapter.frozen.values() for t in held.values()]
    step(client, work[0])  # sets up what later steps share
    batch: list[Example] = []
    room = engine.token_budget
    for example in work[0]:
        if not batch or len(example) <= room:
            batch.append(example)
            room -= len(example)
    with Saved([*base, adapter.flat, *frozen]) as saved:
        client.forward_backward(batch)
    client.optim_step()
    held = [adapter.flat, adapter.grad, *client.optimizer.tensors().values(), *frozen]
    timed = lora is not None and len(work) > 1
    return Costs(
        parameters=adapter.layout.trainable_count(),
        frozen=adapter.layout.frozen_count(),
        share=adapter.layout.trainable_count() / client.service.host.backbone.parameter_count(),
        adapter_bytes=sum(t.numel() * t.element_size() for t in held),
        saved_bytes=saved.bytes,
        step_time_over_lora=step_time_over(client, lora, work) if timed and lora is not None else None,
    )
