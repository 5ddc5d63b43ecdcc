"""Kernels in C give what torch's operations give, whatever the batch, and nobody can tell from the numbers of a row."""

from __future__ import annotations

import inspect
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache

from lorica.core.update import LinearUpdate
from lorica.core.update import LowRank as Factors
from lorica.data.example import Example
from lorica.engine import few_rows
from lorica.engine.engine import Engine, Item
from lorica.engine.factors import fold
from lorica.engine.fast import fast_modules
from lorica.engine.groups import groups_of
from lorica.engine.host import Host
from lorica.engine.kv_lane import Kept, Lane
from lorica.engine.native.kernels import LANES, Kernels, LowRank, RowFactors, RowMaps
from lorica.engine.native.passes import Passes
from lorica.engine.native.proved import kernels_for, passes_for
from lorica.engine.sample import generate
from lorica.methods import make_method
from lorica.models.backbone import wrap
from lorica.sampling.logits import Draws, choose
from lorica.sampling.params import SamplingParams
from tests.engine.test_sample import METHODS, SPECS, prompts
from tests.tiny import tiny

DTYPES = [torch.float32, torch.bfloat16]
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
pytestmark = pytest.mark.skipif(kernels_for(torch.float32) is None, reason="there is no C compiler on this machine")


def steps(dtype: torch.dtype = torch.float32) -> Kernels:
    found = kernels_for(dtype)
    assert found is not None
    return found


def passes(dtype: torch.dtype = torch.float32) -> Passes:
    found = passes_for(dtype)
    assert found is not None
    return found


def served(family: str, dtype: torch.dtype, *, native: bool) -> Host:
    """A model whose widths the kernels take, and its adapters."""
    return adapted(Host(tiny(family, dtype=dtype, **SIZES)).set_native(native))


def adapted(host: Host) -> Host:
    """With adapters of every kind of update."""
    for seed, name in enumerate(METHODS):
        adapter = host.add(name, METHODS[name], seed=seed)
        adapter.flat.add_(0.1 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(seed)))
    return host


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_a_mixed_batch_samples_what_it_samples_without_kernels(family: str, dtype: torch.dtype) -> None:
    rows = list(zip(prompts(len(SPECS)), SPECS, strict=True))
    params = SamplingParams(max_tokens=8)
    with_, without = (generate(served(family, dtype, native=native), rows, params) for native in (True, False))
    same = 0
    for one, other in zip(with_, without, strict=True):
        # a greedy choice between near equals may fall otherwise by rounding, and everything behind it with it
        until = next((i for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)) if a != b), 8)
        assert one.logprobs[:until] == pytest.approx(
            other.logprobs[:until], abs=1e-4 if dtype == torch.float32 else 0.1
        )
        same += until
    assert same >= (8 if dtype == torch.float32 else 4) * len(rows)


@pytest.mark.parametrize("method", ["singlora", "miss", "lora_xs", "pissa", "multilora", "lora_fa"])
def test_factors_that_lie_otherwise_in_memory_sample_what_they_sample_without_kernels(method: str) -> None:
    rows = [(prompt, "a") for prompt in prompts(2)]
    found = []
    for native in (True, False):
        host = Host(tiny("qwen3", **SIZES)).set_native(native)
        adapter = host.add("a", make_method(method, rank=4), seed=0)
        adapter.flat.add_(0.1 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(1)))
        found.append(generate(host, rows, SamplingParams(max_tokens=4)))
    for one, other in zip(*found, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_sampling_goes_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for owner, names in ((Kernels, ("norm", "sum_norm", "gate", "turn", "attend", "draw")), (LowRank, ("add",))):
        for name in names:
            own = getattr(owner, name)
            monkeypatch.setattr(owner, name, lambda *a, own=own, name=name, **k: (called.append(name), own(*a, **k))[1])
    rows = [(prompt, name) for prompt, name in zip(prompts(3), ("lora", "wide", None), strict=True)]
    generate(served("qwen3", torch.float32, native=True), rows, SamplingParams(max_tokens=3))
    assert set(called) == {"norm", "sum_norm", "gate", "turn", "attend", "draw", "add"}
    called.clear()
    generate(served("qwen3", torch.float32, native=False), rows, SamplingParams(max_tokens=3))
    assert not called


def lane_of(totals: list[int], prefixes: list[int], gaps: list[int], module: nn.Module, groups: int, dim: int) -> Lane:
    """Rows of several lengths, some behind prefixes that the module leaves out in part."""
    lane, rng = Lane(torch.device("cpu")), torch.Generator().manual_seed(0)
    lane.arrange(len(totals), max(totals) + 4, max(totals) - 1)
    for total, prefix, gap in zip(totals, prefixes, gaps, strict=True):
        pair = [torch.randn(groups, total - gap, dim, generator=rng) for _ in range(2)]
        lane.put(Kept(total, prefix, {module: (pair[0], pair[1])}), total + 4)
    lane.advance()
    return lane


@settings(max_examples=30, deadline=None)
@given(
    totals=st.lists(st.integers(3, 40), min_size=1, max_size=4),
    prefix=st.integers(0, 2),
    gap=st.integers(0, 2),
    window=st.sampled_from([None, 1, 3, 17, 100]),
    heads=st.sampled_from([(1, 1), (2, 1), (6, 2)]),
    dtype=st.sampled_from(DTYPES),
)
def test_attention_sees_the_same_keys(
    totals: list[int], prefix: int, gap: int, window: int | None, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    module, rows, (count, groups) = nn.Identity(), len(totals), heads
    prefixes = [prefix if row % 2 else 0 for row in range(rows)]
    gaps = [min(gap, own) for own in prefixes]
    q, k, v = (torch.randn(rows, n, 1, LANES) for n in (count, groups, groups))
    v = v.to(dtype)
    given_, wanted = (
        lane_of(totals, prefixes, gaps, module, groups, LANES).attend(
            module, q, k, v, sliding_window=window, kernels=kernels
        )
        for kernels in (steps(dtype), None)
    )
    assert torch.allclose(given_.float(), wanted, atol=1e-5 if dtype == torch.float32 else 0.02)


@settings(max_examples=40, deadline=None)
@given(
    vocabulary=st.integers(1, 1500),
    heats=st.lists(st.sampled_from([0.0, 1e-38, 0.1, 1.0, 3.0]), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
)
def test_a_token_is_drawn_as_torch_draws_it(vocabulary: int, heats: list[float], seed: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(len(heats), vocabulary, generator=rng)).to(dtype)
    uniform = [torch.rand((), generator=torch.Generator().manual_seed(i)).item() for i in range(len(heats))]
    tokens, logprobs = steps(dtype).draw(logits, heats, uniform)
    params = [SamplingParams(max_tokens=1, temperature=heat) for heat in heats]
    wide = logits.float().log_softmax(-1)
    wanted = choose(wide, params, [Draws(torch.Generator().manual_seed(i)) for i in range(len(heats))])
    assert logprobs == pytest.approx(wide.gather(1, tokens[:, None])[:, 0], abs=1e-5)
    for row, (token, other, heat) in enumerate(zip(tokens.tolist(), wanted.tolist(), heats, strict=True)):
        if token == other:
            continue
        if heat < 1e-3:  # two logits of one value, which half precision has often
            assert logits[row, token] == logits[row, other]
            continue
        # a number that falls on the border of two tokens, up to rounding
        mass = (wide[row].double() / heat).softmax(-1).cumsum(-1)
        assert abs(mass[min(token, other)] - uniform[row]) < 1e-5


def test_logits_that_are_no_numbers_give_a_log_probability_that_is_none() -> None:
    logits = torch.zeros(3, 40)
    logits[0, 7], logits[1, 3] = math.nan, math.inf
    _, logprobs = steps().draw(logits, [1.0, 0.0, 1.0], [0.5, 0.0, 0.5])
    assert logprobs.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_rows_numbers_do_not_depend_on_the_other_rows_bit_for_bit(threads: int) -> None:
    rng, rows, before = torch.Generator().manual_seed(0), 7, torch.get_num_threads()
    logits = torch.randn(rows, 100_000, generator=rng)
    x, y = torch.randn(rows, 256, generator=rng), torch.randn(rows, 6 * 256, generator=rng)
    factors = [
        RowMaps([RowFactors(torch.randn(40 + row, 256, generator=rng), torch.randn(40 + row, 6 * 256, generator=rng))])
        for row in range(rows)
    ]
    torch.set_num_threads(threads)
    try:
        tokens, logprobs = steps().draw(logits, [1.0] * rows, [0.4] * rows)
        together = y.clone()
        LowRank(steps(), factors, [6 * 256]).add(x, together)
        for row in range(rows):
            own = slice(row, row + 1)
            token, logprob = steps().draw(logits[own], [1.0], [0.4])
            assert (token.item(), logprob.item()) == (tokens[row].item(), logprobs[row].item())
            alone = y[own].clone()
            LowRank(steps(), factors[own], [6 * 256]).add(x[own], alone)
            assert torch.equal(alone, together[own])
    finally:
        torch.set_num_threads(before)


# -- training ----------------------------------------------------------------------------------------------------------


Rows = list[tuple[list[int], str | None]]
BATCHES: dict[str, Rows] = {
    "few": [([5, 6, 7, 8], "lora")],
    "with a bias": [([5, 6, 7], "wide")],
    "some": [(list(range(5, 35)), "lora")],
    "many": [(list(range(5, 45)), "lora"), ([9, 8, 7], None)],
    "mixed": [([*prompt, 9, 4], name) for prompt, name in zip(prompts(9), METHODS, strict=True)],
}


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp_min(1e-6))


def gradients(host: Host, rows: Rows) -> dict[str, Tensor]:
    engine = Engine(host)
    results = engine.forward_backward([Item(Example.whole(ids), name) for ids, name in rows])
    losses = torch.tensor([result.loss for result in results])
    return {"losses": losses} | {name: host.adapter(name).grad.clone() for name in METHODS}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_losses_and_gradients_are_those_without_kernels(family: str, rows: Rows) -> None:
    with_, without = (gradients(served(family, torch.float32, native=native), rows) for native in (True, False))
    for name, wanted in without.items():
        assert distance(with_[name], wanted) < 1e-5, name


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_a_half_precision_base_has_gradients_as_near_to_the_exact_ones_as_without_kernels(
    family: str, rows: Rows
) -> None:
    with_, without = (gradients(served(family, torch.bfloat16, native=native), rows) for native in (True, False))
    exact = wrap(tiny(family, dtype=torch.bfloat16, **SIZES).module.float())
    truth = gradients(adapted(Host(exact).set_native(False)), rows)
    near, far = (distance(whole(own), whole(truth)) for own in (with_, without))
    assert near <= 1.1 * far
    for name, wanted in truth.items():  # without kernels it is up to 0.032
        assert distance(with_[name], wanted) < 0.035, name


def whole(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([part for name, part in found.items() if name != "losses"])


def test_few_rows_of_one_adapter_are_one_call_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    host, seen = served("qwen3", torch.float32, native=True), []
    own = few_rows._FewRows.forward
    monkeypatch.setattr(few_rows._FewRows, "forward", staticmethod(lambda *a: (seen.append(a[5]), own(*a))[1]))
    gradients(host, [([5, 6, 7, 8], "lora")])
    layers = len(host.backbone.blocks)
    assert len(seen) == 4 * layers
    assert seen.count(2) == layers, "what `down` reads is made again from gate and up"


def test_frozen_factors_get_no_gradient_of_few_rows() -> None:
    host = Host(tiny("qwen3", **SIZES))
    adapter = host.add("fa", make_method("lora_fa", rank=4))
    adapter.flat.add_(0.1)
    Engine(host).forward_backward([Item(Example.whole([5, 6, 7, 8]), "fa")])
    kernels = adapter.grad.clone()
    adapter.grad.zero_()
    host.set_native(False)
    Engine(host).forward_backward([Item(Example.whole([5, 6, 7, 8]), "fa")])
    assert (kernels - adapter.grad).norm() < 1e-5 * adapter.grad.norm()
    assert adapter.grad.abs().max() > 0


def test_products_of_few_rows_read_the_weights_themselves_and_larger_ones_a_layout() -> None:
    host = Host(tiny("qwen3", **SIZES))
    group = groups_of(host.executor)[0]
    assert group.maps.few is not None
    for rows in (1, 4, 5):
        x, dy = torch.randn(rows, 64), torch.randn(rows, sum(group.maps.sizes))
        whole = torch.cat(group.maps.dense)
        assert torch.allclose(group.maps.forward(x), x @ whole.T, atol=1e-5)
        assert torch.allclose(group.maps.back(dy), dy @ whole, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), width=st.sampled_from([16, 48, 256]), dtype=st.sampled_from(DTYPES))
def test_norms_and_gates_have_torchs_gradients(rows: int, width: int, dtype: torch.dtype) -> None:
    both = torch.randn(rows, 2 * width).to(dtype)
    gate, up = both.split(width, dim=1)
    dy, factor = torch.randn(rows, width).to(dtype), torch.randn(width)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    x = both[:, :width].float().contiguous().requires_grad_()
    y = torch.nn.functional.rms_norm(x, (width,), factor, 1e-6)
    (dx,) = torch.autograd.grad(y, x, dy.float())
    own = both[:, :width].contiguous()
    got, root = passes(dtype).norm_forth(own, factor, 1e-6, rounded=False)
    assert torch.allclose(got.float(), y, rtol=0.02, atol=tolerance)
    assert torch.allclose(passes(dtype).norm_back(dy, own, factor, root).float(), dx, rtol=0.02, atol=tolerance)
    wide = [part.float().requires_grad_() for part in (gate, up)]
    made = torch.nn.functional.silu(wide[0]) * wide[1]
    wanted = torch.autograd.grad(made, wide, dy.float())
    assert torch.allclose(passes(dtype).gate_forth(gate, up).float(), made, rtol=0.02, atol=tolerance)
    for got, other in zip(passes(dtype).gate_back(dy, gate, up), wanted, strict=True):
        assert torch.allclose(got.float(), other, rtol=0.02, atol=tolerance)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    heads=st.integers(1, 5),
    dim=st.sampled_from([16, 48, 128]),
    normed=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_rotations_have_torchs_gradients(rows: int, heads: int, dim: int, normed: bool, dtype: torch.dtype) -> None:
    x_ND, dy_NHK = torch.randn(rows, (heads + 1) * dim).to(dtype)[:, dim:], torch.randn(heads, rows, dim).to(dtype)
    angles_NK = torch.randn(rows, dim // 2).repeat(1, 2)
    rotations = angles_NK.cos(), angles_NK.sin()
    rotations[1][:, : dim // 2].neg_()
    factor_K = torch.randn(dim) if normed else None
    x = x_ND.float().requires_grad_()
    heads_NHK = x.view(rows, heads, dim)
    if factor_K is not None:
        heads_NHK = torch.nn.functional.rms_norm(heads_NHK, (dim,), factor_K, 1e-6)
    half = torch.cat((-heads_NHK[..., dim // 2 :], heads_NHK[..., : dim // 2]), -1)
    y = heads_NHK * angles_NK.cos()[:, None] + half * angles_NK.sin()[:, None]
    (dx,) = torch.autograd.grad(y, x, dy_NHK.transpose(0, 1).float())
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    got, root = passes(dtype).turn_forth(x_ND, factor_K, rotations, 1e-6)
    assert torch.allclose(got.float(), y, rtol=0.02, atol=tolerance)
    norm = None if factor_K is None or root is None else (x_ND, factor_K, root)
    back = passes(dtype).turn_back(dy_NHK.transpose(0, 1), rotations, norm)
    assert torch.allclose(back.float(), dx, rtol=0.02, atol=tolerance)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_training_turns_heads_by_the_kernels_where_nothing_changes_their_norms(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, seen = served(family, torch.float32, native=True), []
    own = Passes.turn_forth
    monkeypatch.setattr(Passes, "turn_forth", lambda *a: (seen.append(a[3]), own(*a))[1])
    layers = len(host.backbone.blocks)
    gradients(host, [([5, 6, 7, 8], "lora")])
    seen.clear()  # of the probes of a first pass too
    gradients(host, [([5, 6, 7, 8], "lora")])
    assert len(seen) == 2 * layers
    assert all(turn is seen[0] for turn in seen), "made once for all layers"
    seen.clear()
    if family == "qwen3":
        host.add("norms", make_method("norm"))
        gradients(host, [([5, 6, 7, 8], "norms"), ([5, 6, 7], "lora")])
        assert not seen
    host.set_native(False)
    gradients(host, [([5, 6, 7, 8], "lora")])
    assert not seen


def test_an_attention_module_with_a_cache_keeps_its_own_forward() -> None:
    """The stand-in knows no cache, by whatever name it comes."""
    host, ids = served("qwen3", torch.float32, native=True), torch.tensor([[5, 6, 7, 8]])
    parameters, found = inspect.signature(type(host.model).forward).parameters, []
    name = next(known for known in ("cache", "past_key_values") if known in parameters)
    with torch.no_grad():
        for stands in (True, False):
            cache = {name: DynamicCache(config=host.model.config)}
            with fast_modules(host.executor) if stands else nullcontext():
                host.model(ids[:, :2], **cache)
                found.append(host.model(ids[:, 2:], **cache).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_transposed_factor_is_laid_out_for_the_kernels() -> None:
    A_RI, B_OR = torch.randn(32, 4).mT, torch.randn(48, 4)
    folded = fold([LinearUpdate(factors=(Factors(A_RI, B_OR, 2.0),))], None, torch.float32, steps())
    assert folded is not None
    assert folded.pair is not None
    x, y = torch.randn(2, 32), torch.zeros(2, 48)
    LowRank(steps(), [RowMaps([folded.pair])] * 2, [48]).add(x, y)
    assert torch.allclose(y, 2 * x @ A_RI.mT @ B_OR.mT, atol=1e-4)
