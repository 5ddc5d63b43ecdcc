"""A graph of the CPU: torch's operations on fixed memory, written down in one run and computed again in others.

It is to a CPU what a CUDA graph is to a GPU, so that what is replayed there can be checked here: whatever a pass
decides in Python, or reads from a tensor, is decided once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorica.engine.replay import Graph

WAITING = ("_local_scalar_dense", "aten.equal", "aten.nonzero", "aten.is_nonzero")


class _Writer(TorchDispatchMode):
    """Writes operations down, and what they overwrite."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.waits = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.waits = self.waits or any(word in str(func) for word in WAITING)
        if func._schema.is_mutable:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    self._remember(tensor)
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def _remember(self, tensor: Tensor) -> None:
        whole = tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
        self.before.setdefault(whole.data_ptr(), (whole, whole.clone()))


class Tape(Graph):
    """`record` computes, and then puts back what was overwritten."""

    def __init__(self, device: torch.device, other: Graph | None) -> None:
        self.writer = _Writer()

    def record(self, run: Callable[[], list[Tensor]]) -> list[Tensor]:
        with self.writer:
            outputs = run()
        if self.writer.waits:
            raise RuntimeError("a recorded pass reads a number")
        with torch.no_grad():
            for whole, value in self.writer.before.values():
                whole.copy_(value)
        self.writer.before.clear()
        return outputs

    @torch.no_grad()
    def replay(self) -> None:
        """Torch counts no writes of a CUDA graph, so none of these either."""
        for func, args, kwargs, out in self.writer.calls:
            written = (
                [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)] if func._schema.is_mutable else []
            )
            with torch.autograd._unsafe_preserve_version_counter(tuple(written)):
                self._again(func, args, kwargs, out)

    @staticmethod
    def _again(func: Any, args: Any, kwargs: Any, out: Any) -> None:
        for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
            if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                old.detach().copy_(new)

    @staticmethod
    def watched(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], bool]:
        with _Writer() as writer:
            return run(), writer.waits
