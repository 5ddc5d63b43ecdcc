"""Keys and values of rows of about one length, in one rectangle of memory, and attention over them.

In: keys and values of prompts, then those of one token of every row at each step. Out: attention outputs. Rows are
aligned at their last token, whatever their age: all write a step's key at the same slot, so a step is one copy; a mask
hides the slots before a row's first key. Where a device has graphs, a step reads every slot there is, and the newest is
a number on the device, so that all steps are the same operations. Refuses to know adapters, models and sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorica.engine.native.kernels import Kernels
from lorica.engine.replay import GRAPHS


@dataclass(slots=True, eq=False)
class Kept:
    """Keys and values of the first `total` positions of one row, virtual ones included; `prefix` of them are a
    prefix's. `layers`: for each attention module both as [kv heads, positions, head dim]; a module that the row's
    prefixes leave out has that many fewer, and they are the last ones.
    """

    total: int
    prefix: int
    layers: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def first(self, total: int) -> Kept:
        """The first positions alone. Prefixes are always among them."""
        cut = self.total - total
        layers = {m: (k[:, : k.shape[1] - cut], v[:, : v.shape[1] - cut]) for m, (k, v) in self.layers.items()}
        return Kept(total, self.prefix, layers)

    def copy(self) -> Kept:
        return Kept(self.total, self.prefix, {m: (k.clone(), v.clone()) for m, (k, v) in self.layers.items()})


@dataclass(slots=True, eq=False)
class Place:
    """Where a row is: the `index`-th row of a lane. `start` is the slot of its first position, `need` the most
    positions that it will have; both `index` and `start` change when the lane moves rows.
    """

    lane: Lane
    index: int
    start: int
    need: int
    prefix: int
    gaps: dict[nn.Module, int]


class Lane:
    """Keys and values of every attention module, [places · kv heads, slots, head dim].

    Attributes: `slot` is the last written one; `rows` are the places in use, the first ones; `places` and `capacity`
    are the rows and slots that there is memory for; `version` is another number whenever rows or memory are others;
    `steady` says that all steps of a version are the same operations. Then slots behind the newest are zero.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steady = device.type in GRAPHS
        self.version = 0
        self.rows: list[Place] = []
        self.slot = -1
        self._slot_1 = torch.full((1,), -1, device=device)
        self.places = 0
        self.capacity = 0
        self._layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._numbers: dict[object, Tensor] = {}
        self._masks: dict[tuple[int, int, int | None, torch.dtype, tuple[int, ...]], Tensor | None] = {}
        self._gaps: dict[nn.Module, tuple[int, ...]] = {}
        self._spans: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    @property
    def span(self) -> int:
        """Positions of the longest row."""
        return self.slot + 1 - min((row.start for row in self.rows), default=self.slot + 1)

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for pair in self._layers.values() for part in pair)

    def positions(self) -> Tensor:
        """The position [rows] of each row's last token."""
        return (self._slot_1 if self.steady else self.slot) - self._starts()

    def _starts(self) -> Tensor:
        return self._known("starts", [row.start for row in self.rows])

    def _known(self, name: object, values: Sequence[int]) -> Tensor:
        """Numbers of the rows on the device, until rows change."""
        if name not in self._numbers:
            self._numbers[name] = torch.tensor(values, device=self.device)
        return self._numbers[name]

    def _go(self, slot: int) -> None:
        """The newest keys are, or will be, at another slot."""
        self.slot = slot
        self._slot_1.fill_(slot)

    def _changed(self) -> None:
        self.version += 1
        self._numbers.clear()
        self._masks.clear()
        self._gaps.clear()
        self._spans.clear()

    # -- rows ------------------------------------------------------------------------------------------------------

    def arrange(self, places: int, capacity: int, slot: int) -> None:
        """Memory for so many places and slots, and the newest keys at `slot`, where all rows must fit."""
        count, span, old = len(self.rows), self.span, self.slot
        fresh = (places, capacity) != (self.places, self.capacity)
        if not fresh and (slot == old or not count):
            self._go(slot)
            return
        for module, (k, v) in self._layers.items():
            pair = (self._moved(part, count, span, places, capacity, slot, fresh=fresh) for part in (k, v))
            self._layers[module] = next(pair), next(pair)
        for row in self.rows:
            row.start += slot - old
        self.places, self.capacity = places, capacity
        self._go(slot)
        self._changed()

    def _moved(
        self, kept_BSK: Tensor, count: int, span: int, places: int, capacity: int, slot: int, *, fresh: bool
    ) -> Tensor:
        groups = kept_BSK.shape[0] // self.places
        used = kept_BSK[: count * groups, self.slot + 1 - span : self.slot + 1]
        if fresh:
            moved = kept_BSK.new_zeros(places * groups, capacity, kept_BSK.shape[2])
        else:
            moved, used = kept_BSK, used.clone()
            moved[: count * groups, : None if self.steady else slot + 1] = 0
        moved[: count * groups, slot + 1 - span : slot + 1] = used
        return moved

    def put(self, kept: Kept, need: int) -> Place:
        """One more row, in memory that is there: `slot` must be `kept.total − 1` or more, and a place free."""
        gaps = {module: kept.total - k.shape[1] for module, (k, _) in kept.layers.items()}
        place = Place(self, len(self.rows), self.slot + 1 - kept.total, need, kept.prefix, gaps)
        self.rows.append(place)
        self._write(place, kept)
        return place

    def restart(self, place: Place, total: int) -> None:
        """The row goes on behind its first `total` positions again."""
        kept = self.kept(place, total).copy()
        place.start = self.slot + 1 - total
        self._write(place, kept)

    def _write(self, place: Place, kept: Kept) -> None:
        for module, pair in kept.layers.items():
            if module not in self._layers:
                self._layers[module] = self._reserve(pair[0]), self._reserve(pair[1])
            for whole, own_GTK in zip(self._layers[module], pair, strict=True):
                row_GSK, first = self._row(whole, place.index), self.slot + 1 - own_GTK.shape[1]
                # what another row left there may be no number, and a mask does not hide that
                row_GSK[:, :first] = 0
                if self.steady:
                    row_GSK[:, self.slot + 1 :] = 0
                row_GSK[:, first : self.slot + 1] = own_GTK
        self._changed()

    def _reserve(self, own_GTK: Tensor) -> Tensor:
        # products with one query are small, and a CPU's small products are several times faster in float32
        small = own_GTK.device.type == "cpu"
        dtype = torch.promote_types(own_GTK.dtype, torch.float32) if small else own_GTK.dtype
        return own_GTK.new_zeros(self.places * own_GTK.shape[0], self.capacity, own_GTK.shape[2], dtype=dtype)

    def _row(self, whole_BSK: Tensor, index: int) -> Tensor:
        groups = whole_BSK.shape[0] // self.places
        return whole_BSK[index * groups : (index + 1) * groups]

    def drop(self, place: Place) -> None:
        """Forget a row; the last one takes its place."""
        last = self.rows.pop()
        if last is not place:
            stop = self.capacity if self.steady else self.slot + 1
            for pair in self._layers.values():
                for whole in pair:
                    self._row(whole, place.index)[:, :stop] = self._row(whole, last.index)[:, :stop]
            last.index = place.index
            self.rows[last.index] = last
        self._changed()

    def kept(self, place: Place, total: int) -> Kept:
        """Views of a row's first positions."""
        stop = place.start + total
        layers = {
            module: tuple(self._row(part, place.index)[:, place.start + place.gaps[module] : stop] for part in pair)
            for module, pair in self._layers.items()
        }
        return Kept(total, place.prefix, {module: (k, v) for module, (k, v) in layers.items()})

    def empty(self) -> None:
        """Give the memory back. There must be no row."""
        assert not self.rows
        self._layers.clear()
        self.places, self.capacity = 0, 0
        self._go(-1)
        self._changed()

    # -- attention -------------------------------------------------------------------------------------------------

    def advance(self, tokens: int = 1) -> None:
        """Go on by so many slots, which the pass to come writes; they must be there."""
        self._go(self.slot + tokens)
        self._masks.clear()

    def attend(
        self,
        module: nn.Module,
        q_RHTK: Tensor,
        k_RGTK: Tensor,
        v_RGTK: Tensor,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        kernels: Kernels | None = None,
        **_: Any,
    ) -> Tensor:
        """`softmax(q kᵀ · scaling) v` of the newest T tokens of each row over all that the row has kept. Returns [R,
        T, H, K]. `kernels` are for one token of each row, whose queries and keys are contiguous float32.
        """
        rows, heads, tokens, dim = q_RHTK.shape
        groups, stop = k_RGTK.shape[1], self.slot + 1
        kept = self._layers[module]
        scale = dim**-0.5 if scaling is None else scaling
        if kernels is not None and softcap is None and s_aux is None and kept[0].dtype == torch.float32:
            newest = q_RHTK[:, :, 0], k_RGTK[:, :, 0], v_RGTK[:, :, 0]
            return kernels.attend(*newest, kept, self._seen(module), self.slot, sliding_window or 0, scale)[:, None]
        k_BSK, v_BSK = (part[: rows * groups] for part in kept)
        newest_BTK = k_RGTK.reshape(rows * groups, tokens, dim), v_RGTK.reshape(rows * groups, tokens, -1)
        if self.steady and tokens == 1:
            stop = self.capacity
            for kept_BSK, new_B1K in zip((k_BSK, v_BSK), newest_BTK, strict=True):
                kept_BSK.index_copy_(1, self._slot_1, new_B1K.to(kept_BSK.dtype))
        else:
            k_BSK[:, stop - tokens : stop], v_BSK[:, stop - tokens : stop] = newest_BTK
            k_BSK, v_BSK = k_BSK[:, :stop], v_BSK[:, :stop]
        # the query heads of a group are the rows of one small product, so no key is repeated
        q_BQK = q_RHTK.reshape(rows * groups, heads // groups * tokens, dim).to(k_BSK.dtype)
        mask = self._mask(module, groups, tokens, sliding_window, q_BQK.dtype)
        mask = mask if mask is None or tokens == 1 else mask.repeat(1, heads // groups, 1)
        if softcap is None:
            # without a mask, beta says that the first argument is not read
            seen, beta = (q_BQK, 0) if mask is None else (mask, 1)
            scores_BQS = torch.baddbmm(seen[..., :1] if beta == 0 else seen, q_BQK, k_BSK.mT, beta=beta, alpha=scale)
        else:
            scores_BQS = torch.tanh(torch.bmm(q_BQK, k_BSK.mT) * (scale / softcap)) * softcap
            scores_BQS = scores_BQS if mask is None else scores_BQS + mask
        if s_aux is not None:
            sink_GQ = s_aux.view(groups, -1).repeat_interleave(tokens, 1)
            sink_BQ1 = sink_GQ.expand(rows, -1, -1).reshape(*q_BQK.shape[:2], 1)
            scores_BQS = torch.cat([scores_BQS, sink_BQ1.to(scores_BQS.dtype)], dim=-1)
        weights_BQS = torch.softmax(scores_BQS, -1, dtype=torch.promote_types(scores_BQS.dtype, torch.float32))
        weights_BQS = weights_BQS if s_aux is None else weights_BQS[..., :stop]
        y_BQK = torch.bmm(weights_BQS.to(v_BSK.dtype), v_BSK)
        if tokens == 1:
            return y_BQK.view(rows, 1, heads, -1).to(q_RHTK.dtype)
        return y_BQK.view(rows, heads, tokens, -1).transpose(1, 2).to(q_RHTK.dtype)

    def memory(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The keys and values of all places, and what `Kernels.attend` reads as `seen`; as long as `version` is."""
        return *self._layers[module], *self._seen(module)

    def _seen(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """The first slot that each row sees, and the one before which a window hides nothing: prefixes are always
        seen.
        """
        gaps = self._row_gaps(module)
        if gaps not in self._spans:
            firsts = [row.start + gap for row, gap in zip(self.rows, gaps, strict=True)]
            self._spans[gaps] = torch.tensor(firsts), torch.tensor([row.start + row.prefix for row in self.rows])
        return self._spans[gaps]

    def _row_gaps(self, module: nn.Module) -> tuple[int, ...]:
        if module not in self._gaps:
            self._gaps[module] = tuple(row.gaps[module] for row in self.rows)
        return self._gaps[module]

    def _mask(
        self, module: nn.Module, groups: int, tokens: int, window: int | None, dtype: torch.dtype
    ) -> Tensor | None:
        """0 where a row's key may be seen and −inf elsewhere, [rows · groups, tokens, slots]; None where all may be."""
        gaps = self._row_gaps(module)
        key = (groups, tokens, window, dtype, gaps)
        if key not in self._masks:
            steady = self.steady and tokens == 1
            hidden_RTS = self._hidden(gaps, tokens, window, steady=steady)
            mask_RTS = torch.zeros(hidden_RTS.shape, dtype=dtype, device=self.device)
            mask_RTS.masked_fill_(hidden_RTS, -torch.inf)
            some = steady or bool(hidden_RTS.any())
            self._masks[key] = mask_RTS.repeat_interleave(groups, dim=0) if some else None
        return self._masks[key]

    def _hidden(self, gaps: tuple[int, ...], tokens: int, window: int | None, *, steady: bool) -> Tensor:
        """Which keys a row's newest tokens may not see, [rows, tokens, slots]."""
        stop = self.capacity if steady else self.slot + 1
        starts_R11, slots_S = self._starts()[:, None, None], torch.arange(stop, device=self.device)
        firsts_R11 = starts_R11 + self._known(gaps, gaps)[:, None, None] if any(gaps) else starts_R11
        hidden_RTS = (slots_S < firsts_R11).expand(-1, tokens, -1)
        own_T = self._slot_1 if steady else torch.arange(stop - tokens, stop, device=self.device)
        own_T1 = own_T[:, None]
        if tokens > 1 or steady:
            hidden_RTS = hidden_RTS | (slots_S > own_T1)
        if window is not None and (steady or window <= self.slot):
            # prefixes are always seen, as in a packed pass
            prefixes_R11 = self._known("prefixes", [row.prefix for row in self.rows])[:, None, None]
            old_RTS = (slots_S >= starts_R11 + prefixes_R11) & (slots_S <= own_T1 - window)
            hidden_RTS = hidden_RTS | old_RTS
        return hidden_RTS
