"""What one adapter does to one site, in float64: the only thing that a rule of merging understands.

In: an adapter, its backbone, a site's name. Out: a pair of factors with their scale, or the dense change, and the
change of the bias. Several pairs of factors become one. Refuses to know rules, weights of parents and files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.fold import doubled, fold_bias, fold_weight, work_device
from lorica.core.errors import FormatError, MergeError
from lorica.core.update import LinearUpdate, LowRank, SoftPrompt
from lorica.models.backbone import Backbone
from lorica.models.frozen import FrozenWeight


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Change:
    """`ΔW = scale · B A`, or a dense ΔW, and `Δb`. All axes but the output's are flattened into I.

    Attributes:
        shape: of the site's weight, `Site.shape`; a norm's is (features,) and its matrix [features, 1].
        A_RI, B_OR: [r, I] and [O, r], as the method has them; the scale (LoRA's α/r) is not in them. Rank 0 is a
            change of nothing. None where the change is dense.
        scale: 1 where several pairs of different scales were joined.
        matrix_OI: [O, I], the dense change; None where there are factors.
        bias_O: the change of the bias, [O], None where there is none.
        source: whose change it is, for messages.
    """

    shape: tuple[int, ...]
    A_RI: Tensor | None = None
    B_OR: Tensor | None = None
    scale: float = 1.0
    matrix_OI: Tensor | None = None
    bias_O: Tensor | None = None
    source: str = ""

    @classmethod
    def of_factors(
        cls, shape: tuple[int, ...], A_RI: Tensor, B_OR: Tensor, scale: float = 1.0, bias_O: Tensor | None = None
    ) -> Change:
        """`scale · B A`; A may have the kernel's axes."""
        return cls(shape, A_RI.flatten(1), B_OR, scale, None, bias_O)

    @classmethod
    def of_dense(cls, shape: tuple[int, ...], dense: Tensor, bias_O: Tensor | None = None) -> Change:
        """A dense change, of the site's shape or [O, I]."""
        return cls(shape, matrix_OI=dense.reshape(shape[0], -1), bias_O=bias_O)

    @classmethod
    def nothing(cls, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Change:
        """No change: factors of rank 0."""
        empty = torch.zeros(0, dtype=torch.float64, device=device)
        return cls(shape, empty.view(0, 1).expand(0, _columns(shape)), empty.view(1, 0).expand(shape[0], 0))

    @property
    def factored(self) -> bool:
        """Whether it is there as factors."""
        return self.matrix_OI is None

    @property
    def rank(self) -> int:
        """Rows of A; for a dense change the most ranks that it can have."""
        return min(self.sides) if self.A_RI is None else self.A_RI.shape[0]

    @property
    def sides(self) -> tuple[int, int]:
        """(O, I)."""
        return self.shape[0], _columns(self.shape)

    @property
    def device(self) -> torch.device:
        return self.factors()[0].device if self.matrix_OI is None else self.matrix_OI.device

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, I] and B [O, r] without the scale. Raises MergeError where the change is dense."""
        if self.A_RI is None or self.B_OR is None:
            raise MergeError("A dense change has no factors.")
        return self.A_RI, self.B_OR

    def balanced(self) -> tuple[Tensor, Tensor]:
        """A and B with `√|scale|` in each and its sign in A, so that `ΔW = B A`. Raises MergeError as `factors`."""
        A_RI, B_OR = self.factors()
        root = math.sqrt(abs(self.scale))
        return math.copysign(root, self.scale) * A_RI, root * B_OR

    def matrix(self) -> Tensor:
        """ΔW as [O, I]."""
        if self.matrix_OI is not None:
            return self.matrix_OI
        A_RI, B_OR = self.factors()
        return self.scale * (B_OR @ A_RI)

    def dense(self) -> Tensor:
        """ΔW in the shape of the site's weight."""
        return self.matrix().reshape(self.shape)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [O, k], σ [k] descending, Vᵀ [k, I] of ΔW: exact, thin.

        Factors go through QR of both sides and the singular values of their small core: time (O + I) r², and ΔW is
        never formed. A dense change, or factors of as many ranks as the smaller side, is decomposed as it is.
        """
        if self.factored and self.rank < min(self.sides):
            A_RI, B_OR = self.factors()
            left_OR, upper_RR = torch.linalg.qr(B_OR)
            right_IR, lower_RR = torch.linalg.qr(A_RI.T)
            U_RR, S_R, V_RR = torch.linalg.svd(self.scale * (upper_RR @ lower_RR.T))
            return left_OR @ U_RR, S_R, V_RR @ right_IR.T
        U_OR, S_R, V_RI = torch.linalg.svd(self.matrix(), full_matrices=False)
        return U_OR, S_R, V_RI

    def singular_values(self) -> Tensor:
        """σ of `svd`, descending, without the vectors."""
        if self.factored and self.rank < min(self.sides):
            A_RI, B_OR = self.factors()
            upper_RR, lower_RR = torch.linalg.qr(B_OR, mode="r").R, torch.linalg.qr(A_RI.T, mode="r").R
            values: Tensor = torch.linalg.svdvals(self.scale * (upper_RR @ lower_RR.T))
            return values
        values = torch.linalg.svdvals(self.matrix())
        return values

    def with_bias(self, bias_O: Tensor | None) -> Change:
        """The same change of the weight with another of the bias."""
        return replace(self, bias_O=bias_O)


def _columns(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])


def join(changes: Sequence[Change]) -> Change:
    """Factored changes of one shape, side by side: their exact sum, of the sum of their ranks; biases are added.

    A scale that all share stays outside; different ones go into B.
    """
    scales = {change.scale for change in changes}
    scale = scales.pop() if len(scales) == 1 else 1.0
    pairs = [change.factors() for change in changes]
    B_OR = torch.cat([B if c.scale == scale else c.scale * B for c, (_, B) in zip(changes, pairs, strict=True)], 1)
    biases = [change.bias_O for change in changes if change.bias_O is not None]
    bias_O = torch.stack(biases).sum(0) if biases else None
    return Change.of_factors(changes[0].shape, torch.cat([A for A, _ in pairs]), B_OR, scale, bias_O)


@torch.no_grad()
def change_of(adapter: Adapter, backbone: Backbone, site: str) -> Change | None:
    """What an adapter does to a site, `effective(W₀) − W₀` and `b' − b₀`; None where it does not act there.

    Raises MergeError for virtual tokens and prefixes, FormatError for values that are not finite, MissingError for a
    site that the backbone lacks.
    """
    if site not in adapter.layout.sites:
        return None
    weight = backbone.weight(site)
    update = adapter.update(site, weight)
    if not isinstance(update, LinearUpdate):
        what = "virtual tokens" if isinstance(update, SoftPrompt) else "keys and values"
        raise MergeError(
            f"The {adapter.method.name!r} adapter {adapter.name!r} adds {what} at site {site!r} and changes no "
            "weight, so it cannot be combined with others.",
            hint="Leave it out, and stack it on the combined adapter where that is used.",
        )
    change = replace(change_from(update, weight, backbone.bias(site)), source=adapter.name)
    parts = (change.A_RI, change.B_OR, change.matrix_OI, change.bias_O)
    if not all(bool(torch.isfinite(part).all()) for part in parts if part is not None):
        raise FormatError(
            f"Adapter {adapter.name!r} holds values that are not finite, at site {site!r}.",
            hint="Use an earlier checkpoint.",
        )
    return change


@torch.no_grad()
def change_from(update: LinearUpdate, weight: FrozenWeight | Tensor, bias_O: Tensor | None = None) -> Change:
    """The change that an update makes to a frozen weight and bias, in float64. Factors are kept as they are, and the
    weight is not read for them, nor for dense differences.
    """
    device, shape = work_device(weight), tuple(weight.shape)
    exact = doubled(update, device)
    bias_change_O = bias_change(exact, bias_O, device)
    if not exact.low_rank_only and exact.in_scale_I is None and exact.out_scale_O is None:
        # W₀ drops out, and with it what its size would round away
        return Change.of_dense(shape, exact.effective(torch.zeros(shape).to(device, torch.float64)), bias_change_O)
    if not exact.low_rank_only:
        before = weight if isinstance(weight, Tensor) else weight.matrix()
        before = before.to(device=device, dtype=torch.float64)
        return Change.of_dense(shape, fold_weight(before, [exact]) - before, bias_change_O)
    pairs = [_native(shape, factor) for factor in exact.factors]
    return (join(pairs) if pairs else Change.nothing(shape, device)).with_bias(bias_change_O)


def _native(shape: tuple[int, ...], factor: LowRank) -> Change:
    """One pair with `mid` and `post` folded into B, and the scale outside."""
    return Change.of_factors(shape, factor.A_RI, replace(factor, scale=1.0).folded().B_OR, factor.scale)


def bias_change(update: LinearUpdate, bias_O: Tensor | None, device: torch.device) -> Tensor | None:
    """`b' − b₀` [O] of an update in float64; None where it is nothing."""
    before = None if bias_O is None else bias_O.to(device=device, dtype=torch.float64)
    after = fold_bias(before, [update])
    change_O = after if after is None or before is None else after - before
    return None if change_O is None or not bool(change_O.any()) else change_O
