"""Arithmetic of attention in a training pass, counted operation by operation with torch's formulas.

In: a service, whose host says how training attends, and a length. Out: floating-point operations. Refuses to know
papers; measures no time.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lorica.client.local import Service
from lorica.data.example import Example
from lorica.methods import make_method

BATCHED = ("aten.bmm", "aten.baddbmm")
"""What attention is made of once it is computed by plain products, and nothing else."""


class _Counting(TorchDispatchMode):
    """`FlopCounterMode` without its hooks on modules, which a backward pass inside a backward pass does not bear."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.counts[str(func._overloadpacket)] += formula(*args, **(kwargs or {}), out_val=result)
        return result


def attention_flops(service: Service, length: int) -> int:
    """Operations of attention's products in forward and backward of one sequence, with its norms being trained.

    torch has no formula for its fused kernels on a CPU, so attention runs as plain products, which compute masked pairs
    too; a multiplication and an addition are two. Pairs that are never formed, because they are in another group, are
    not counted.
    """
    client = service.training_client(make_method("norm"), name="counted")
    client.forward_backward([Example.whole([0] * 9)])  # a host tries its modules once, on small inputs
    with sdpa_kernel([SDPBackend.MATH]), _Counting() as counting:
        client.forward_backward([Example.whole([0] * (length + 1))])
    service.host.delete("counted")
    return sum(counting.counts[name] for name in BATCHED)
