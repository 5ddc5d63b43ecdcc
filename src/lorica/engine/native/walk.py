"""The functions of `walk.c` on tensors: adapted maps, all layers of a decoding step, whole steps, each in one call.

In: contiguous float32 tensors on a CPU without gradients. Out: what the kernels of a step and torch's products give, up
to rounding; a row's numbers are the same bits in any batch. Many numbers are spread over torch's number of threads by
rows. Refuses to know modules, adapters and caches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorica.engine.native.kernels import BLOCK, BUNCH, LANES, LowRank
from lorica.engine.native.spread import spread

SOURCE = Path(__file__).with_name("walk.c")
PANEL = 2 * LANES
"""Outputs of a frozen map that lie together."""
_POINTER, _LONG, _FLOAT, _INT64 = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int64


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("weight", "bias", "table", "sizes")),
        *((name, _INT64) for name in ("inputs", "outputs", "maps", "rank")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Linear) for name in ("qkv", "out", "both", "down")),
        *((name, _POINTER) for name in ("norm", "after", "turn", "keys", "values", "first", "always")),
        ("window", _INT64),
        *((name, _FLOAT) for name in ("eps", "after_eps", "turn_eps", "scale")),
    ]


class _Trunk(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        ("norm", _POINTER),
        *((name, _INT64) for name in ("count", "width", "heads", "groups", "dim", "capacity")),
        ("eps", _FLOAT),
    ]


class _Sampler(ctypes.Structure):
    _fields_ = [
        ("trunk", ctypes.POINTER(_Trunk)),
        *((name, _POINTER) for name in ("embedding", "cosines", "sines")),
        ("head", _Linear),
    ]


_FORMS: dict[str, tuple[list[Any], Any]] = {
    "panels": ([_POINTER] * 2 + [_LONG] * 2, None),
    "adapted": ([_POINTER] * 4 + [_LONG] * 2, None),
    "walk_scratch": ([_POINTER, _LONG], _LONG),
    "walk": ([_POINTER] * 7 + [_LONG] * 3, None),
    "sample_scratch": ([_POINTER, _LONG], _LONG),
    "sample": ([_POINTER] * 10 + [_LONG] * 5, None),
}


class Walks:
    """The library."""

    def __init__(self, code: ctypes.CDLL) -> None:
        self.code = code
        for name, (form, result) in _FORMS.items():
            function = getattr(code, name)
            function.argtypes, function.restype = form, result

    def panels(self, weights: Sequence[Tensor]) -> Tensor | None:
        """Weights [O, I] of maps of one input as `Adapted` reads them; None where their widths do not suit."""
        inputs, outputs = weights[0].shape[1], sum(w.shape[0] for w in weights)
        fit = all(w.dtype == torch.float32 and w.device.type == "cpu" for w in weights)
        if not fit or inputs % LANES or outputs % PANEL:
            return None
        whole_OI = torch.cat(list(weights)).contiguous()
        laid = torch.empty(outputs // PANEL, inputs, PANEL)
        self.code.panels(whole_OI.data_ptr(), laid.data_ptr(), outputs, inputs)
        return laid


class Adapted:
    """`y = x Wᵀ + b`, and each row's low-rank updates on top, of maps of one input side by side."""

    def __init__(self, walks: Walks, panels: Tensor, bias_O: Tensor | None, low: LowRank | None) -> None:
        count, self.inputs, lanes = panels.shape
        self.outputs = count * lanes
        assert bias_O is None or (bias_O.is_contiguous() and bias_O.dtype == torch.float32)
        self._held = panels, bias_O, low  # the form below holds addresses alone
        bias = None if bias_O is None else bias_O.data_ptr()
        table, sizes, maps, rank = (None, None, 0, 0) if low is None else low.table
        self.form = _Linear(panels.data_ptr(), bias, table, sizes, self.inputs, self.outputs, maps, rank)
        self.numbers = panels.numel() + (0 if low is None else low.numbers)
        self._run = walks.code.adapted

    def takes(self, x_NI: Tensor) -> bool:
        return x_NI.dtype == torch.float32 and x_NI.is_contiguous()

    def __call__(self, x_NI: Tensor) -> Tensor:
        """[N, ΣO], for the rows that the updates are of."""
        assert self.takes(x_NI)
        y_NO = torch.empty(x_NI.shape[0], self.outputs)

        def part(start: int, stop: int) -> None:
            scratch = torch.empty(BUNCH * self.form.rank)
            pointers = (t.data_ptr() for t in (x_NI, y_NO, scratch))
            self._run(ctypes.byref(self.form), *pointers, start, stop)

        spread(part, x_NI.shape[0], self.numbers)
        return y_NO


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """A norm's factor [D] in float32, and its ε."""

    factor_D: Tensor
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """What a layer is made of. `turn` is of its query and key heads [S, K] side by side, without one they are not
    normed; `window` of 0 is none.
    """

    norm: Norm
    qkv: Adapted
    turn: Norm | None
    out: Adapted
    after: Norm
    both: Adapted
    down: Adapted
    scale: float
    window: int


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """Keys and values [P · G, capacity, K] of a layer; for each place P the first slot that it sees, and the one before
    which a window hides nothing.
    """

    keys: Tensor
    values: Tensor
    first_P: Tensor
    always_P: Tensor


class Layers:
    """The layers of a trunk and its last norm, with heads H on G key heads of width K.

    `remember` says where keys and values are, before the first call and whenever that changes.
    """

    def __init__(self, walks: Walks, layers: Sequence[Layer], norm: Norm, heads: tuple[int, int, int]) -> None:
        self.code, self._held = walks.code, (layers, norm)
        self._memory: Sequence[Memory] = ()
        self._forms = (_Layer * len(layers))(*map(_form, layers))
        self._width = norm.factor_D.shape[0]
        self.trunk = _Trunk(self._forms, norm.factor_D.data_ptr(), len(layers), self._width, *heads, 0, norm.eps)
        self.numbers = sum(m.numbers for layer in layers for m in (layer.qkv, layer.out, layer.both, layer.down))

    def remember(self, memory: Sequence[Memory]) -> None:
        self._memory = memory
        for form, own in zip(self._forms, memory, strict=True):
            assert all(part.is_contiguous() and part.dtype == torch.float32 for part in (own.keys, own.values))
            form.keys, form.values = own.keys.data_ptr(), own.values.data_ptr()
            form.first, form.always = own.first_P.data_ptr(), own.always_P.data_ptr()
        self.trunk.capacity = memory[0].keys.shape[1]

    def __call__(self, x_RD: Tensor, turns: tuple[Tensor, Tensor], places_R: Tensor, slot: int) -> Tensor:
        """Hidden states [R, D] behind the last norm, from embeddings, which are overwritten, and signed cosines and
        sines [R, ..., K]. Keys and values are written at `slot` of each row's place; of a row without one, below
        zero, nothing is wanted.
        """
        cos_RK, sin_RK = turns
        for tensor in (x_RD, cos_RK, sin_RK, places_R):
            assert tensor.is_contiguous()
        assert x_RD.dtype == cos_RK.dtype == sin_RK.dtype == torch.float32
        assert slot < self.trunk.capacity
        y_RD = torch.empty_like(x_RD)
        trunk = ctypes.byref(self.trunk)
        tensors = [t.data_ptr() for t in (x_RD, cos_RK, sin_RK, places_R, y_RD)]

        def part(start: int, stop: int) -> None:
            scratch = torch.empty(self.code.walk_scratch(trunk, stop - start))
            self.code.walk(trunk, *tensors, scratch.data_ptr(), start, stop, slot)

        spread(part, x_RD.shape[0], self.numbers)
        return y_RD


class Sampler:
    """Layers between an embedding [V, D] and a head without anything behind it: tokens that follow tokens."""

    def __init__(self, layers: Layers, embedding_VD: Tensor, head: Adapted) -> None:
        assert embedding_VD.is_contiguous()
        assert embedding_VD.dtype == torch.float32
        self.layers, self.embedding, self.head = layers, embedding_VD, head
        self._numbers = layers.numbers + head.numbers

    def __call__(
        self,
        ids_R: Tensor,
        positions_R: Tensor,
        places_R: Tensor,
        turns: tuple[Tensor, Tensor],
        heat_R: Tensor,
        uniform_CR: Tensor,
        slot: int,
    ) -> tuple[Tensor, Tensor]:
        """The next C tokens [C, R] of each row and their log-probabilities without heat, as by `Layers` and
        `Kernels.draw` C times. `turns` are signed cosines and sines [P, K] of all positions up to the last; keys and
        values are written from `slot` on.
        """
        (count, rows), (cos_PK, sin_PK) = uniform_CR.shape, turns
        reals, whole = (cos_PK, sin_PK, heat_R, uniform_CR), (ids_R, positions_R, places_R)
        assert all(t.is_contiguous() and t.dtype == torch.float32 for t in reals)
        assert all(t.is_contiguous() and t.dtype == torch.long and t.shape == (rows,) for t in whole)
        assert slot + count <= self.layers.trunk.capacity
        code, vocabulary = self.layers.code, self.head.outputs
        pointers = (t.data_ptr() for t in (self.embedding, cos_PK, sin_PK))
        form = ctypes.byref(_Sampler(ctypes.pointer(self.layers.trunk), *pointers, self.head.form))
        tokens_CR, logprobs_CR = torch.empty(count, rows, dtype=torch.long), torch.empty(count, rows)
        tensors = [t.data_ptr() for t in (*whole, heat_R, uniform_CR, tokens_CR, logprobs_CR)]

        def part(start: int, stop: int) -> None:
            scratch = torch.empty(code.sample_scratch(form, stop - start))
            mass = torch.empty(-(-vocabulary // BLOCK), dtype=torch.double)
            code.sample(form, *tensors, scratch.data_ptr(), mass.data_ptr(), start, stop, rows, slot, count)

        spread(part, rows, self._numbers)
        return tokens_CR, logprobs_CR


def _form(layer: Layer) -> _Layer:
    turn = layer.turn
    return _Layer(
        layer.qkv.form,
        layer.out.form,
        layer.both.form,
        layer.down.form,
        layer.norm.factor_D.data_ptr(),
        layer.after.factor_D.data_ptr(),
        None if turn is None else turn.factor_D.data_ptr(),
        None,
        None,
        None,
        None,
        layer.window,
        layer.norm.eps,
        layer.after.eps,
        0.0 if turn is None else turn.eps,
        layer.scale,
    )
