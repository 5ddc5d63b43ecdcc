"""MiSS in its three forms: the golden value and the identities of its specification."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.core.errors import ConfigError, MethodError
from lorica.methods import make_method
from lorica.methods.lora import LoRA
from lorica.methods.miss import MiSS, repeated_identity
from tests.methods.one import SITE, effective, grads, hosted, linear, matrix, same, tensors

W, X, DY = matrix(8, 10), matrix(5, 10, seed=1), matrix(5, 8, seed=2)
M = matrix(4, 8, seed=3)
W_BAT, D = matrix(6, 9, seed=4), 0.3 * matrix(2, 3, 3, seed=5)


def folded(x_NI: Tensor, rank: int) -> Tensor:
    """Blocks of the padded input, summed."""
    return F.pad(x_NI, (0, -x_NI.shape[1] % rank)).unflatten(1, (-1, rank)).sum(1)


def test_the_golden_value_of_the_specification() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]], dtype=torch.float64)
    host = hosted(
        linear(torch.zeros(2, 5, dtype=torch.float64)), MiSS(rank=2), M=torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    )
    assert folded(x, 2).tolist() == [[9, 6]]
    assert host(x).tolist() == [[27, 42]]


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 7, 10])
def test_it_adds_the_summed_blocks_times_m_also_where_the_rank_does_not_divide_the_input(rank: int) -> None:
    own = matrix(rank, 8, seed=3)
    host = hosted(linear(W), MiSS(rank=rank), M=own)
    same(host(X), X @ W.T + folded(X, rank) @ own)
    same(effective(host) - W, torch.stack([own[k % rank] for k in range(10)], 1))
    same(grads(host, X, DY)["M"], folded(X, rank).T @ DY)
    assert int(torch.linalg.matrix_rank(effective(host) - W)) <= rank


def test_it_is_a_lora_with_a_constant_a() -> None:
    A = torch.eye(4, dtype=torch.float64).repeat(1, 3)[:, :10]
    lora = hosted(linear(W), LoRA(rank=4, alpha=4), A=A, B=M.T)
    same(hosted(linear(W), MiSS(rank=4), M=M)(X), lora(X))


def test_mini_repeats_its_columns_along_the_outputs() -> None:
    own = matrix(4, 2, seed=3)
    host = hosted(linear(W), MiSS(rank=4, form="mini", mini_rank=2), M=own)
    same(host(X), hosted(linear(W), MiSS(rank=4), M=own.repeat(1, 4))(X))
    same(grads(host, X, DY)["M"], (folded(X, 4).T @ DY).view(4, 4, 2).sum(1))


def blocks(weight: Tensor, r: int = 3) -> dict[tuple[int, int], Tensor]:
    return {
        (p, q): weight[p * r : (p + 1) * r, q * r : (q + 1) * r]
        for p in range(weight.shape[0] // r)
        for q in range(weight.shape[1] // r)
    }


def test_bat_changes_every_block_through_itself() -> None:
    host = hosted(linear(W_BAT), MiSS(rank=3, form="bat"), M=D)
    merged, x, dy = effective(host), matrix(4, 9, seed=6), matrix(4, 6, seed=7)
    for (p, q), block in blocks(merged).items():
        same(block, blocks(W_BAT)[p, q] @ (torch.eye(3) + D[p]) + D[p])
    same(host(x), x @ merged.T)
    G = blocks(dy.T @ x)  # dL/dD_p = Σ_q (W_pqᵀ + I) G_pq
    expected = [sum((blocks(W_BAT)[p, q].T + torch.eye(3)) @ G[p, q] for q in range(3)) for p in range(2)]
    same(grads(host, x, dy)["M"], torch.stack(expected))  # type: ignore[arg-type]


def test_bat_can_be_undone_by_arithmetic_and_is_by_the_kept_bits() -> None:
    host = hosted(linear(W_BAT), MiSS(rank=3, form="bat"), M=D)
    for (p, q), block in blocks(effective(host)).items():
        same((block - D[p]) @ torch.linalg.inv(torch.eye(3) + D[p]), blocks(W_BAT)[p, q], 1e-10)
    x = matrix(4, 9, seed=6)
    y = host(x)
    host.merge()
    same(host(x), y)
    host.unmerge()
    assert torch.equal(host.backbone.weight(SITE).matrix(), W_BAT)


def test_bat_is_merged_and_undone_where_i_plus_d_is_singular_too() -> None:
    host = hosted(linear(W_BAT), MiSS(rank=3, form="bat"), M=-torch.eye(3).expand(2, 3, 3))
    host.merge()
    same(host.backbone.weight(SITE).matrix(), -torch.eye(3, dtype=torch.float64).repeat(2, 3))
    host.unmerge()
    assert torch.equal(host.backbone.weight(SITE).matrix(), W_BAT)


@pytest.mark.parametrize("fields", [{}, {"form": "mini", "mini_rank": 4}, {"form": "bat", "rank": 2}], ids=str)
def test_step_0_is_the_base_and_m_is_all_that_an_adapter_owns(fields: dict[str, object]) -> None:
    host = hosted(linear(W), make_method("miss", **{"rank": 4, **fields}))
    assert torch.equal(host(X), F.linear(X, W))
    adapter = host.adapter("a")
    assert set(tensors(host)) == {"M"} and adapter.layout.frozen_count() == 0
    assert adapter.layout.trainable_count() == {"mini": 4 * 4, "bat": 2 * 8}.get(str(fields.get("form")), 4 * 8)


def test_all_adapters_of_one_rank_have_one_constant_in_memory() -> None:
    host = hosted(linear(W), MiSS(rank=4), M=M)
    host.add("b", MiSS(rank=4), SITE, seed=9, dtype=torch.float64)
    weight = host.backbone.weight(SITE)
    first, second = (host.adapter(name).update(SITE, weight).factors[0].A_RI for name in "ab")  # type: ignore[union-attr]
    assert first.data_ptr() == second.data_ptr()


def test_a_constant_that_a_served_batch_made_can_be_trained_beside() -> None:
    repeated_identity.cache_clear()
    host = hosted(linear(W), MiSS(rank=4), M=M)
    with torch.inference_mode():
        host(X)
    assert not repeated_identity(4, 10, torch.float64, torch.device("cpu")).is_inference()
    assert grads(host, X, DY)["M"].any()


def test_a_stack_of_two_ranks_pads_the_input_for_each_from_the_start() -> None:
    """PEFT pads what the adapter before has padded already."""
    host = hosted(linear(W), MiSS(rank=4), M=M)
    host.add("b", MiSS(rank=3), SITE, dtype=torch.float64)
    second = matrix(3, 8, seed=8)
    host.adapter("b").set(SITE, "M", second)
    host.activate("a", "b")
    same(host(X), X @ W.T + folded(X, 4) @ M + folded(X, 3) @ second)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 11}, "Rank 11 exceeds the 10 inputs"),
        ({"rank": 4, "form": "bat"}, "divides 8 and 10, not 4"),
        ({"rank": 4, "form": "mini", "mini_rank": 3}, "mini_rank 3 does not divide the 8 outputs"),
    ],
    ids=str,
)
def test_a_size_that_does_not_fit_a_site_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        hosted(linear(W), make_method("miss", **fields))


@pytest.mark.parametrize(
    "fields", [{"form": "mini"}, {"mini_rank": 4}, {"form": "bat", "mini_rank": 4}, {"form": "bat", "dropout": 0.1}]
)
def test_settings_of_another_form_are_refused_rather_than_ignored(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="MiSS has"):
        make_method("miss", **fields)
