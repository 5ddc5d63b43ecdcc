"""Steps of two factors that move their product as a full step would: projections on the tangent space of low rank.

In: factors A, B of `sBA` at one site or many of one shape, and their gradients `g_A = sBᵀG`, `g_B = sGAᵀ`. Out: h_A
and h_B, for which `g̃ = s·B h_A + s·h_B A = P_B G + (I − P_B) G P_A`, the nearest to G that they can make; G itself is
never needed. Refuses to know methods, modules and optimisers. See LoRA-Pro, arXiv 2407.18242.
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
    """The closed form at pairs of factors: A [S, r, in], B [S, out, r], scaling [S, 1, 1], `BᵀB = Q Λ Qᵀ` and
    `AAᵀ = V M Vᵀ`, and the damped inverses of both. S is none or any number of leading axes.
    """

    A_SRI: Tensor
    B_SOR: Tensor
    s_S11: Tensor
    lam_SR: Tensor
    Q_SRR: Tensor
    mu_SR: Tensor
    V_SRR: Tensor
    invB_SRR: Tensor
    invA_SRR: Tensor

    def solve(self, gA_SRI: Tensor, gB_SOR: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
        """`h_A = (1/s²)(BᵀB)⁻¹ g_A + XA` [S, r, in] and `h_B = (1/s²)(I − P_B) g_B (AAᵀ)⁻¹ − BX` [S, out, r]."""
        like, wide = self.A_SRI.dtype, self.lam_SR.dtype
        B_inv, A_inv = self.invB_SRR / self.s_S11**2, self.invA_SRR
        hA_SRI = B_inv.to(like) @ gA_SRI
        # everything on B's side is gathered in one r×r matrix: P_B is never formed
        inner_SRR = B_inv @ (self.B_SOR.mT @ gB_SOR).to(wide) @ A_inv
        if choice != "zero":
            X_SRR = self._free(B_inv @ (gA_SRI @ self.A_SRI.mT).to(wide), A_inv, choice)
            hA_SRI += X_SRR.to(like) @ self.A_SRI
            inner_SRR += X_SRR
        return hA_SRI, gB_SOR @ (A_inv / self.s_S11**2).to(like) - self.B_SOR @ inner_SRR.to(like)

    def _free(self, D_SRR: Tensor, A_inv: Tensor, choice: Choice) -> Tensor:
        """X, from `D = (1/s²)(BᵀB)⁻¹ g_A Aᵀ`, where it is not none."""
        if choice == "symmetric":
            return -0.5 * D_SRR @ A_inv
        # BᵀB X + X AAᵀ = −D, which makes ‖h_A − g_A‖² + ‖h_B − g_B‖² least
        sums_SRR = self.lam_SR[..., :, None] + self.mu_SR[..., None, :]
        present = sums_SRR > _floor(sums_SRR.amax((-2, -1), keepdim=True), sums_SRR.shape[-1])
        turned_SRR = torch.where(present, self.Q_SRR.mT @ D_SRR @ self.V_SRR / sums_SRR, 0.0)
        return -self.Q_SRR @ turned_SRR @ self.V_SRR.mT

    def equivalent(self, hA_SRI: Tensor, hB_SOR: Tensor) -> Tensor:
        """`g̃ = s·B h_A + s·h_B A` [S, out, in]: how the weight moves, to first order."""
        left_SOK, right_SKI = self.sides(hA_SRI, hB_SOR)
        return left_SOK @ right_SKI

    def sides(self, hA_SRI: Tensor, hB_SOR: Tensor) -> tuple[Tensor, Tensor]:
        """g̃ as a product of rank 2r, which takes less time than two of rank r: `s·[B h_B]` and `[h_A; A]`."""
        return self.s_S11 * torch.cat((self.B_SOR, hB_SOR), -1), torch.cat((hA_SRI, self.A_SRI), -2)

    def overshoot(self, gA_SRI: Tensor, gB_SOR: Tensor, hA_SRI: Tensor, hB_SOR: Tensor) -> Tensor:
        """`s‖h_B h_A‖ / ‖g̃‖` [S], from r×r products and `‖g̃‖² = ⟨g_A, h_A⟩ + ⟨g_B, h_B⟩`. Zero where g̃ is."""
        both = (-2, -1)
        square = ((hB_SOR.mT @ hB_SOR) * (hA_SRI @ hA_SRI.mT)).sum(both).clamp_min(0)
        length = ((gA_SRI * hA_SRI).sum(both) + (gB_SOR * hB_SOR).sum(both)).clamp_min(0)
        return torch.where(length > 0, self.s_S11[..., 0, 0] * (square / length).sqrt(), 0.0)


def tangent(A_SRI: Tensor, B_SOR: Tensor, s: float | Sequence[float], damping: float) -> Tangent:
    """The closed form at every pair of factors; s is one number, or one for each pair [S].

    The symmetric eigenproblems are solved as one batch, in float64 where the device has it; factors of half precision
    are taken as float32.
    """
    dtype = torch.promote_types(A_SRI.dtype, torch.float32)
    A_SRI, B_SOR = A_SRI.to(dtype), B_SOR.to(dtype)
    wide = torch.float32 if A_SRI.device.type == "mps" else torch.float64
    A_wide, B_wide = A_SRI.to(wide), B_SOR.to(wide)
    values, vectors = torch.linalg.eigh(torch.stack((B_wide.mT @ B_wide, A_wide @ A_wide.mT)))
    inverses = (vectors * inverse(values, damping)[..., None, :]) @ vectors.mT
    s_S11 = torch.as_tensor(s, dtype=dtype, device=A_SRI.device).expand(A_SRI.shape[:-2])[..., None, None]
    return Tangent(A_SRI, B_SOR, s_S11, values[0], vectors[0], values[1], vectors[1], inverses[0], inverses[1])


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
