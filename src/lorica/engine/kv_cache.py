"""A key-value cache of one generation: memory taken once, rows aligned at their last token, and attention over it.

In: keys and values of packed prompts (with their prefixes), then one token of every row at each step. Out: attention
outputs. Every row writes a step's key at the same slot, so a step is one copy; a mask hides the slots before a row's
first key. Refuses to know adapters, models and sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorica.engine.packed import Prefix

GROWTH = 256
"""Slots that are reserved beyond the prompts at first; afterwards the number doubles."""


class KVCache:
    """Keys and values of every attention module, [rows · kv heads, slots, head dim].

    Args:
        totals: for each row its virtual and real prompt positions together; prefixes: how many of them are a prefix's.
        limit: slots that will be needed at most; no more are ever reserved.
        device: where masks are made.

    Attributes: `width` is the slot after the last prompt token of every row; `slot` is the last written one.
    """

    def __init__(self, totals: Sequence[int], prefixes: Sequence[int], limit: int, device: torch.device) -> None:
        self.width = max(totals)
        self.slot = self.width - 1
        self.limit = limit
        self.capacity = min(limit, self.width + GROWTH)
        self.filling: list[int] = list(range(len(totals)))
        self._starts_R = torch.tensor([self.width - total for total in totals], device=device)
        self._prefixes_R = torch.tensor(list(prefixes), device=device)
        self._layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        # slots before each row's first key at a module that a row's prefixes leave out
        self._gaps: dict[nn.Module, tuple[int, ...]] = {}
        self._masks: dict[tuple[int, int | None, torch.dtype, tuple[int, ...]], Tensor | None] = {}

    @property
    def rows(self) -> int:
        return len(self._starts_R)

    def positions(self) -> Tensor:
        """The position [rows, 1] of the token that the present step feeds."""
        return self.slot - self._starts_R[:, None]

    # -- prompts ---------------------------------------------------------------------------------------------------

    def fill(
        self, module: nn.Module, k_1GNK: Tensor, v_1GNK: Tensor, lengths: Sequence[int], prefixes: Sequence[Prefix]
    ) -> None:
        """Keep the packed prompts of the rows in `filling`, each behind its prefix."""
        groups = k_1GNK.shape[1]
        if module not in self._layers:
            self._layers[module] = self._reserve(k_1GNK), self._reserve(v_1GNK)
            self._gaps[module] = tuple(self._prefixes_R.tolist())
        here = {row: p[0].shape[0] for row, p in zip(self.filling, prefixes, strict=True) if p is not None}
        self._gaps[module] = tuple(gap - here.get(row, 0) for row, gap in enumerate(self._gaps[module]))
        for part, own_1GNK in enumerate((k_1GNK, v_1GNK)):
            kept_BSK, start = self._layers[module][part], 0
            for row, length, prefix in zip(self.filling, lengths, prefixes, strict=True):
                kept_GSK, first = kept_BSK[row * groups : (row + 1) * groups], self.width - length
                kept_GSK[:, first : self.width] = own_1GNK[0, :, start : start + length]
                if prefix is not None:
                    extra_PGK = prefix[part]
                    kept_GSK[:, first - extra_PGK.shape[0] : first] = extra_PGK.transpose(0, 1)
                start += length

    def _reserve(self, own_1GNK: Tensor) -> Tensor:
        # products with one query are small, and a CPU's small products are several times faster in float32
        small = own_1GNK.device.type == "cpu"
        dtype = torch.promote_types(own_1GNK.dtype, torch.float32) if small else own_1GNK.dtype
        return own_1GNK.new_zeros(self.rows * own_1GNK.shape[1], self.capacity, own_1GNK.shape[3], dtype=dtype)

    # -- steps -----------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Go on to the next slot, which the step to come writes; memory doubles when it is full."""
        self.slot += 1
        self._masks.clear()
        if self.slot < self.capacity:
            return
        grown = min(self.limit, 2 * self.capacity)
        for module, (k_BSK, v_BSK) in self._layers.items():
            self._layers[module] = _grown(k_BSK, grown), _grown(v_BSK, grown)
        self.capacity = grown

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every other row."""
        before, index_R = self.rows, torch.tensor(list(rows), device=self._starts_R.device)
        self._starts_R, self._prefixes_R = self._starts_R[index_R], self._prefixes_R[index_R]
        for module, pair in self._layers.items():
            self._gaps[module] = tuple(self._gaps[module][row] for row in rows)
            k_BSK, v_BSK = (kept.unflatten(0, (before, -1))[index_R].flatten(0, 1) for kept in pair)
            self._layers[module] = k_BSK, v_BSK
        self._masks.clear()

    def attend(
        self,
        module: nn.Module,
        q_RH1K: Tensor,
        k_RG1K: Tensor,
        v_RG1K: Tensor,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """`softmax(q kᵀ · scaling) v` of one new token in each row over all that the row has kept. Returns [R, 1, H,
        K].
        """
        rows, heads, _one, dim = q_RH1K.shape
        groups, stop = k_RG1K.shape[1], self.slot + 1
        k_BSK, v_BSK = self._layers[module]
        k_BSK[:, self.slot] = k_RG1K.reshape(rows * groups, dim)
        v_BSK[:, self.slot] = v_RG1K.reshape(rows * groups, -1)
        k_BSK, v_BSK = k_BSK[:, :stop], v_BSK[:, :stop]
        # the query heads of a group are the rows of one small product, so no key is repeated
        q_BQK = q_RH1K.reshape(rows * groups, heads // groups, dim).to(k_BSK.dtype)
        scale = dim**-0.5 if scaling is None else scaling
        mask_B1S = self._mask(module, groups, sliding_window, q_BQK.dtype)
        if softcap is None:
            # without a mask, beta says that the first argument is not read
            seen, beta = (q_BQK, 0) if mask_B1S is None else (mask_B1S, 1)
            scores_BQS = torch.baddbmm(seen[..., :1] if beta == 0 else seen, q_BQK, k_BSK.mT, beta=beta, alpha=scale)
        else:
            scores_BQS = torch.tanh(torch.bmm(q_BQK, k_BSK.mT) * (scale / softcap)) * softcap
            scores_BQS = scores_BQS if mask_B1S is None else scores_BQS + mask_B1S
        if s_aux is not None:
            sink_BQ1 = s_aux.view(1, groups, -1).expand(rows, -1, -1).reshape(*q_BQK.shape[:2], 1)
            scores_BQS = torch.cat([scores_BQS, sink_BQ1.to(scores_BQS.dtype)], dim=-1)
        weights_BQS = torch.softmax(scores_BQS, -1, dtype=torch.promote_types(scores_BQS.dtype, torch.float32))
        weights_BQS = weights_BQS if s_aux is None else weights_BQS[..., :stop]
        y_BQK = torch.bmm(weights_BQS.to(v_BSK.dtype), v_BSK)
        return y_BQK.view(rows, 1, heads, -1).to(q_RH1K.dtype)

    def _mask(self, module: nn.Module, groups: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """0 where a row's key may be seen and −inf elsewhere, [rows · groups, 1, slots]; None where all may be."""
        gaps = self._gaps[module]
        key = (groups, window, dtype, gaps)
        if key not in self._masks:
            slots_S = torch.arange(self.slot + 1, device=self._starts_R.device)
            hidden_RS = slots_S < (self._starts_R + torch.tensor(gaps, device=self._starts_R.device))[:, None]
            if window is not None and window <= self.slot:
                # prefixes are always seen, as in a packed pass
                own_RS = slots_S >= (self._starts_R + self._prefixes_R)[:, None]
                hidden_RS = hidden_RS | (own_RS & (slots_S <= self.slot - window))
            mask_RS = torch.zeros(hidden_RS.shape, dtype=dtype, device=hidden_RS.device)
            mask_RS.masked_fill_(hidden_RS, -torch.inf)
            self._masks[key] = mask_RS[:, None].repeat_interleave(groups, dim=0) if bool(hidden_RS.any()) else None
        return self._masks[key]


def _grown(kept_BSK: Tensor, slots: int) -> Tensor:
    grown = kept_BSK.new_zeros(kept_BSK.shape[0], slots, kept_BSK.shape[2])
    grown[:, : kept_BSK.shape[1]] = kept_BSK
    return grown
