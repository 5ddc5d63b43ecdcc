"""IA³: identities of its specification."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorica.core.update import LinearUpdate
from lorica.engine.host import Host
from lorica.methods.ia3 import IA3
from tests.methods.one import SITE, effective, grads, hosted, linear, matrix, same
from tests.tiny import tiny

W, B0, X, DY = matrix(8, 5), matrix(8, seed=6), matrix(6, 5, seed=1), matrix(6, 8, seed=2)
OUT, IN = matrix(8, seed=3), matrix(5, seed=4)
FEED = IA3(feedforward=(SITE,))


def test_an_output_is_scaled_with_its_bias() -> None:
    host = hosted(linear(W, B0), IA3(), l=OUT)
    same(host(X), OUT * (X @ W.T + B0))
    same(effective(host), OUT[:, None] * W)
    update = host.adapter("a").update(SITE, host.backbone.weight(SITE))
    assert isinstance(update, LinearUpdate)
    merged = update.effective_bias(host.backbone.bias(SITE))
    assert merged is not None
    same(merged, OUT * B0)


def test_a_feedforward_sites_input_is_scaled_and_its_bias_is_not() -> None:
    host = hosted(linear(W, B0), FEED, l=IN)
    same(host(X), (X * IN) @ W.T + B0)
    same(effective(host), W * IN)


def test_gradients_are_sums_of_delta_times_what_is_scaled() -> None:
    same(grads(hosted(linear(W, B0), IA3(), l=OUT), X, DY)["l"], (DY * (X @ W.T + B0)).sum(0))
    same(grads(hosted(linear(W, B0), FEED, l=IN), X, DY)["l"], ((DY @ W) * X).sum(0))


def test_scaling_the_input_of_a_gated_mlps_last_map_is_scaling_the_output_of_its_ungated_branch() -> None:
    base = tiny("llama", dtype=torch.float64)
    names = ["model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"]
    scale, ids = matrix(96, seed=3), torch.tensor([[5, 9, 20, 7]])
    host, outputs = Host(base), []
    for index, name in enumerate(names):
        adapter = host.add(str(index), IA3(), name, dtype=torch.float64)
        adapter.set(name, "l", scale)
        host.activate(str(index))
        outputs.append(host(input_ids=ids).logits)
    same(outputs[0], outputs[1], 1e-11)


@pytest.mark.parametrize("method", [IA3(), FEED], ids=["output", "input"])
def test_two_stacked_adapters_multiply(method: IA3) -> None:
    first, second = (OUT, OUT.flip(0)) if method is not FEED else (IN, IN.flip(0))
    host = hosted(linear(W, B0), method, l=first)
    host.add("b", method, SITE, dtype=torch.float64).set(SITE, "l", second)
    host.activate("a", "b")
    same(host(X), hosted(linear(W, B0), method, l=first * second)(X))


def test_at_a_convolution_channels_are_scaled() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, dtype=torch.float64)
    x, l_in, l_out = matrix(2, 4, 5, 5, seed=1), matrix(4, seed=3), matrix(6, seed=4)
    host = hosted(conv, IA3(), l=l_out)
    with host.disabled():
        expected = l_out.view(-1, 1, 1) * conv(x)
    same(host(x), expected)
    grouped = nn.Conv2d(4, 6, 3, groups=2, dtype=torch.float64)
    host = hosted(grouped, FEED, l=l_in[:2])
    y, merged = host(x), effective(host)
    with host.disabled():
        same(y, grouped._conv_forward(x, merged, grouped.bias))
    host = hosted(nn.Conv2d(4, 6, 3, padding=1, dtype=torch.float64), FEED, l=l_in)
    with host.disabled():
        expected = host(x * l_in.view(-1, 1, 1))
    same(host(x), expected)


@pytest.mark.parametrize(
    ("family", "inputs", "outputs"),
    [
        ("llama", {"down_proj"}, {"k_proj", "v_proj"}),
        ("gpt2", {"c_proj"}, {"c_attn"}),
        ("bert", {"dense"}, {"key", "value"}),
    ],
)
def test_defaults_scale_keys_values_and_the_feedforwards_inner_features(
    family: str, inputs: set[str], outputs: set[str]
) -> None:
    method = IA3()
    sites = Host(tiny(family)).layout(method).sites.values()
    assert {s.role for s in sites if method.is_feedforward(s)} == inputs
    assert {s.role for s in sites if not method.is_feedforward(s)} == outputs


def test_scales_start_at_one_and_do_not_decay() -> None:
    adapter = hosted(linear(W), IA3()).adapter("a")
    assert torch.equal(adapter.flat, torch.ones(8, dtype=torch.float64))
    assert not any(group.decay for group in adapter.layout.groups)
