"""Probes: what a site gives with its updates beside the frozen weight, against what the stored weight gives.

In: random inputs, the frozen rows, the updates, the stored rows; all float64. Out: the largest difference, and whether
rounding explains it. The reference never forms `W'`, so an error in the folding shows. Refuses to know modules.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.core.site import Site
from lorica.core.update import LinearUpdate

PROBES = 8
"""Random inputs for each site."""
SLACK = 1e-9
"""What float64 sums in another order may differ by, relative to the sum of absolute terms; factors may cancel."""


@dataclass(slots=True)
class Difference:
    """Of one site: largest absolute difference of an output, largest output, and whether rounding explains it all."""

    largest: float = 0.0
    scale: float = 0.0
    explained: bool = True

    @property
    def relative(self) -> float:
        """The difference in units of the site's largest output."""
        return self.largest / self.scale if self.scale else self.largest


def probe_inputs(site: Site, device: torch.device) -> Tensor:
    """N(0, 1) inputs in float64, [N, all inputs of one output]; a function of the site's name alone."""
    columns = site.shape[0] if site.kind == "norm" else torch.Size(site.shape[1:]).numel()
    rng = torch.Generator().manual_seed(zlib.crc32(site.name.encode()))
    return torch.randn(PROBES, columns, dtype=torch.float64, generator=rng).to(device)


def beside(x_NC: Tensor, weight: Tensor, updates: Sequence[LinearUpdate]) -> Tensor:
    """The output without bias of a stack beside the frozen weight: factor by factor, level by level.

    A convolution is probed on random patches, and a norm on normalised activations: then C is its features.
    """
    if not updates:
        return weight * x_NC if weight.ndim == 1 else x_NC @ weight.flatten(1).T
    update = updates[-1]
    x_in = x_NC
    if update.in_scale_I is not None:
        x_in = x_NC * update.in_scale_I.repeat_interleave(x_NC.shape[1] // update.in_scale_I.shape[0])
    y_NO = beside(x_in, weight, updates[:-1])
    if update.delta is not None:
        y_NO = y_NO + (update.delta * x_in if weight.ndim == 1 else x_in @ update.delta.flatten(1).T)
    for factor in update.factors:
        h_NR = x_NC @ factor.A_RI.flatten(1).T
        low_NO = factor.scale * ((h_NR if factor.mid_R is None else h_NR * factor.mid_R) @ factor.B_OR.T)
        y_NO = y_NO + (low_NO if factor.post_O is None else low_NO * factor.post_O)
    return y_NO if update.out_scale_O is None else y_NO * update.out_scale_O


def compare(
    found: Difference, x_NC: Tensor, wanted_NO: Tensor, weight: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> None:
    """Note in `found` how far stored rows, given back in float64, are from the wanted outputs.

    Rounding W' and b' once to `dtype` moves an output by at most eps · (|x| |W'|ᵀ + |b'|).
    """
    limits = torch.finfo(dtype)
    if weight.ndim == 1:
        got_NO, size_NO = weight * x_NC, weight.abs() * x_NC.abs()
        tiny_NO = limits.tiny * x_NC.abs()
    else:
        got_NO, size_NO = x_NC @ weight.flatten(1).T, x_NC.abs() @ weight.flatten(1).abs().T
        tiny_NO = limits.tiny * x_NC.abs().sum(1, keepdim=True)
    if bias_O is not None:
        got_NO, size_NO = got_NO + bias_O, size_NO + bias_O.abs()
    gap_NO = (got_NO - wanted_NO).abs()
    found.explained &= bool((gap_NO <= (limits.eps + SLACK) * (size_NO + wanted_NO.abs()) + tiny_NO).all())
    found.largest = max(found.largest, float(gap_NO.max()))
    found.scale = max(found.scale, float(wanted_NO.abs().max()))
