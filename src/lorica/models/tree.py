"""The modules and parameters of a model, looked up again only where somebody added, replaced or removed one.

In: a module. Out: lists of what is below it. torch walks the whole tree for each such list, which is no small part of a
small model's pass. Refuses to know what the modules are for.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_

from torch import Tensor, nn

from lorica.models.quantize.linear import QuantizedLinear


class Tree:
    """What is below a module now, by `modules`, `parameters` and `packed`: each once, in torch's order."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._modules: list[nn.Module] = []
        self._parameters: list[nn.Parameter] = []
        self._packed: list[QuantizedLinear] = []
        self._known: list[tuple[Mapping[str, nn.Module | Tensor | None], tuple[nn.Module | Tensor | None, ...]]] = []

    def _fresh(self) -> Tree:
        known = self._known
        if known and all(len(own) == len(was) and all(map(is_, own.values(), was)) for own, was in known):
            return self
        self._modules, self._parameters = list(self._root.modules()), list(self._root.parameters())
        self._packed = [module for module in self._modules if isinstance(module, QuantizedLinear)]
        owned = [own for module in self._modules for own in (module._modules, module._parameters)]
        self._known = [(own, tuple(own.values())) for own in owned]
        return self

    @property
    def modules(self) -> list[nn.Module]:
        """The module and all below it."""
        return self._fresh()._modules

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Their parameters."""
        return self._fresh()._parameters

    @property
    def packed(self) -> list[QuantizedLinear]:
        """The modules whose weight is packed."""
        return self._fresh()._packed
