"""One site's frozen weight, as methods see it: normalised, without gradient, dequantised where it is packed.

In: a place. Out: the matrix, its row norms, its shape and dtype. Refuses to know how a packed weight is stored, and
never writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lorica.core.errors import MethodError
from lorica.models.original import Original
from lorica.models.quantize.linear import QuantizedLinear
from lorica.models.sites import Place


class FrozenWeight:
    """One site's frozen weight, as methods see it."""

    def __init__(self, place: Place, original: Callable[[], Original]) -> None:
        self._place = place
        self._original = original
        self._norm: Tensor | None = None
        self._dense: Tensor | None = None
        self._holders = 0

    @property
    def packed(self) -> QuantizedLinear | None:
        """The module that holds the weight in packed form; None where it is there in full."""
        return self._place.module if isinstance(self._place.module, QuantizedLinear) else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of `matrix()`, which is not made for it; as are dtype and device."""
        return self._place.site.shape if self.packed is not None else tuple(self.matrix().shape)

    @property
    def dtype(self) -> torch.dtype:
        return (self.packed or self.matrix()).dtype

    @property
    def device(self) -> torch.device:
        return (self.packed or self.matrix()).device

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, a packed weight is dequantised at most once, however many read it; nothing changes for others."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            if not self._holders:
                self._dense = None

    def matrix(self) -> Tensor:
        """The normalised weight (see `Site.shape`), without gradient: a view of the base's own memory, or the
        dequantised weight, a new tensor, of a packed one.

        At the input site it is the embedding table, [dim, tokens]. Raises MethodError at attention sites.
        """
        site, owner = self._place.site, self._place.module
        if site.kind == "attention":
            raise MethodError(f"Attention site {site.name!r} has no weight of its own.")
        if isinstance(owner, QuantizedLinear):
            dense = owner.dense() if self._dense is None else self._dense
            self._dense = dense if self._holders else None
            return dense
        weight: Tensor = getattr(owner, self._place.attribute).detach()
        if site.expert is not None:
            weight = weight[site.expert]
        return weight.T if site.transposed or site.kind == "input" else weight

    def residual(self) -> Tensor | None:
        """What packing took, `W − Ŵ`, [out, in], float32 or wider; None of a weight that is there in full. Raises
        MissingError where the full weight is not at hand, MismatchError where the packed one is not that weight packed.
        """
        packed = self.packed
        return None if packed is None else self._original().residual(self._place.site.name, packed)

    def row_square_norm(self) -> Tensor:
        """`‖W₀[j]‖²` over all axes but the first, [out]; float32, or float64 for a float64 base. Kept until
        invalidated.
        """
        dtype = torch.promote_types(self.dtype, torch.float32)
        if self._norm is None or self._norm.device != self.device or self._norm.dtype != dtype:
            weight = self.matrix()
            # by blocks, so that a large bf16 table is never held in float32
            rows = max(1, 2**22 // max(1, weight[0].numel()))
            self._norm = torch.cat(
                [part.to(dtype).square().flatten(1).sum(1) for part in torch.split(_matrix(weight), rows)]
            )
        return self._norm

    def bias(self) -> Tensor | None:
        """The site's frozen bias, [out], a view without gradient; None where it has none."""
        place = self._place
        if place.bias is None:
            return None
        bias: Tensor = getattr(place.module, place.bias).detach()
        return bias if place.site.expert is None else bias[place.site.expert]

    def forget(self) -> None:
        """Drop what was computed: the weight has changed."""
        self._norm, self._dense = None, None


def _matrix(weight: Tensor) -> Tensor:
    """At least two axes, so that one reduction serves norms too."""
    return weight[:, None] if weight.ndim == 1 else weight
