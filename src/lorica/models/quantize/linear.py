"""A linear map whose weight is stored in a few bits, and is there in full only while it is used.

In: a packed weight and a bias. Out: `y = x Ŵᵀ + b`, Ŵ dequantised in forward and again in backward; only packed tensors
are kept or saved. Refuses to know sites, adapters and tenants: one product serves a whole batch, whoever is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.models.quantize import bnb
from lorica.models.quantize.formats import Format, Packed
from lorica.models.quantize.state import from_state, to_state


class QuantizedLinear(nn.Linear):
    """`nn.Linear` (or transformers' Conv1D) over a packed, frozen weight [out, in].

    The packed tensors are buffers; in a state dict they have bitsandbytes' keys where the format is theirs. `weight` is
    the dequantised matrix, made anew each time it is read, so code that reads a linear's weight still works. Moving the
    module moves the buffers; changing its dtype changes what Ŵ is rounded to, never the stored bits.

    Attributes: `form`, the format; `dtype` of Ŵ and of the product; `transposed`: it stands for a Conv1D, whose
    `weight` is [in, out]; `backend` of dequantisation.
    """

    def __init__(
        self,
        packed: Packed,
        bias: nn.Parameter | None,
        *,
        dtype: torch.dtype,
        transposed: bool = False,
        backend: str = "auto",
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self.form: Format = packed.format
        self.dtype = dtype
        self.transposed = transposed
        self.backend = backend
        self.nf, self.nx = self.out_features, self.in_features  # what a Conv1D calls them
        self.register_parameter("bias", bias)
        self._put(packed.parts)

    @property
    def packed(self) -> Packed:
        """The stored weight: the buffers themselves."""
        parts = {name: cast(Tensor, self._buffers[name]) for name in self.form.sizes(self.shape)}
        return Packed(self.form, self.shape, parts)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    @property
    def device(self) -> torch.device:
        return cast(Tensor, self._buffers["codes"]).device

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised weight as the module that this one replaced stored it, a new tensor without gradient."""
        return self.dense().T if self.transposed else self.dense()

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Ŵ [out, in], a new tensor, in the module's dtype unless another is given."""
        return unpacked(self.packed, dtype or self.dtype, self.backend)

    @torch.no_grad()
    def store(self, weight_OI: Tensor) -> None:
        """Quantise another weight into the buffers, in place. Raises FormatError for values that are not finite."""
        parts = self.form.pack(weight_OI.to(self.device))
        for name, stored in self.packed.parts.items():
            stored.copy_(parts[name])

    def hold(self, packed: Packed) -> None:
        """Take a copy of other packed tensors, which may be of another format, in the place of one's own."""
        self.form = packed.format
        self._put({name: part.to(self.device, copy=True) for name, part in packed.parts.items()})

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = _product(input, self.packed, self.dtype, self.backend, False, self.bias)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.form.name}"

    # -- torch's own ways to a module's tensors ----------------------------------------------------------------------

    def _put(self, parts: Mapping[str, Tensor]) -> None:
        self._buffers.clear()
        for name, part in parts.items():
            self.register_buffer(name, part)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves go through to the packed tensors, changes of dtype do not: their bytes are what is stored."""
        parts = self.packed.parts
        self._buffers.clear()
        try:
            cast(Any, super())._apply(fn, recurse)
        finally:
            self._put(parts)
        self._put({name: _bytewise(fn, part) for name, part in parts.items()})
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=parts["codes"].device)).dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, tensor in to_state(self.packed, self.dtype).items():
            destination[prefix + name] = tensor
        bias = self._parameters["bias"]
        if bias is not None:
            destination[f"{prefix}bias"] = bias if keep_vars else bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key.removeprefix(prefix): key for key in state_dict if key.startswith(f"{prefix}weight")}
        if not own:
            missing_keys.append(f"{prefix}weight")
        else:
            try:
                packed = from_state({name: state_dict[key] for name, key in own.items()}, self.form, self.shape)
            except ValueError as error:
                error_msgs.append(f"{prefix}weight: {error}")
            else:
                self.hold(packed)
        mine, bias = self._parameters["bias"], state_dict.get(f"{prefix}bias")
        if mine is not None and bias is not None:
            with torch.no_grad():
                mine.copy_(bias)
        elif mine is not None:
            missing_keys.append(f"{prefix}bias")
        elif bias is not None and strict:
            unexpected_keys.append(f"{prefix}bias")


def unpacked(packed: Packed, dtype: torch.dtype, backend: str) -> Tensor:
    """Ŵ, by the backend that was asked for. Raises MissingError where bitsandbytes was and is not installed."""
    wanted = backend == "bitsandbytes" or (backend == "auto" and packed.parts["codes"].is_cuda and bnb.installed())
    if wanted and bnb.takes(packed, dtype):
        return bnb.dequantize(packed, dtype)
    return packed.dense(dtype)


def _bytewise(fn: Callable[[Tensor], Tensor], part: Tensor) -> Tensor:
    """What `fn` makes of a tensor's bytes: casts of floats leave them alone."""
    flat = part.reshape(-1) if part.ndim == 0 else part
    return fn(flat.view(torch.uint8)).view(part.dtype).view(part.shape)


def _product(
    x: Tensor, packed: Packed, dtype: torch.dtype, backend: str, back: bool, bias_O: Tensor | None = None
) -> Tensor:
    names, tensors = tuple(packed.parts), tuple(packed.parts.values())
    node = cast(Any, _PackedProduct)
    return cast(Tensor, node.apply(x, bias_O, packed.format, packed.shape, names, dtype, backend, back, *tensors))


class _PackedProduct(torch.autograd.Function):
    """`x Ŵᵀ (+ b)`, or `x Ŵ` with `back`: each is the other's gradient, so derivatives of any order exist."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias_O: Tensor | None,
        form: Format,
        shape: tuple[int, ...],
        names: tuple[str, ...],
        dtype: torch.dtype,
        backend: str,
        back: bool,
        *parts: Tensor,
    ) -> Tensor:
        W_OI = unpacked(Packed(form, shape, dict(zip(names, parts, strict=True))), dtype, backend)
        # under autocast F.linear chooses the dtype itself, as it does for a dense weight
        auto = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        y = F.linear(x if auto else x.to(dtype), W_OI.T if back else W_OI, bias_O)
        ctx.save_for_backward(*parts)
        ctx.form, ctx.shape, ctx.names, ctx.backend, ctx.back = form, shape, names, backend, back
        ctx.made_in, ctx.given = y.dtype, x.dtype
        return y if auto else y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        packed = Packed(ctx.form, ctx.shape, dict(zip(ctx.names, ctx.saved_tensors, strict=True)))
        with torch.autocast(grads[0].device.type, enabled=False):
            dx = _product(grads[0], packed, ctx.made_in, ctx.backend, not ctx.back)
        return (dx.to(ctx.given), *(None,) * (7 + len(ctx.names)))
