"""Recorders: means of block outputs over the tokens that count, whatever the batch looks like, and rank-1 scalars."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.adapters.analysis.directions import mean_difference
from lorica.adapters.analysis.directions_rank1 import rank_ones
from lorica.core.errors import DataError, MethodError, RouteError, TargetError
from lorica.engine import recording
from lorica.engine.host import Host
from lorica.engine.interventions import project_out
from lorica.engine.recording import MeanRecorder, Seen, record_means, record_scalars
from lorica.methods.dora import DoRA
from lorica.methods.lora import LoRA
from lorica.methods.prefix import Prefix
from lorica.methods.prompt import Prompt
from lorica.models.factory import make_tiny

FAMILIES = ["llama", "qwen3", "gemma", "gpt2", "qwen3-moe"]


def served(family="llama", dtype=torch.float32):
    host = Host(make_tiny(family))
    host.model.to(dtype)
    host.backbone.refresh()
    down = "c_proj" if family == "gpt2" else ("o_proj" if family == "qwen3-moe" else "down_proj")
    for seed, (name, method, targets) in enumerate(
        (("one", LoRA(rank=1, alpha=3.0), down), ("wide", LoRA(rank=4), None), ("soft", Prompt(tokens=3), None),
         ("prefix", Prefix(tokens=2), None))
    ):  # fmt: skip
        adapter = host.add(name, method, targets, seed=seed, dtype=dtype)
        noise = torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        adapter.flat.add_(0.3 * noise)
    return host


def rows(count=5, seed=0, adapters=("one", None, "wide", "soft", "prefix")):
    rng = torch.Generator().manual_seed(seed)
    found = []
    for k in range(count):
        tokens = torch.randint(3, 100, (2 + (3 * k) % 7,), generator=rng).tolist()
        found.append(Seen(tokens, [(i + k) % 3 > 0 for i in range(len(tokens))], adapters[k % len(adapters)]))
    return found


def by_hand(host, seen):
    """Block outputs of each row alone in the model's own pass, and their mean over the tokens that count."""
    total, count = {}, 0
    for row in seen:
        found = {}
        handles = [
            block.register_forward_hook(
                lambda m, a, output, n=n, found=found: found.update(
                    {n: output[0] if isinstance(output, tuple) else output}
                )
            )
            for n, block in host.backbone.blocks.items()
        ]
        with host.rows([row.adapter]), torch.no_grad():
            host(input_ids=torch.tensor([list(row.tokens)]))
        for handle in handles:
            handle.remove()
        kept = torch.tensor(row.counts)
        for n, h in found.items():
            total[n] = total.get(n, 0) + h[0, -len(row.tokens) :][kept].double().sum(0)
        count += int(kept.sum())
    return {n: value / count for n, value in total.items()}, count


@pytest.mark.parametrize("family", FAMILIES)
def test_means_of_packed_mixed_rows_are_those_of_each_row_alone(family):
    host, seen = served(family), rows()
    means, (wanted, count) = record_means(host, seen), by_hand(host, seen)
    assert sorted(means) == sorted(wanted) == list(host.backbone.blocks)
    for n, mean in means.items():
        assert mean.count == count
        torch.testing.assert_close(mean.mean, wanted[n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_on_either_side_changes_no_mean(family, side):
    """Tokens, mask and attention mask padded to one length, in the model's own pass."""
    host, seen = served(family, torch.float64), rows(adapters=("one",))
    width = max(len(row.tokens) for row in seen)

    def padded(values, filler):
        extra = [filler] * (width - len(values))
        return [*extra, *values] if side == "left" else [*values, *extra]

    ids = torch.tensor([padded(row.tokens, 0) for row in seen])
    real = torch.tensor([padded([1] * len(row.tokens), 0) for row in seen])
    recorder = MeanRecorder(host)
    host.activate("one")
    with torch.no_grad(), recorder.watching(torch.tensor([padded(row.counts, False) for row in seen])):
        host(input_ids=ids, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp_min(0))
    wanted, count = by_hand(host, seen)
    for n, mean in recorder.means.items():
        assert mean.count == count
        torch.testing.assert_close(mean.mean, wanted[n], rtol=1e-10, atol=1e-12)


def test_virtual_tokens_before_the_real_ones_never_count():
    host, seen = served(dtype=torch.float64), rows(adapters=("soft",))[-1]
    recorder = MeanRecorder(host)
    host.activate("soft")
    with torch.no_grad(), recorder.watching(torch.tensor([seen.counts])):
        host(input_ids=torch.tensor([seen.tokens]))
    wanted, _ = by_hand(host, [seen])
    for found in (recorder.means, record_means(host, [seen])):
        torch.testing.assert_close(found[1].mean, wanted[1])


@settings(max_examples=8)
@given(budget=st.integers(1, 40), cut=st.integers(1, 4))
def test_means_do_not_depend_on_how_rows_are_cut_into_passes_or_shards(budget, cut):
    host, seen = HOST, rows()
    whole = record_means(host, seen)
    recorder = MeanRecorder(host)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "TOKEN_BUDGET", budget)
        recorder.read(seen[:cut]).read(seen[cut:])
    for n, mean in recorder.means.items():
        assert mean.count == whole[n].count
        torch.testing.assert_close(mean.mean, whole[n].mean, rtol=1e-10, atol=1e-12)


HOST = served(dtype=torch.float64)


def test_a_difference_of_equal_rows_is_zero_and_swapping_the_sides_changes_its_sign():
    first, second = record_means(HOST, rows(3)), record_means(HOST, rows(4, seed=1))
    assert not mean_difference(record_means(HOST, rows(3)), first).vectors[1].any()
    forth, back = mean_difference(first, second), mean_difference(second, first)
    assert all(torch.equal(forth.vectors[n], -back.vectors[n]) for n in forth.layers)


def test_inside_an_intervention_the_changed_states_are_recorded():
    directions = mean_difference(record_means(HOST, rows(3)), record_means(HOST, rows(4, seed=1)))
    with project_out(HOST, directions):
        means = record_means(HOST, rows())
    assert all(abs(float(means[n].mean @ directions.unit(n))) < 1e-12 for n in directions.layers)


def test_only_the_layers_that_were_asked_for_are_recorded():
    found = record_means(HOST, rows(2), [1])
    assert list(found) == [1]
    torch.testing.assert_close(found[1].mean, record_means(HOST, rows(2))[1].mean)
    with pytest.raises(MethodError, match="layers of 'tiny-llama' are 0 to 1, and layer 2 is not one"):
        MeanRecorder(HOST, [0, 2])
    with pytest.raises(MethodError, match="none was named"):
        MeanRecorder(HOST, [])


def test_recording_leaves_no_hook_and_an_error_leaves_the_means_as_they_were():
    recorder = MeanRecorder(HOST).read(rows(2))
    before = {n: mean.total_D.clone() for n, mean in recorder.means.items()}
    wrong = [
        (DataError, "token id 9999", Seen([5, 9999], [True, True])),
        (DataError, "2 tokens and 1 marks", Seen([5, 6], [True])),
        (DataError, "0 tokens", Seen([], [])), (RouteError, "no adapter 'two'", Seen([5], [True], "two")),
    ]  # fmt: skip
    for error, said, row in wrong:
        with pytest.raises(error, match=said):
            recorder.read([*rows(2), row])
    with pytest.raises(MethodError, match="ran 2 times where one pass"), recorder.watching(torch.ones(1, 3)):
        for _ in range(2):
            HOST(input_ids=torch.tensor([[3, 4, 5]]))
    with pytest.raises(MethodError, match="2 rows of 9 tokens"), recorder.watching(torch.ones(2, 9)):
        HOST(input_ids=torch.tensor([[3, 4, 5]]))
    assert all(torch.equal(recorder.means[n].total_D, value) for n, value in before.items())
    assert not any(module._forward_hooks for module in HOST.backbone.blocks.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scalar_is_the_signed_length_of_what_the_adapter_writes(family):
    """|c_t| is the norm of the change of the site's output, at each site with the inputs that it has there."""
    host, seen = served(family), [Seen(row.tokens, row.counts, "one") for row in rows()]
    sites, found = record_scalars(host, seen, "one")
    ones = rank_ones(host.adapter("one"), host.backbone)
    assert sites == tuple(ones) and len(sites) == len(host.adapter("one").layout.sites)
    for row, scalars_TK in zip(seen, found, strict=True):
        assert scalars_TK.shape == (len(row.tokens), len(sites))
        for column, site in enumerate(sites):
            module, io = host.backbone.module_of(site), []
            handle = module.register_forward_hook(lambda m, args, output, io=io: io.append((args[0], output)))
            with host.rows(["one"]), torch.no_grad():
                host(input_ids=torch.tensor([row.tokens]))
            handle.remove()
            x, y = io[0]
            with host.disabled(), torch.no_grad():
                change = (y - module(x))[0].double()
            torch.testing.assert_close(scalars_TK[:, column].abs(), change.norm(dim=-1), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(scalars_TK[:, column, None] * ones[site].write_O, change, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("k", [0.25, 3.0, -1.0, -2.0])
def test_scaling_a_against_b_keeps_scalars_up_to_their_sign(k):
    host, seen = served(dtype=torch.float64), rows(adapters=("one",))
    _, before = record_scalars(host, seen, "one")
    for site in host.adapter("one").layout.sites:
        for param, value in host.adapter("one").values(site).items():
            value.mul_(k if param == "A" else 1 / k)
    _, after = record_scalars(host, seen, "one")
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(other, one if k > 0 else -one)


def test_scalars_of_rows_that_another_adapter_reads_and_of_some_sites():
    host = served()
    one = host.adapter("one")
    seen = [Seen([3, 4, 5], [True] * 3, ("soft", "one")), Seen([3, 4, 5], [True] * 3, "wide")]
    sites, found = record_scalars(host, seen, one, targets={"include": "down_proj", "layers": "1"})
    assert sites == ("model.layers.1.mlp.down_proj",) and all(f.isfinite().all() and f.any() for f in found)
    assert not torch.equal(found[0], found[1])
    twice = record_scalars(host, [seen[0], seen[1], seen[0]], one)[1]
    torch.testing.assert_close(twice[0], twice[2])
    with pytest.raises(TargetError):
        record_scalars(host, seen, one, targets="q_proj")


def test_what_is_not_one_direction_is_one_sentence():
    host = served()
    with pytest.raises(MethodError, match=r"does more at site .* than write one direction \(rank 4\)"):
        record_scalars(host, rows(1), "wide")
    with pytest.raises(MethodError, match="kind 'input' has no scalar"):
        record_scalars(host, rows(1), "soft")
    host.add("dora", DoRA(rank=1), "down_proj")
    with pytest.raises(MethodError, match="does more at site"):
        record_scalars(host, rows(1), "dora")
    host.add("new", LoRA(rank=1), "down_proj")
    with pytest.raises(MethodError, match="writes nothing at site .* B is zero"):
        record_scalars(host, rows(1), "new")
