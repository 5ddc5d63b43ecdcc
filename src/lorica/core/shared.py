"""Frozen tensors that many adapters share (VeRA's projections), and what is made of them once for all passes.

In: a frozen tensor with its name. Out: the one copy of equal ones, freed with its last user, and from any view of it
the place to keep a cast or a layout: one however many adapters use it, and made anew where the tensor was written to.
Refuses to know adapters, methods and what is made.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

Made = TypeVar("Made")


class Shared:
    """One frozen tensor. Who uses the tensor holds this too."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._made: dict[Hashable, object] = {}
        self._version = -1

    @property
    def version(self) -> int:
        """Another number when the tensor was written to, which one of inference mode does not tell."""
        return 0 if self.tensor.is_inference() else self.tensor._version

    def made(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` makes of the tensor, kept until it is written to or gone."""
        if self._version != self.version:
            self._made.clear()
            self._version = self.version
        if key not in self._made:
            with torch.inference_mode(False), torch.no_grad():  # it will serve passes of every mode
                self._made[key] = make()
        return cast(Made, self._made[key])

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own."""
        return {**self.__dict__, "_made": {}}


_BY_CONTENT: WeakValueDictionary[tuple[Any, ...], Shared] = WeakValueDictionary()
_BY_PLACE: WeakValueDictionary[int, Shared] = WeakValueDictionary()
"""By the address of a tensor's memory, in which nothing else is while it is there."""


def share(name: str, tensor: Tensor) -> Shared:
    """The one copy of equal tensors of this name, whoever made them."""
    tensor = tensor.contiguous()
    raw = tensor.cpu().reshape(-1).view(torch.uint8).numpy()  # numpy itself has no bfloat16
    key = (name, tuple(tensor.shape), tensor.dtype, tensor.device, zlib.crc32(raw.data))
    found = _BY_CONTENT.get(key)
    if found is None or not torch.equal(found.tensor, tensor):
        alone = tensor.untyped_storage().nbytes() == tensor.nbytes
        found = _BY_CONTENT[key] = Shared(tensor if alone else tensor.clone())
        if not found.tensor.is_inference():  # such a tensor does not tell that it was written to
            _BY_PLACE[_place(found.tensor)] = found
    return found


def shared_of(view: Tensor) -> Shared | None:
    """The shared tensor that this is a view of, None where it is of no such tensor."""
    found = None if view.requires_grad else _BY_PLACE.get(_place(view))
    if found is None or found.tensor.device != view.device or _place(found.tensor) != _place(view):
        return None
    return found


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
