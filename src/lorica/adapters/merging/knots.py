"""KnOTS: turn all parents' changes into one shared basis, merge them there, and turn back.

In: changes of any kind. Out: factors of at most the joint rank. The joint singular vectors of factors come from QR and
a small core; only dense parents need a dense decomposition. Refuses to know files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorica.adapters.merging.base import Merging
from lorica.adapters.merging.change import Change
from lorica.adapters.merging.dare import dare, site_rng
from lorica.adapters.merging.tensors import weighted_sum
from lorica.adapters.merging.ties import ties
from lorica.core.site import Site
from lorica.methods.base import Paper

Then = Literal["ties", "dare", "mean", "sum"]


def align(changes: Sequence[Change], tolerance: float = 1e-7) -> tuple[Tensor, list[Tensor]]:
    """U [O, k], orthonormal, and `P_n` [k, I] with `U P_n = ΔW_n`: from `[ΔW_1 | … | ΔW_N] = U Σ [V_1 | … | V_N]`,
    `P_n = Σ V_n`.

    Singular values up to `tolerance` times the largest are dropped; k ≤ Σr. With factors, QR of the stacked B and of
    each A leave a core of at most Σr rows and columns, and no [O, I] is formed.
    """
    if all(change.factored for change in changes):
        left_OK, blocks_KL, rights_LI = _cores(changes)
    else:
        left_OK, blocks_KL = None, [change.matrix() for change in changes]
        rights_LI = [None] * len(changes)
    U_KM, S_M, V_ML = torch.linalg.svd(torch.cat(blocks_KL, 1), full_matrices=False)
    kept = int(S_M.gt(tolerance * S_M[:1].sum()).sum())
    pieces = (S_M[:kept, None] * V_ML[:kept]).split([block.shape[1] for block in blocks_KL], 1)
    U_OM = U_KM[:, :kept] if left_OK is None else left_OK @ U_KM[:, :kept]
    return U_OM, [P if right is None else P @ right for P, right in zip(pieces, rights_LI, strict=True)]


def _cores(changes: Sequence[Change]) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """Q [O, K] and for each change a block [K, L] and rows [L, I] with `Q · block · rows = ΔW`."""
    pairs = [change.factors() for change in changes]
    left_OK, upper_KR = torch.linalg.qr(torch.cat([B_OR for _, B_OR in pairs], 1))
    blocks: list[Tensor] = []
    rights: list[Tensor | None] = []
    for change, (A_RI, _), upper in zip(changes, pairs, upper_KR.split([c.rank for c in changes], 1), strict=True):
        right_IL, lower_LR = torch.linalg.qr(A_RI.T)
        blocks.append(change.scale * (upper @ lower_LR.T))
        rights.append(right_IL.T)
    return left_OK, blocks, rights


class Knots(Merging):
    """`ΔW = λ U merge(P_1, …, P_N)` with `U P_n = ΔW_n` in one orthonormal basis U. arXiv 2410.19735.

    Without trimming, `then=sum` is `task_arithmetic`. The published code drops singular values up to 1e-5; here the
    bound is a share of the largest, because changes of adapters differ in size.
    """

    name: ClassVar[str] = "knots"
    summary: ClassVar[str] = "align the changes by a joint SVD, merge there, turn back"
    paper: ClassVar[Paper | None] = Paper("Model Merging with SVD to Tie the Knots", "ICLR 2025", "2410.19735")

    then: Then = Field("ties", description="how aligned parents are merged: `ties`, `dare`, `mean` or `sum`")
    density: float = Field(0.2, gt=0, le=1, description="with `ties` and `dare`, the share of entries that stays")
    elect: Literal["total", "frequency"] = Field("total", description="with `ties`, whose sign wins")
    scale: float = Field(0.6, description="λ, on the result")
    seed: int = Field(0, ge=0, description="with `dare`, of what is dropped")
    tolerance: float = Field(1e-7, ge=0, lt=1, description="singular values up to this share of the largest go")

    @property
    def ordered(self) -> bool:
        return self.then == "dare" and self.density < 1

    def merge(self, site: Site, changes: Sequence[Change], weights: Sequence[float], survey: Any = None) -> Change:
        bias_O = self._merge_biases(site, changes, weights)
        if not any(change.rank for change in changes):
            return Change.nothing(site.shape, changes[0].device).with_bias(bias_O)
        if len(site.shape) == 1:
            merged = self._entries([change.matrix() for change in changes], weights, site, "weight")
            return Change.of_dense(site.shape, self.scale * merged, bias_O)
        U_OM, pieces_MI = align(changes, self.tolerance)
        if not U_OM.shape[1]:
            return Change.nothing(site.shape, U_OM.device).with_bias(bias_O)
        merged_MI = self._entries(pieces_MI, weights, site, "weight")
        return Change.of_factors(site.shape, merged_MI, U_OM, self.scale, bias_O)

    def _merge_biases(self, site: Site, changes: Sequence[Change], weights: Sequence[float]) -> Tensor | None:
        biases = [change.bias_O for change in changes]
        like = next((bias_O for bias_O in biases if bias_O is not None), None)
        if like is None:
            return None
        filled = [torch.zeros_like(like) if bias_O is None else bias_O for bias_O in biases]
        return self.scale * self._entries(filled, weights, site, "bias")

    def _entries(self, tensors: Sequence[Tensor], weights: Sequence[float], site: Site, label: str) -> Tensor:
        if self.then == "ties":
            return ties(tensors, weights, self.density, elect=self.elect)
        if self.then == "dare":
            return dare(tensors, weights, self.density, site_rng(self.seed, site.name, label))
        share = 1 / len(tensors) if self.then == "mean" else 1.0
        return weighted_sum(tensors, [share * weight for weight in weights])
