"""Steps of two factors that move their product as a full step would: projections on the tangent space of low rank.

In: factors A, B of `sBA` with their gradients `g_A = sBᵀG`, `g_B = sGAᵀ`. Out: h_A and h_B, for which
`g̃ = s·B h_A + s·h_B A = P_B G + (I − P_B) G P_A`, the nearest to G that they can make; G itself is never needed.
Refuses to know methods, sites and optimisers. See LoRA-Pro, arXiv 2407.18242.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Choice = Literal["sylvester", "symmetric", "zero"]
"""X of the solution: that which keeps h nearest to g, that which splits the shared part evenly, or none."""


@dataclass(frozen=True, slots=True, eq=False)
class Tangent:
    """The closed form at one pair of factors: A [r, in], B [out, r], `BᵀB = Q Λ Qᵀ` and `AAᵀ = V M Vᵀ`, and the damped
    inverses of both.
    """

    A_RI: Tensor
    B_OR: Tensor
    s: float
    lam_R: Tensor
    Q_RR: Tensor
    mu_R: Tensor
    V_RR: Tensor
    invB_RR: Tensor
    invA_RR: Tensor

    def solve(self, gA_RI: Tensor, gB_OR: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
        """`h_A = (1/s²)(BᵀB)⁻¹ g_A + XA` [r, in] and `h_B = (1/s²)(I − P_B) g_B (AAᵀ)⁻¹ − BX` [out, r]."""
        like, wide = self.A_RI.dtype, self.lam_R.dtype
        B_inv, A_inv = self.invB_RR / self.s**2, self.invA_RR
        hA_RI = B_inv.to(like) @ gA_RI
        # everything on B's side is gathered in one r×r matrix: P_B is never formed
        inner_RR = B_inv @ (self.B_OR.T @ gB_OR).to(wide) @ A_inv
        if choice != "zero":
            X_RR = self._free(B_inv @ (gA_RI @ self.A_RI.T).to(wide), A_inv, choice)
            hA_RI.addmm_(X_RR.to(like), self.A_RI)
            inner_RR += X_RR
        return hA_RI, gB_OR @ (A_inv / self.s**2).to(like) - self.B_OR @ inner_RR.to(like)

    def _free(self, D_RR: Tensor, A_inv: Tensor, choice: Choice) -> Tensor:
        """X, from `D = (1/s²)(BᵀB)⁻¹ g_A Aᵀ`, where it is not none."""
        if choice == "symmetric":
            return -0.5 * D_RR @ A_inv
        # BᵀB X + X AAᵀ = −D, which makes ‖h_A − g_A‖² + ‖h_B − g_B‖² least
        sums_RR = self.lam_R[:, None] + self.mu_R
        present = sums_RR > _floor(sums_RR.amax(), len(D_RR))
        return -self.Q_RR @ torch.where(present, self.Q_RR.T @ D_RR @ self.V_RR / sums_RR, 0.0) @ self.V_RR.T

    def equivalent(self, hA_RI: Tensor, hB_OR: Tensor) -> Tensor:
        """`g̃ = s·B h_A + s·h_B A` [out, in]: how the weight moves, to first order."""
        left_OK, right_KI = self.sides(hA_RI, hB_OR)
        return left_OK @ right_KI

    def sides(self, hA_RI: Tensor, hB_OR: Tensor) -> tuple[Tensor, Tensor]:
        """g̃ as a product of rank 2r, which takes less time than two of rank r: `s·[B h_B]` and `[h_A; A]`."""
        return self.s * torch.cat((self.B_OR, hB_OR), 1), torch.cat((hA_RI, self.A_RI))

    def overshoot(self, gA_RI: Tensor, gB_OR: Tensor, hA_RI: Tensor, hB_OR: Tensor) -> Tensor:
        """`s‖h_B h_A‖ / ‖g̃‖`, from r×r products and `‖g̃‖² = ⟨g_A, h_A⟩ + ⟨g_B, h_B⟩`. Zero where g̃ is."""
        square = ((hB_OR.T @ hB_OR) * (hA_RI @ hA_RI.T)).sum().clamp_min(0)
        length = ((gA_RI * hA_RI).sum() + (gB_OR * hB_OR).sum()).clamp_min(0)
        return torch.where(length > 0, self.s * (square / length).sqrt(), 0.0)


def inverse(spectrum_R: Tensor, damping: float) -> Tensor:
    """`λ / (λ² + δ²)` with `δ = damping · Σλ / r`: 1/λ, but 0 along directions that are as good as absent.

    Relative, so that a B of any size is treated alike; an absolute term would swamp a young B. Unlike `1 / (λ + δ)` it
    does not blow up the rounding of a gradient along an absent direction. A spectrum of zeros (B = 0) gives zeros.
    Leading axes are a batch.
    """
    count = spectrum_R.shape[-1]
    present = spectrum_R > _floor(spectrum_R.amax(-1, keepdim=True), count)
    delta = damping * spectrum_R.sum(-1, keepdim=True) / count
    return torch.where(present, 1 / (spectrum_R + delta**2 / spectrum_R), 0.0)


def _floor(largest: Tensor, count: int) -> Tensor:
    """What eigenvalues of a Gram matrix are no more than by rounding."""
    return largest.clamp_min(0) * (count * torch.finfo(largest.dtype).eps)


def tangents(factors: Sequence[tuple[Tensor, Tensor, float]], damping: float) -> list[Tangent]:
    """The closed form at every (A, B, s); A may have further axes, which are flattened.

    The symmetric eigenproblems of one rank are solved as one batch, in float64 where the device has it; factors of
    half precision are taken as float32.
    """
    pairs = []
    for A, B_OR, s in factors:
        dtype = torch.promote_types(A.dtype, torch.float32)
        pairs.append((A.flatten(1).to(dtype), B_OR.to(dtype), s))
    grams: dict[int, list[Tensor]] = {}
    for A_RI, B_OR, _ in pairs:
        wide = torch.float32 if A_RI.device.type == "mps" else torch.float64
        grams.setdefault(len(A_RI), []).extend((B_OR.to(wide).T @ B_OR.to(wide), A_RI.to(wide) @ A_RI.to(wide).T))
    turns = {rank: iter(_solved(torch.stack(found), damping)) for rank, found in grams.items()}
    found = []
    for A_RI, B_OR, s in pairs:
        (lam_R, Q_RR, invB_RR), (mu_R, V_RR, invA_RR) = next(turns[len(A_RI)]), next(turns[len(A_RI)])
        found.append(Tangent(A_RI, B_OR, s, lam_R, Q_RR, mu_R, V_RR, invB_RR, invA_RR))
    return found


def _solved(grams_TRR: Tensor, damping: float) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Spectrum, eigenvectors and damped inverse of each Gram matrix."""
    lam_TR, Q_TRR = torch.linalg.eigh(grams_TRR)
    inverse_TRR = (Q_TRR * inverse(lam_TR, damping)[:, None]) @ Q_TRR.mT
    return list(zip(lam_TR.unbind(), Q_TRR.unbind(), inverse_TRR.unbind(), strict=True))
