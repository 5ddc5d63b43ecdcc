"""Norm tuning and BitFit: identities, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorica.core.errors import MethodError, TargetError
from lorica.engine.host import Host
from lorica.methods.bias import Bias
from lorica.methods.norm import Norm
from tests.methods.one import SITE, grads, hosted, linear, matrix, same
from tests.tiny import tiny


@pytest.mark.parametrize("kind", ["layer", "rms", "group"])
def test_it_is_the_norm_whose_weight_and_bias_are_swapped(kind: str) -> None:
    made = {
        "layer": lambda: nn.LayerNorm(6, dtype=torch.float64),
        "rms": lambda: nn.RMSNorm(6, dtype=torch.float64),
        "group": lambda: nn.GroupNorm(3, 6, dtype=torch.float64),
    }[kind]
    own, swapped = made(), made()
    shifts = {"weight": matrix(6, seed=1)} | ({} if kind == "rms" else {"bias": matrix(6, seed=2)})
    for name, shift in shifts.items():
        getattr(swapped, name).data.add_(shift)
    # a group norm's last axis may be as long as its channels
    x = matrix(4, 6, 6) if kind == "group" else matrix(4, 3, 6)
    expected = swapped(x)
    same(hosted(own, Norm(), **shifts)(x), expected)


def test_only_norms_are_trained() -> None:
    host = Host(tiny("bert"))
    assert {site.kind for site in host.add("a", Norm()).layout.sites.values()} == {"norm"}


def test_a_gain_of_an_rms_norm_folds_into_the_next_linear() -> None:
    norm, shift, W, x = nn.RMSNorm(6, dtype=torch.float64), matrix(6, seed=1), matrix(8, 6), matrix(4, 6, seed=2)
    host = hosted(norm, Norm(), weight=shift)
    y = host(x) @ W.T
    with host.disabled():
        same(y, host(x) @ (W * (1 + shift)).T)


def test_bias_tuning_adds_to_the_bias() -> None:
    W, b, d, x, dy = matrix(8, 5), matrix(8, seed=1), matrix(8, seed=2), matrix(6, 5, seed=3), matrix(6, 8, seed=4)
    host = hosted(linear(W, b), Bias(), bias=d)
    same(host(x), x @ W.T + b + d)
    same(grads(host, x, dy)["bias"], dy.sum(0))


def test_bias_tuning_refuses_a_site_without_a_bias() -> None:
    with pytest.raises(MethodError, match="no bias to train"):
        hosted(linear(matrix(8, 5)), Bias())


def test_bias_tuning_refuses_a_model_without_biases() -> None:
    with pytest.raises(TargetError, match="all-bias"):
        Host(tiny("llama")).add("a", Bias())


def test_bitfit_trains_every_bias_of_bert() -> None:
    base = tiny("bert")
    biases = sum(p.numel() for name, p in base.module.named_parameters() if name.endswith("bias") and "cls" not in name)
    sites = [s for s in Host(base).add("a", Bias()).layout.sites.values() if not s.name.startswith("cls")]
    assert sum(site.out_features for site in sites) == biases
    assert SITE not in base.sites
