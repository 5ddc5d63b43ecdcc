"""Shifted attention is its mask, leaks nothing, and computes no pair that its mask hides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lorica
from lorica.core.errors import ConfigError, MethodError
from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.host import Host
from lorica.engine.shifted import shifted_attention, shifted_rows
from lorica.methods.lora import LoRA
from lorica.methods.prefix import Prefix
from lorica.methods.prompt import Prompt
from lorica.models import tiny
from lorica.models.attention import set_attention
from lorica.models.shifted_attention import Shifted


class Causal(nn.Module):
    is_causal = True


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(length: int, group: int, *, moved: bool) -> Tensor:
    """The mask by its definition, [T, T]."""
    p = torch.arange(length, dtype=torch.float64)
    segment = torch.floor((p + group / 2) / group) if moved else torch.floor(p / group)
    return (segment[:, None] == segment[None]) & (p[None] <= p[:, None])


def brute(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, group: int, window: int | None = None) -> Tensor:
    """One sequence under the mask, with keys repeated before the heads are split, [T, H, K]."""
    tokens, heads, dim = q_THK.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k_TGK, v_TGK))
    mask_HTT = torch.stack([seen(tokens, group, moved=head >= heads // 2) for head in range(heads)])
    if window is not None:
        mask_HTT = mask_HTT & torch.ones(tokens, tokens, dtype=torch.bool).triu(1 - window)
    scores_HTT = torch.einsum("thk,shk->hts", q_THK, k) * dim**-0.5
    return torch.einsum("hts,shk->thk", scores_HTT.masked_fill(~mask_HTT, -torch.inf).softmax(-1), v)


def roll(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, group: int) -> Tensor:
    """The other form of the paper's code, which we do not have: shifted heads are rolled by half a group, and the first
    and the last half group then share one.
    """
    heads, half = q_THK.shape[1], group // 2

    def grouped(x: Tensor) -> Tensor:
        moved = torch.cat([x[:, : heads // 2], x[:, heads // 2 :].roll(-half, 0)], dim=1)
        return moved.unflatten(0, (-1, group)).transpose(1, 2)

    y = torch.nn.functional.scaled_dot_product_attention(*(grouped(x) for x in (q_THK, k_THK, v_THK)), is_causal=True)
    y_THK = y.transpose(1, 2).flatten(0, 1)
    return torch.cat([y_THK[:, : heads // 2], y_THK[:, heads // 2 :].roll(half, 0)], dim=1)


def packed(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, shifted: Shifted, lengths: list[int], **more: Any) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THK, k_TGK, v_TGK))
    return shifted_attention(
        Causal(), q, k, v, shifted, lengths=lengths, prefixes=more.pop("prefixes", [None] * len(lengths)), **more
    )[0]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    heads=st.sampled_from([(4, 1), (4, 2), (4, 4), (6, 3), (6, 2), (3, 3), (5, 1)]),
    group=st.integers(2, 17) | st.none(),
    window=st.none() | st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_packed_sequences_attend_as_the_mask_says_each_by_itself(
    lengths: list[int], heads: tuple[int, int], group: int | None, window: int | None, seed: int
) -> None:
    shifted, total = Shifted(group=group), sum(lengths)
    q, k, v = (rand(total, h, 4, seed=seed + i) for i, h in enumerate((heads[0], heads[1], heads[1])))
    found = packed(q, k, v, shifted, lengths, sliding_window=window)
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    expected = [brute(*part, shifted.group_of(len(part[0])), window) for part in parts]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-12, atol=1e-12)


def test_the_segments_of_sixteen_tokens_in_groups_of_four_are_the_golden_ones() -> None:
    shifted = Shifted(ratio=0.25)
    ids = [i for i, size in enumerate(shifted.segments(16, shifted=True)) for _ in range(size)]
    assert ids == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4]
    assert shifted.segments(16, shifted=False) == [4, 4, 4, 4]


def leaks(attend: Any, length: int = 32, heads: int = 4) -> list[tuple[int, int]]:
    """(changed token, earlier token whose output it moved)."""
    q, k, v = (rand(length, heads, 4, seed=i) for i in range(3))
    before = attend(q, k, v)
    found = []
    for token in range(length):
        other = [x.clone() for x in (q, k, v)]
        for x in other:
            x[token] += 1
        moved = (attend(*other) != before).flatten(1).any(1)
        found += [(token, earlier) for earlier in range(token) if moved[earlier]]
    return found


def test_no_token_changes_an_earlier_one_where_a_roll_would_leak_the_end_into_the_beginning() -> None:
    assert leaks(lambda q, k, v: packed(q, k, v, Shifted(group=8), [32])) == []
    found = leaks(lambda q, k, v: roll(q, k, v, 8))
    assert {earlier for token, earlier in found if token == 31} == {0, 1, 2, 3}


def test_a_roll_is_the_same_everywhere_but_in_shifted_heads_of_the_first_half_group() -> None:
    q, k, v = (rand(32, 4, 8, seed=i) for i in range(3))
    ours, rolled = packed(q, k, v, Shifted(group=8), [32]), roll(q, k, v, 8)
    same = torch.isclose(ours, rolled, rtol=1e-12, atol=1e-12).all(-1)
    assert same[:, :2].all() and same[4:].all()
    assert not same[:4, 2:].any()


def test_an_unshifted_head_is_full_attention_in_its_first_group_and_everywhere_in_one_group() -> None:
    q, k, v = (rand(24, 4, 8, seed=i) for i in range(3))
    full = brute(q, k, v, 10**6)[:, :2]  # one group holds all tokens
    torch.testing.assert_close(packed(q, k, v, Shifted(group=6), [24])[:6, :2], full[:6], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(packed(q, k, v, Shifted(group=24), [24])[:, :2], full, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(packed(q, k, v, Shifted(ratio=1.0), [24])[:, :2], full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("length", "group"), [(64, 16), (48, 12), (32, 8), (8192, 2048)])
def test_the_pairs_of_a_head_are_as_many_as_the_formulas_say(length: int, group: int) -> None:
    plain, moved = Shifted(group=group).pairs(length)
    assert plain == length * (group + 1) // 2
    assert moved == (length - group) * (group + 1) // 2 + group // 2 * (group // 2 + 1)
    if length < 100:
        assert (plain, moved) == tuple(int(seen(length, group, moved=m).sum()) for m in (False, True))
    assert max(plain, moved) < 0.3 * length * (length + 1) // 2


def flops(attend: Any, length: int, heads: int, dim: int) -> int:
    """What the products of a forward and a backward pass compute."""
    q, k, v = (rand(length, heads, dim, seed=i).requires_grad_() for i in range(3))
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        attend(q, k, v).sum().backward()
    return int(counter.get_total_flops())


def test_the_products_of_a_pass_are_those_of_its_segments_alone() -> None:
    length, heads, dim = 512, 4, 16
    dense = flops(lambda q, k, v: packed(q, k, v, Shifted(ratio=1.0), [length])[:, :2], length, heads, dim)
    quarter = flops(lambda q, k, v: packed(q, k, v, Shifted(), [length]), length, heads, dim)
    squares = 2 * 4 * 128**2 + 2 * (2 * 64**2 + 3 * 128**2)  # of segments, over heads, where dense ones have S²
    # queries with keys and weights with values, a multiplication and an addition each; backward has two for each
    assert quarter == squares * dim * 2 * 2 * 3
    whole = 2 * length**2 + 2 * 2 * (length // 2) ** 2  # one group: half of the heads are dense
    assert dense == whole * dim * 2 * 2 * 3
    assert squares < 0.25 * heads * length**2


def attached(shifted: Shifted | None = None, family: str = "llama", **overrides: Any) -> Host:
    host = Host(tiny(family, dtype=torch.float64, **overrides))
    adapter = host.add("a", LoRA(rank=3), dtype=torch.float64)
    adapter.flat += 0.1 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(1)).double()
    host.activate("a")
    return host.set_attention(shifted)


def example(tokens: list[int]) -> Example:
    return Example(tuple(tokens), (0.0, *[1.0] * (len(tokens) - 1)), "row")


def rows(*lengths: int) -> list[list[int]]:
    rng = torch.Generator().manual_seed(3)
    return [torch.randint(3, 120, (length,), generator=rng).tolist() for length in lengths]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gemma2", "gpt2", "qwen3-moe"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_engine_and_padded_rows_of_the_model_itself_agree(family: str, side: str) -> None:
    host = attached(Shifted(group=5), family)
    found, losses = [], []
    data = rows(13, 7, 20)
    results = Engine(host).forward_backward([Item(example(row), "a") for row in data])
    found.append(host.adapter("a").grad.clone())
    host.adapter("a").zero_grad()
    width = max(map(len, data)) - 1
    ids = torch.zeros(len(data), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(data):
        span = slice(0, len(row) - 1) if side == "right" else slice(width - len(row) + 1, width)
        ids[i, span], mask[i, span] = torch.tensor(row[:-1]), 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    host.train()
    y = host(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits.log_softmax(-1)
    for i, row in enumerate(data):
        losses.append(-y[i][mask[i].bool()].gather(1, torch.tensor(row[1:])[:, None]).sum())
    torch.stack(losses).sum().backward()
    assert [float(loss.detach()) for loss in losses] == pytest.approx([r.loss for r in results], rel=1e-6)
    torch.testing.assert_close(host.adapter("a").grad, found[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_every_kernels_mask_is_read_alike(kernel: str) -> None:
    base = tiny("llama")
    set_attention(base.module, kernel)
    host = Host(base)
    host.set_attention(Shifted(group=4)).train()
    ids = torch.tensor(rows(9, 9))
    alone = [host(input_ids=ids[:1, :6], use_cache=False).logits, host(input_ids=ids[1:], use_cache=False).logits]
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    y = host(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(y[0, :6], alone[0][0])
    torch.testing.assert_close(y[1], alone[1][0])


def test_a_mask_of_one_value_a_token_is_read_too() -> None:
    q, k, v = (rand(2, 4, 9, 8, seed=i) for i in range(3))
    mask = torch.ones(2, 9)
    mask[0, :3] = 0
    found = shifted_rows(Causal(), q, k, v, mask, Shifted(group=4), prefixes=[None, None])
    for row, first in ((0, 3), (1, 0)):
        own = (x[row].transpose(0, 1)[first:] for x in (q, k, v))
        torch.testing.assert_close(found[row, first:], brute(*own, 4), rtol=1e-12, atol=1e-12)
    assert not found[0, :3].any()


def test_what_shares_the_batch_changes_nothing() -> None:
    host = attached(Shifted(group=6))
    alone = [Engine(host).forward_backward([Item(example(row), "a")])[0] for row in rows(11, 30, 6)]
    together = Engine(host).forward_backward([Item(example(row), "a") for row in rows(11, 30, 6)])
    assert [r.loss for r in together] == pytest.approx([r.loss for r in alone], rel=1e-9)


def test_evaluation_and_sampling_are_dense() -> None:
    plain, shifted = attached(), attached(Shifted(group=4))
    items = [example(row) for row in rows(17, 24)]
    losses = [[r.loss for r in Engine(host).forward([Item(e, "a") for e in items])] for host in (plain, shifted)]
    assert losses[0] == losses[1]
    trained = [
        [r.loss for r in Engine(host).forward_backward([Item(e, "a") for e in items])] for host in (plain, shifted)
    ]
    assert trained[0] == pytest.approx(losses[0], rel=1e-9) and trained[1] != pytest.approx(losses[0], rel=1e-4)
    ids = torch.tensor(rows(20))
    assert torch.equal(plain.eval()(input_ids=ids).logits, shifted.eval()(input_ids=ids).logits)
    assert not torch.equal(plain.train()(input_ids=ids).logits, shifted.train()(input_ids=ids).logits)
    shifted.set_attention(None)
    assert torch.equal(plain(input_ids=ids).logits, shifted(input_ids=ids).logits)


def test_step_0_is_the_base_under_the_same_groups() -> None:
    host = Host(tiny("llama", dtype=torch.float64))
    host.add("a", LoRA(rank=3), dtype=torch.float64)
    host.set_attention(Shifted(group=4)).train()
    ids = torch.tensor(rows(20))
    base = host(input_ids=ids).logits
    host.activate("a")
    assert torch.equal(host(input_ids=ids).logits, base)


def test_checkpointing_recomputes_with_the_same_groups() -> None:
    grads = []
    for checkpointed in (False, True):
        host = attached(Shifted(group=4))
        if checkpointed:
            host.checkpointing()
        Engine(host).forward_backward([Item(example(row), "a") for row in rows(17, 9)])
        grads.append(host.adapter("a").grad.clone())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", [Prefix(tokens=3), Prompt(tokens=3)], ids=["prefix", "prompt"])
def test_virtual_tokens_stand_before_groups_alike_in_the_engine_and_the_model(method: Any) -> None:
    host = Host(tiny("llama", dtype=torch.float64)).set_attention(Shifted(group=4))
    adapter = host.add("a", method, dtype=torch.float64)
    adapter.flat += 0.5
    host.activate("a")
    row = rows(15)[0]
    result = Engine(host).forward_backward([Item(example(row), "a")])[0]
    host.train()
    y = host(input_ids=torch.tensor([row[:-1]]), use_cache=False).logits[0].log_softmax(-1)
    assert float(-y.detach().gather(1, torch.tensor(row[1:])[:, None]).sum()) == pytest.approx(result.loss, rel=1e-6)


def test_every_group_sees_a_prefix() -> None:
    q, k, v = rand(12, 4, 8), rand(12, 1, 8, seed=1), rand(12, 1, 8, seed=2)
    prefix = (rand(2, 1, 8, seed=3), rand(2, 1, 8, seed=4))
    found = packed(q, k, v, Shifted(group=4), [12], prefixes=[prefix])
    last = packed(q[8:], k[8:], v[8:], Shifted(ratio=1.0), [4], prefixes=[prefix])
    torch.testing.assert_close(found[8:, :2], last[:, :2], rtol=1e-12, atol=1e-12)
    without = packed(q, k, v, Shifted(group=4), [12])
    assert not torch.isclose(found, without).all(-1).any()


def test_a_model_whose_attention_cannot_be_shifted_is_refused() -> None:
    with pytest.raises(MethodError, match="not causal"):
        Host(tiny("bert")).set_attention(Shifted())
    with pytest.raises(MethodError, match="none to shift"):
        Host(tiny("mlp")).set_attention(Shifted())
    with pytest.raises(MethodError, match="one head"):
        Host(tiny("llama", num_attention_heads=1, num_key_value_heads=1)).set_attention(Shifted())
    assert Host(tiny("mlp")).set_attention(None)


def test_passes_that_are_no_whole_causal_sequences_are_refused() -> None:
    q, k = rand(1, 4, 1, 8), rand(1, 4, 9, 8)
    with pytest.raises(MethodError, match="no KV cache"):
        shifted_rows(Causal(), q, k, k, None, Shifted(group=4), prefixes=[None])
    with pytest.raises(MethodError, match="cannot read this kernel's mask"):
        shifted_rows(Causal(), k, k, k, object(), Shifted(group=4), prefixes=[None])
    host = attached(Shifted(group=4)).train()
    ids = torch.tensor(rows(10))
    two = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])  # transformers keeps two such sequences of a row apart
    with pytest.raises(MethodError, match="one causal sequence a row"):
        host(input_ids=ids, position_ids=two, use_cache=False)


def test_detaching_leaves_dense_attention_behind() -> None:
    host = attached(Shifted(group=4))
    ids = torch.tensor(rows(20))
    base = host.detach()
    base.module.train()
    assert torch.equal(base.module(input_ids=ids).logits, attached().detach().module(input_ids=ids).logits)


@pytest.mark.parametrize(
    "wrong", [{"group": 1}, {"ratio": 0.0}, {"ratio": 1.5}, {"group": 4, "ratio": 0.5}, {"kind": "x"}]
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Shifted(**wrong)


def test_the_public_name_is_that_of_the_host() -> None:
    host = lorica.attach(tiny("llama"), LoRA(rank=2))
    assert host.set_attention(Shifted()) is host
