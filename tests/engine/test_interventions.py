"""Interventions on a host's passes: what they do, to whom, in which order, and that nothing is left of them."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from lorica.adapters.analysis.directions import Directions, random_like
from lorica.adapters.analysis.directions_rank1 import rank_ones
from lorica.core.errors import MergeError, MethodError, MismatchError, RouteError, TargetError
from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.host import Host
from lorica.engine.interventions import adapter_steer, adapter_turn, adapter_zero, project_out, steer
from lorica.engine.recording import Seen, record_means
from lorica.engine.sample import generate
from lorica.methods.dora import DoRA
from lorica.methods.ia3 import IA3
from lorica.methods.lora import LoRA
from lorica.methods.norm import Norm
from lorica.methods.prefix import Prefix
from lorica.methods.prompt import Prompt
from lorica.models.backbone import freeze
from lorica.models.factory import make_tiny
from lorica.sampling.params import SamplingParams

IDS = torch.tensor([[3, 4, 5, 6, 7], [9, 8, 7, 6, 5]])
FAMILIES = ["llama", "qwen3", "gemma", "gpt2", "qwen3-moe"]
DOWN = {"include": ("down_proj",)}


def noisy(host, name, method, targets=None, seed=0, size=0.3):
    adapter = host.add(name, method, targets, seed=seed)
    adapter.flat.add_(size * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(seed)))
    return adapter


def served(family="llama", dtype=torch.float64, **overrides):
    host = Host(make_tiny(family, **overrides))
    freeze(host.model.to(dtype))  # experts have no grouped product in float64
    host.backbone.refresh()
    noisy(host, "one", LoRA(rank=1, alpha=2.0), {"gpt2": "c_proj", "qwen3-moe": "o_proj"}.get(family, "down_proj"))
    noisy(host, "wide", LoRA(rank=4), seed=1)
    return host


def some(host, seed=0, layers=None, size=1.0):
    width, rng = host.backbone.sites["input"].shape[0], torch.Generator().manual_seed(seed)
    layers = list(host.backbone.blocks) if layers is None else layers
    return Directions({n: size * torch.randn(width, generator=rng, dtype=torch.float64) for n in layers})


def states(host, ids=IDS):
    """The blocks' outputs of a pass of the model, by layer."""
    found = {}
    handles = [
        block.register_forward_hook(
            lambda module, args, output, n=n: found.update({n: output[0] if isinstance(output, tuple) else output})
        )
        for n, block in host.backbone.blocks.items()
    ]
    with torch.no_grad():
        logits = host(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    return found, logits


def footprint(host):
    """All that an intervention could leave behind."""
    return (
        {name: (len(m._forward_hooks), len(m._forward_pre_hooks), m.__dict__.get("forward"))
         for name, m in host.model.named_modules()},
        host.executor.muted, host.active,
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_a_layer_adds_the_vector_there_and_leaves_the_layers_before(family):
    host = served(family)
    host.activate("wide")
    before, _ = states(host)
    directions = some(host, layers=[1])
    with steer(host, directions, 3.0):
        after, _ = states(host)
    assert torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1], before[1] + 3.0 * directions.vectors[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_projecting_out_leaves_nothing_along_the_direction_at_any_layer(family):
    host = served(family)
    directions = some(host)
    with project_out(host, directions):
        found, _ = states(host)
    for layer, h in found.items():
        assert (h @ directions.unit(layer)).abs().max() < 1e-13


def test_interventions_compose_in_the_order_of_entering_and_leave_nothing():
    host = served()
    host.activate("one")
    directions, other = some(host), some(host, seed=5)
    print_before, (plain, logits) = footprint(host), states(host)
    with steer(host, directions, 2.0), project_out(host, directions):
        out, _ = states(host)
    with project_out(host, directions), steer(host, directions, 2.0):
        back, _ = states(host)
    for n in directions.layers:
        unit, v = directions.unit(n), directions.vectors[n]
        assert (out[n] @ unit).abs().max() < 1e-13
        torch.testing.assert_close(back[n] @ unit, torch.full(IDS.shape, (2.0 * v @ unit).item(), dtype=v.dtype))
    with ExitStack() as inside:
        for context in (adapter_zero(host, "one"), steer(host, other, 4.0), adapter_turn(host, "one", 0.5),
                        project_out(host, directions), adapter_steer(host, "one", -3.0)):  # fmt: skip
            inside.enter_context(context)
        assert not torch.equal(states(host)[1], logits)
    assert footprint(host) == print_before
    after, again = states(host)
    assert torch.equal(again, logits) and all(torch.equal(after[n], plain[n]) for n in plain)


def test_steering_forth_and_back_is_the_identity_up_to_rounding():
    host, directions = served(), None
    directions = some(host)
    _, logits = states(host)
    with steer(host, directions, 6.0), steer(host, directions, -6.0):
        torch.testing.assert_close(states(host)[1], logits, rtol=1e-12, atol=1e-12)


def test_an_exception_inside_restores_everything():
    host = served()
    before = footprint(host)
    with pytest.raises(KeyError), steer(host, some(host), 1.0), adapter_zero(host), adapter_steer(host, "one", 1.0):
        raise KeyError
    assert footprint(host) == before


METHODS = {
    "lora": LoRA(rank=4), "one": LoRA(rank=1), "dora": DoRA(rank=2), "ia3": IA3(), "norm": Norm(),
    "prefix": Prefix(tokens=3), "soft": Prompt(tokens=2), "biased": LoRA(rank=2, lora_bias=True),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(METHODS))
def test_silencing_every_adapter_is_the_base_bit_for_bit(name):
    """In the model's own pass, in the engine's packed one, and in sampling."""
    host = Host(make_tiny("qwen3"))
    noisy(host, name, METHODS[name])
    row, params = ([4, 5, 6, 7], name), SamplingParams(max_tokens=6, temperature=1.0)
    item = Example.whole([4, 5, 6, 7, 8, 9])
    with host.disabled(), torch.no_grad():
        base = host(input_ids=IDS).logits
    scored = Engine(host).forward([Item(item, None)])[0].logprobs
    sampled = generate(host, [(row[0], None)], params)[0]
    host.activate(name)
    with torch.no_grad():
        assert not torch.equal(host(input_ids=IDS).logits, base)
        with adapter_zero(host):
            assert torch.equal(host(input_ids=IDS).logits, base)
    with adapter_zero(host, name):
        assert (Engine(host).forward([Item(item, name)])[0].logprobs == scored).all()
        assert generate(host, [row], params)[0] == sampled
    assert generate(host, [row], params)[0] != sampled


def test_silencing_at_some_sites_is_the_adapter_without_these_sites():
    host = served()
    lone = noisy(host, "lone", LoRA(rank=1, alpha=2.0), {"include": "down_proj", "layers": "0"})
    one = host.adapter("one")
    for site in lone.layout.sites:
        for param, value in one.values(site).items():
            lone.set(site, param, value)
    host.activate("lone")
    _, wanted = states(host)
    host.activate("one")
    with adapter_zero(host, one, targets={"include": "down_proj", "layers": "1"}):
        assert torch.equal(states(host)[1], wanted)
    with pytest.raises(TargetError), adapter_zero(host, "one", targets="q_proj"):
        pass
    with pytest.raises(RouteError, match="'two'"):
        adapter_zero(host, "two")


def test_an_adapter_that_is_merged_into_the_weights_cannot_be_silenced():
    host = served()
    host.merge("one")
    for context in (adapter_zero(host, "one"), adapter_steer(host, "one", 1.0)):
        with pytest.raises(MergeError, match="'one' is merged into the weights"), context:
            pass
    host.unmerge()
    with adapter_zero(host, "one"):
        assert host.executor.muted


def test_what_an_adapter_writes_is_its_scalar_along_its_direction():
    """`adapter_turn` by nothing is the adapter itself, and at ε = 1 what is written is as long and orthogonal."""
    host = served()
    host.activate("one")
    site, one = next(iter(rank_ones(host.adapter("one"), host.backbone).items()))
    down, written = host.backbone.module_of(site), {}
    x = torch.randn(7, down.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        base = down.weight.double() @ x.T
        for epsilon in (None, 0.0, 1.0):
            if epsilon is None:
                written[epsilon] = down(x) - base.T
            else:
                with adapter_turn(host, "one", epsilon):
                    written[epsilon] = down(x) - base.T
    torch.testing.assert_close(written[None].norm(dim=-1), one.scalars(x).abs(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(written[0.0], written[None], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(written[1.0].norm(dim=-1), written[None].norm(dim=-1), rtol=1e-6, atol=1e-9)
    assert (written[1.0] @ one.write_O).abs().max() < 1e-9


def test_steering_an_adapter_writes_one_length_at_every_token_of_its_rows():
    host = served()
    site, one = next(iter(rank_ones(host.adapter("one"), host.backbone).items()))
    outputs = []
    for kappa in (5.0, -5.0):
        with host.rows(["one", "wide"]), torch.no_grad(), adapter_zero(host), adapter_steer(host, "one", kappa):
            down = host.backbone.module_of(site)
            handle = down.register_forward_hook(lambda m, a, output: outputs.append((a[0], output)))
            host(input_ids=IDS)
            handle.remove()
        x, y = outputs.pop()
        rest = y - x @ down.weight.double().T
        torch.testing.assert_close(rest[0], (kappa * one.write_O).expand_as(rest[0]), rtol=0, atol=1e-12)
        assert rest[1].abs().max() < 1e-12


@pytest.mark.parametrize("adapters", [("one", "wide", None), (("one", "wide"), "one", "wide")])
def test_an_intervention_for_one_adapter_spares_the_rows_of_others(adapters):
    host = served(dtype=torch.float32)
    items = [Item(Example.whole([3, 4, 5, 6, 7 + i, 9]), spec) for i, spec in enumerate(adapters)]
    plain = Engine(host).forward(items)
    with steer(host, some(host), 2.0, whose="one"):
        found = Engine(host).forward(items)
    for spec, before, after in zip(adapters, plain, found, strict=True):
        touched = "one" in (spec if isinstance(spec, tuple) else (spec,))
        assert (abs(before.logprobs - after.logprobs).max() > 1e-3) == touched
        assert touched or before.logprobs == pytest.approx(after.logprobs, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe"])
def test_ablating_then_sampling_gives_the_tokens_that_the_ablated_model_gives(family):
    """Prompts in packed passes, tokens behind kept keys, soft prompts and mixed rows: all meet the intervention."""
    host = served(family, dtype=torch.float32)
    noisy(host, "soft", Prompt(tokens=3), seed=4)
    specs = ["one", None, "wide", "soft", ("soft", "one")]
    rows = [([4 + i, 5, 6 + i, 7][: 2 + i % 3], spec) for i, spec in enumerate(specs)]
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=2)
    directions = some(host, size=3.0)
    plain = generate(host, rows, params)
    with project_out(host, directions), steer(host, some(host, seed=8), 0.7, layers=[0]), adapter_turn(host, "one"):
        found = generate(host, rows, params)
        for (prompt, spec), sample in zip(rows, found, strict=True):
            whole = Engine(host).forward([Item(Example.whole([*prompt, *sample.tokens]), spec)])[0]
            assert whole.logprobs[-6:] == pytest.approx(torch.tensor(sample.logprobs).numpy(), abs=1e-4)
    assert [s.tokens for s in found] != [s.tokens for s in plain]
    assert generate(host, rows, params) == plain


def test_the_direction_of_one_fine_tune_is_taken_out_of_another():
    host = served(dtype=torch.float32)
    rows = [Seen([3, 4, 5, 6], [True] * 4, name) for name in ("one", "wide")]
    first, second = (record_means(host, [row]) for row in rows)
    directions = Directions({n: first[n].mean - second[n].mean for n in first})
    params = SamplingParams(max_tokens=5)
    with project_out(host, directions):
        assert generate(host, [([3, 4], "wide")], params)[0].logprobs
        means = record_means(host, [rows[1]])
    for n in directions.layers:
        assert abs(float(means[n].mean @ directions.unit(n))) < 1e-5 * float(means[n].mean.norm())


def test_training_under_an_intervention_has_gradients_of_the_changed_pass():
    host = served(dtype=torch.float64)
    directions, item = some(host), Item(Example.whole([3, 4, 5, 6]), "one")
    with steer(host, directions, 1.0):
        adapter = host.adapter("one").to(dtype=torch.float64)
        Engine(host).forward_backward([item])
        grad = adapter.grad.clone()
        step, found = 1e-3 * grad / grad.norm(), []
        for sign in (1, -2):
            adapter.flat.add_(sign * step)
            found.append(Engine(host).forward([item])[0].loss)
    assert (found[0] - found[1]) / 2e-3 == pytest.approx(float(grad.norm()), rel=1e-3)


def test_directions_that_do_not_fit_the_model_are_one_sentence():
    host = served()
    fits = some(host)
    deep, narrow = Directions({7: fits.vectors[0]}), Directions({0: torch.ones(3)})
    foreign = Directions(fits.vectors, {"base": {"name": "another", "fingerprint": "0" * 16}})
    for wrong, said in ((deep, "layer 7.*layers 0 to 1"), (narrow, "has 3 values"), (foreign, "made on 'another'")):
        with pytest.raises(MismatchError, match=said), steer(host, wrong, 1.0):
            pass
    with pytest.raises(MethodError, match="direction of layer 1 is zero"):
        project_out(host, Directions({1: torch.zeros(64)}))
    with pytest.raises(MethodError, match="no direction of layer 5"):
        steer(host, fits, 1.0, layers=[5])
    with pytest.raises(MethodError, match=r"writes? one direction \(rank 4\)"), adapter_steer(host, "wide", 1.0):
        pass
    with pytest.raises(MethodError, match="one list of blocks.*has none"), steer(Host(make_tiny("mlp")), fits, 1.0):
        pass
    assert random_like(fits).norms() == pytest.approx(fits.norms())
