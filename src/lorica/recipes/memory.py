"""How much memory a run will need, and how much it needed.

In: a loaded plan's parts. Out: bytes by purpose. The estimate adds what is known (weights, adapter, optimiser) to activations
measured with one small forward pass and scaled to the token budget. Refuses to know configs and files.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.client.local import TrainingClient
from lorica.data.example import Example


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes. `process` is the interpreter with its libraries and the loaded weights, as it stands now."""

    process: int
    weights: int
    adapter: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The peak of the process (on a GPU: of the device, where `process` is what is allocated already)."""
        return self.process + self.optimizer + self.activations


def estimate(client: TrainingClient, examples: Sequence[Example], token_budget: int) -> MemoryEstimate:
    """What training this client will need. Gradients and random state are left as they were."""
    backbone, adapter = client.service.host.backbone, client.adapter
    element = adapter.flat.element_size()
    frozen = sum(t.numel() * t.element_size() for owned in adapter.frozen.values() for t in owned.values())
    return MemoryEstimate(
        process=current_bytes(),
        weights=sum(p.numel() * p.element_size() for p in backbone.module.parameters()),
        adapter=adapter.flat.numel() * element + frozen,
        optimizer=3 * adapter.flat.numel() * element,  # gradient and two moments
        activations=_activations(client, examples, token_budget),
    )


def _activations(client: TrainingClient, examples: Sequence[Example], token_budget: int) -> int:
    """Bytes saved for backward for a micro-batch of `token_budget` tokens, from the saved bytes of two small ones."""
    longest = max(examples, key=len)
    need = max(token_budget, len(longest))
    short, long = _saved(client, [longest]), _saved(client, [longest, longest])
    per_token = (long - short) / max(1, len(longest) - 1)
    return round(short + per_token * max(0, need - len(longest) + 1))


def _saved(client: TrainingClient, examples: list[Example]) -> int:
    """Bytes that autograd keeps for backward over one micro-batch; tensors that share memory count once."""
    storages: dict[int, int] = {}
    owned = {p.untyped_storage().data_ptr() for p in client.service.host.backbone.module.parameters()}

    def note(tensor: Tensor) -> Tensor:
        where = tensor.untyped_storage().data_ptr()
        if where not in owned:
            storages[where] = tensor.untyped_storage().nbytes()
        return tensor

    forwards, grad, rng = client.adapter.forwards, client.adapter.grad.clone(), torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        client.service.engine.loss_graph(examples, client.adapter.name)
    client.adapter.forwards = forwards
    client.adapter.grad.copy_(grad)
    torch.set_rng_state(rng)
    return sum(storages.values())


def current_bytes() -> int:
    """Bytes in use now: of the process, or allocated on the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # no procfs: the peak so far is the nearest thing
        return peak_bytes()


def peak_bytes() -> int:
    """The most bytes in use so far: of the process, or allocated on the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
