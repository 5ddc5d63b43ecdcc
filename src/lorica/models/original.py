"""The network that packed weights were made from, there in full only while it is needed.

In: a way to load it again. Out: what packing took from a site's weight. It is read on the CPU, checked to be the one
that the stored codes stand for, and freed with its last user. Refuses to know methods and why somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorica.core.errors import MismatchError
from lorica.models.quantize.functions import packed_as
from lorica.models.quantize.linear import QuantizedLinear

if TYPE_CHECKING:
    from lorica.models.backbone import Backbone

ALIKE = 0.01
"""How far the codes of the original may be from the stored ones, relative to what packing took: another device may
round an element that lies between two codes to the other side.
"""


class Original:
    """A backbone in full that can be had again: `make` loads it, `fingerprint` says which it has to be ("" any)."""

    def __init__(self, make: Callable[[], Backbone], fingerprint: str = "") -> None:
        self._make = make
        self._fingerprint = fingerprint
        self._loaded: Backbone | None = None
        self._holders = 0

    @contextmanager
    def at_hand(self) -> Iterator[Original]:
        """Inside, it is loaded at most once, and not before it is asked for. Nests."""
        self._holders += 1
        try:
            yield self
        finally:
            self._holders -= 1
            if not self._holders:
                self._loaded = None

    @torch.no_grad()
    def residual(self, site: str, module: QuantizedLinear) -> Tensor:
        """`W − Ŵ` of a site, [out, in], float32 or wider, on the packed weight's device; Ŵ is in the base's dtype.

        Raises MismatchError where packing W does not give what is stored, MissingError for a site that it lacks.
        """
        with self.at_hand():
            W_OI = self._backbone().weight(site).matrix().to(module.device)
        wide = torch.promote_types(W_OI.dtype, torch.float32)
        stored_OI = module.dense()
        residual_OI = W_OI.to(wide) - stored_OI.to(wide)
        plain_OI = packed_as(module.form, W_OI).dense(module.dtype).to(wide)
        if float((plain_OI - stored_OI).norm()) > ALIKE * float(residual_OI.norm()):
            raise MismatchError(
                f"The packed weight of site {site!r} is not what packing the full weight gives, so what it lacks is "
                "not known: it was changed since, or chosen together with an adapter of its own.",
                hint="Load the full model with quantize=… anew.",
            )
        return residual_OI

    def _backbone(self) -> Backbone:
        if self._loaded is None:
            found = self._make()
            if self._fingerprint and found.fingerprint() != self._fingerprint:
                raise MismatchError(
                    f"{found.name!r} is not the network any more that was quantised: its weights have changed.",
                    hint="Load it with quantize=… anew.",
                )
            self._loaded = found
        return self._loaded
