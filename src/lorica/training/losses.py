"""Losses: sums over tokens of a function of the targets' log-probabilities, by registered name.

In: log-probabilities (differentiable) and a datum's inputs, for whole sequences end to end. Out: a term for each
target; the loss is their sum, never a mean. Refuses to know models, adapters and wire formats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lorica.core.config import Config
from lorica.core.errors import ConfigError, DataError, did_you_mean
from lorica.data.datum import Datum

UNPUBLISHED = {
    "stable_reinforce": "its objective is not published; use 'importance_sampling', 'ppo' or 'cispo'",
    "custom": "a custom loss runs in the client; call `forward_backward_custom`",
}
"""Names that other services have and Lorica cannot compute, and what to do instead."""


class Loss(Config, ABC):
    """A loss. Fields are its config; subclasses are registered by name."""

    name: ClassVar[str]
    summary: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]
    """Arrays that every datum must have beside its targets."""
    optional: ClassVar[Mapping[str, float]] = {}
    """Arrays that a datum may leave out, and the value that then stands for each element."""
    several_targets: ClassVar[bool] = False
    """Whether a position may have any number of targets."""

    @abstractmethod
    def terms(self, lp_M: Tensor, inputs: Mapping[str, Tensor], lengths: Sequence[int]) -> Tensor:
        """The loss's terms [M]. `lengths` are the pairs of each sequence, which lie end to end."""

    def check(self, datum: Datum) -> None:
        """Raises DataError where a datum lacks an input, or has one that this loss would not read."""
        known = (*self.inputs, *self.optional)
        missing = next((name for name in self.inputs if name not in datum.inputs), None)
        if missing is not None:
            raise DataError(
                f"{datum.where} has no {missing!r}, which loss {self.name!r} reads "
                f"(it reads target_tokens, {', '.join(known)})."
            )
        extra = next((name for name in datum.inputs if name not in known), None)
        if extra is not None:
            raise DataError(
                f"{datum.where} has {extra!r}, which loss {self.name!r} does not read.{did_you_mean(extra, known)}",
                hint=f"It reads target_tokens, {', '.join(known)}.",
            )
        if datum.crow is not None and not self.several_targets:
            raise DataError(
                f"{datum.where} has several targets at a position; loss {self.name!r} takes one, only "
                f"{', '.join(repr(n) for n, kind in LOSSES.items() if kind.several_targets)} takes more."
            )


class CrossEntropy(Loss):
    """`−Σ w · lp` with any real weights; a position may have several targets (distillation). Missing weights are 0."""

    name = "cross_entropy"
    summary = "−Σ w·lp"
    inputs = ()
    optional: ClassVar[Mapping[str, float]] = {"weights": 0.0}
    several_targets = True

    def terms(self, lp_M: Tensor, inputs: Mapping[str, Tensor], lengths: Sequence[int]) -> Tensor:
        return -_times(inputs["weights"], lp_M)


class _Policy(Loss):
    """What policy losses share: `q` are the sampler's log-probabilities and A the advantages."""

    inputs: ClassVar[tuple[str, ...]] = ("logprobs", "advantages")


class ImportanceSampling(_Policy):
    """`−Σ r·A` with `r = exp(lp − q)`: the unbiased gradient of the expected advantage under the sampler's tokens."""

    name = "importance_sampling"
    summary = "−Σ exp(lp − q)·A"

    def terms(self, lp_M: Tensor, inputs: Mapping[str, Tensor], lengths: Sequence[int]) -> Tensor:
        return -_times(inputs["advantages"], _ratio(lp_M - inputs["logprobs"], inputs["advantages"]))


class _Clipped(_Policy):
    """Bounds of a ratio; absolute values, so 1 is no change."""

    clip_low_threshold: float = Field(0.8, ge=0, description="least ratio that still counts, an absolute bound")
    clip_high_threshold: float = Field(1.2, gt=0, description="largest ratio that still counts, an absolute bound")

    @model_validator(mode="after")
    def _ordered(self) -> _Clipped:
        if self.clip_low_threshold > self.clip_high_threshold:
            raise ConfigError(
                f"clip_low_threshold is {self.clip_low_threshold} and clip_high_threshold {self.clip_high_threshold}; "
                "the low one must not be larger."
            )
        return self

    def clip(self, ratio_M: Tensor) -> Tensor:
        return ratio_M.clamp(self.clip_low_threshold, self.clip_high_threshold)

    def pessimistic(self, ratio_M: Tensor, advantages_M: Tensor) -> Tensor:
        """`−min(r·A, clip(r)·A)`."""
        return -torch.minimum(_times(advantages_M, ratio_M), _times(advantages_M, self.clip(ratio_M)))


class PPO(_Clipped):
    """`−Σ min(r·A, clip(r)·A)` (Schulman et al. 2017, arXiv 1707.06347), for each token."""

    name = "ppo"
    summary = "−Σ min(r·A, clip(r)·A)"

    def terms(self, lp_M: Tensor, inputs: Mapping[str, Tensor], lengths: Sequence[int]) -> Tensor:
        advantages_M = inputs["advantages"]
        return self.pessimistic(_ratio(lp_M - inputs["logprobs"], advantages_M), advantages_M)


class CISPO(_Clipped):
    """`−Σ sg(clip(r))·lp·A` (MiniMax 2025, arXiv 2506.13585): clipped tokens keep a gradient."""

    name = "cispo"
    summary = "−Σ sg(clip(r))·lp·A"
    clip_low_threshold: float = Field(0.0, ge=0, description="least ratio that still counts, an absolute bound")
    clip_high_threshold: float = Field(4.0, gt=0, description="largest ratio that still counts, an absolute bound")

    def terms(self, lp_M: Tensor, inputs: Mapping[str, Tensor], lengths: Sequence[int]) -> Tensor:
        advantages_M = inputs["advantages"]
        ratio_M = self.clip(_ratio(lp_M.detach() - inputs["logprobs"], advantages_M))
        return -_times(ratio_M * advantages_M, lp_M)


class DRO(_Policy):
    """`−Σ [lp·A − ½β(lp − q)²]` (Richemond et al. 2024, arXiv 2405.19107). Every token counts in the penalty."""

    name = "dro"
    summary = "−Σ [lp·A − ½β(lp − q)²]"
    beta: float = Field(0.05, ge=0, description="strength of the quadratic penalty on leaving the sampler")

    def terms(self, lp_M: Tensor, inputs: Mapping[str, Tensor], lengths: Sequence[int]) -> Tensor:
        return 0.5 * self.beta * (lp_M - inputs["logprobs"]).square() - _times(inputs["advantages"], lp_M)


class GSPO(_Clipped):
    """PPO's objective with one ratio a sequence, `s = exp(mean over the mask of (lp − q))` (Zheng et al. 2025, arXiv
    2507.18071; the token form, in which each token's term has value s and that token's own gradient).

    `sequence_ratio_mask` says which tokens the mean is over. The default bounds are the paper's (1 − 3e-4, 1 + 4e-4).
    """

    name = "gspo"
    summary = "−Σ min(s·A, clip(s)·A), s one ratio a sequence"
    inputs = ("logprobs", "advantages", "sequence_ratio_mask")
    clip_low_threshold: float = Field(0.9997, ge=0, description="least ratio that still counts, an absolute bound")
    clip_high_threshold: float = Field(1.0004, gt=0, description="largest ratio that still counts, an absolute bound")

    def terms(self, lp_M: Tensor, inputs: Mapping[str, Tensor], lengths: Sequence[int]) -> Tensor:
        mask_M, advantages_M = inputs["sequence_ratio_mask"], inputs["advantages"]
        change_M = _times(mask_M, lp_M.detach() - inputs["logprobs"])
        parts = zip(change_M.split(list(lengths)), mask_M.split(list(lengths)), strict=True)
        means = [c_T.sum() / m_T.sum() if bool(m_T.any()) else c_T.sum() for c_T, m_T in parts]
        s_M = torch.stack(means).exp().repeat_interleave(torch.tensor(lengths, device=lp_M.device))
        return self.pessimistic(s_M * _ratio(lp_M - lp_M.detach(), advantages_M), advantages_M)


def _times(factor_M: Tensor, value_M: Tensor) -> Tensor:
    """Their product, zero where the factor is: a token that does not count may be impossible."""
    return (factor_M * value_M).masked_fill(factor_M == 0, 0.0)


def _ratio(change_M: Tensor, advantages_M: Tensor) -> Tensor:
    """`exp(change)`; 1 for tokens without advantage, whose sampler log-probabilities are often placeholders."""
    return change_M.masked_fill(advantages_M == 0, 0.0).exp()


LOSSES: dict[str, type[Loss]] = {kind.name: kind for kind in (CrossEntropy, ImportanceSampling, PPO, CISPO, DRO, GSPO)}
"""Every loss by name. A new one is added here; the conformance suite and the reference page find it."""


def make_loss(name: str, config: Mapping[str, Any] | None = None) -> Loss:
    """The loss of a name with its settings. Raises ConfigError: an unknown name or setting, or a value out of range."""
    if name in UNPUBLISHED:
        raise ConfigError(f"Lorica does not compute loss {name!r}: {UNPUBLISHED[name]}.")
    if name not in LOSSES:
        raise ConfigError(
            f"There is no loss {name!r}.{did_you_mean(name, LOSSES)}", hint=f"Losses: {', '.join(LOSSES)}."
        )
    return LOSSES[name].parse(config or {})


CROSS_ENTROPY = CrossEntropy()
