"""AQN: the schedule's table, noise that multiplies, does not add up, and belongs to one tenant's rollouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lorica.client.local import Service
from lorica.client.noise import RolloutNoise
from lorica.core.errors import ConfigError, TargetError
from lorica.data.example import Example
from lorica.engine import commands
from lorica.engine.host import Host
from lorica.engine.sample import generate
from lorica.methods.aqn import AQN, schedule
from lorica.methods.lora import LoRA
from lorica.sampling.params import SamplingParams
from tests.engine.service import Service as Engines
from tests.engine.service import sample
from tests.tiny import tiny

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
ROW = Example((5, 6, 7, 8, 9, 10), (0.0, 1.0, 1.0, 1.0, 1.0, 1.0), "row")


@pytest.mark.parametrize(
    ("step", "sigma"),
    [*((s, 0.0) for s in range(10)), (10, 1e-2), (20, 5.62e-3), (50, 1e-3), (89, 1.78e-4)]
    + [(step, 1e-4) for step in (90, 95, 99, 100, 10**9)],
)
def test_the_schedule_is_the_published_table(step: int, sigma: float) -> None:
    assert schedule(step, 100, start=1e-2, end=1e-4, stages=10) == pytest.approx(sigma, rel=2e-3)
    assert schedule(step, 100) == schedule(step, 100, start=1e-2, end=1e-4, stages=10)


def test_three_stages_are_none_start_and_end() -> None:
    assert [schedule(step, 3, start=5e-2, end=5e-4, stages=3) for step in range(4)] == [0.0, 5e-2, 5e-4, 5e-4]


@pytest.mark.parametrize(
    "wrong",
    [{"stages": 2}, {"stages": 1}, {"start": 0.0}, {"end": -1.0}, {"start": float("nan")}, {"step": -1}, {"steps": 0}],
)
def test_a_schedule_that_is_none_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        schedule(**{"step": 0, "steps": 10, **wrong})  # type: ignore[arg-type]


def noisy(sigma: float, family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64) -> Host:
    host = Host(tiny(family, dtype=dtype))
    host.add("noise", AQN(sigma=sigma), seed=seed, dtype=torch.promote_types(dtype, torch.float32))
    host.activate("noise")
    return host


@pytest.mark.parametrize(("family", "offset"), [("llama", 0.0), ("gemma", 1.0)])
def test_noise_on_a_norm_multiplies_the_columns_of_the_maps_behind_it(family: str, offset: float) -> None:
    host = noisy(0.05, family)
    adapter, base = host.adapter("noise"), tiny(family, dtype=torch.float64)
    y = host(input_ids=IDS).logits
    behind = {"input_layernorm": ("self_attn", "qkv"), "post_attention_layernorm": ("mlp", ("gate", "up"))}
    for layer in range(2):
        for norm, (block, maps) in behind.items():
            site = f"model.layers.{layer}.{norm}"
            factor = 1 + adapter.tensors(site)["noise"] / (offset + base.weight(site).matrix())
            for name in maps:
                base.weight(f"model.layers.{layer}.{block}.{name}_proj").matrix().mul_(factor)
    last = base.module.get_submodule("model.norm")
    last.weight.data.add_(adapter.tensors("model.norm")["noise"])  # its map is the head, which may be tied
    base.invalidate()
    # norms of transformers models are in float32 whatever the weights are
    torch.testing.assert_close(base.module(input_ids=IDS).logits, y, rtol=1e-5, atol=1e-5)


def test_no_noise_is_the_base_bit_for_bit() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        host = noisy(0.0, dtype=dtype)
        y = host(input_ids=IDS).logits
        with host.disabled():
            assert torch.equal(host(input_ids=IDS).logits, y)


def difference(host: Host, name: str, site: str) -> Tensor:
    """w − w_clean of one norm."""
    adapter, weight = host.adapter(name), host.backbone.weight(site)
    update = adapter.update(site, weight)
    return update.effective(weight.matrix().float()).detach() - weight.matrix().float()  # type: ignore[union-attr]


def test_draws_do_not_add_up() -> None:
    service = Service(tiny("llama", hidden_size=1024, num_hidden_layers=1))
    sites = [site.name for site in service.host.backbone.sites.values() if site.kind == "norm"]
    before = {name: t.clone() for name, t in service.host.model.state_dict().items()}
    noise = RolloutNoise(service, None, steps=30, start=2e-2, end=2e-2, stages=3)
    for step in range(10, 30):
        assert service.host.adapters.keys() == ({"noise 0"} if step > 10 else set())
        noise.at(step)
        assert list(service.host.adapters) == ["noise 0"]
        spread = torch.cat([difference(service.host, "noise 0", site) for site in sites])
        assert float(spread.std()) == pytest.approx(2e-2, rel=0.06)  # 3072 values; a walk would have grown √20-fold
        assert abs(float(spread.mean())) < 2e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in service.host.model.state_dict().items())
    noise.close()
    assert not service.host.adapters


def test_a_draw_is_a_function_of_seed_step_and_site() -> None:
    def drawn(seed: int, step: int) -> dict[str, Tensor]:
        service = Service(tiny("llama"))
        RolloutNoise(service, None, steps=100, seed=seed).at(step)
        return {site: t.clone() for site, p, t in service.host.adapter("noise 0").named_tensors() if p == "noise"}

    first, again, other, later = drawn(1, 30), drawn(1, 30), drawn(2, 30), drawn(1, 31)
    assert all(torch.equal(first[site], again[site]) for site in first)
    assert not any(torch.equal(first[site], wrong[site]) for wrong in (other, later) for site in first)
    values = list(first.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i] if a.shape == b.shape)


def test_tenants_have_noise_of_their_own_and_training_has_none() -> None:
    service = Service(tiny("llama"))
    clients = [service.training_client(LoRA(rank=2), name=name, seed=i) for i, name in enumerate("ab")]
    for client in clients:
        client.adapter.flat += 0.05
    clean = [client.forward([ROW]).total for client in clients]
    noises = [RolloutNoise(service, c.adapter, steps=100, seed=i, start=0.2, end=0.1) for i, c in enumerate(clients)]
    samplers = [noise.at(30) for noise in noises]
    found = [sampler.logprobs([ROW])[0] for sampler in samplers]
    assert all(abs(result.loss - loss) > 1e-4 for result, loss in zip(found, clean, strict=True))
    noise = [a for a in service.host.adapters.values() if a.method.name == "aqn"]
    assert len(noise) == 2 and not torch.equal(*(a.tensors("model.norm")["noise"] for a in noise))
    # both in one batch, as each alone; what is trained is as it was
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=4)
    together = generate(service.host, [([5, 6], s.adapter) for s in samplers], params, seeds=[4, 4])
    alone = [generate(service.host, [([5, 6], s.adapter)], params, seeds=[4])[0] for s in samplers]
    assert [t.tokens for t in together] == [a.tokens for a in alone]
    torch.testing.assert_close(
        torch.tensor([t.logprobs for t in together]), torch.tensor([a.logprobs for a in alone]), rtol=1e-4, atol=1e-5
    )
    assert [client.forward([ROW]).total for client in clients] == clean


def test_before_the_first_noise_the_adapter_itself_is_sampled_from() -> None:
    service = Service(tiny("llama"))
    client = service.training_client(LoRA(rank=2))
    noise = RolloutNoise(service, client.adapter, steps=100)
    assert noise.at(3).logprobs([ROW])[0].loss == client.sampling_client().logprobs([ROW])[0].loss
    assert list(service.host.adapters) == ["default"]
    noise.at(40)
    noise.at(5)
    assert list(service.host.adapters) == ["default"]


def test_small_noise_is_not_lost_in_a_half_precision_base() -> None:
    """In bfloat16 a weight near one absorbs a difference below 2e-3; the noisy norm is rounded once, at its end."""
    moved = []
    for sigma in (1e-2, 3e-4):
        host = noisy(sigma, dtype=torch.bfloat16)
        assert all(t.dtype == torch.float32 for _, _, t in host.adapter("noise").named_tensors())
        norm = host.model.get_submodule("model.norm")
        x = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        y = norm(x)
        with host.disabled():
            moved.append(float((norm(x) != y).float().mean()))
    assert moved[0] > 0.4 and moved[1] > 0.01


def test_targets_choose_the_norms_and_others_are_refused() -> None:
    service = Service(tiny("qwen3"))
    noise = RolloutNoise(service, None, steps=10, targets=["input_layernorm", "post_attention_layernorm"])
    noise.at(5)
    assert {site.rsplit(".", 1)[-1] for site in service.host.adapter("noise 0").layout.sites} == {
        "input_layernorm",
        "post_attention_layernorm",
    }
    with pytest.raises(TargetError):
        RolloutNoise(service, None, steps=10, targets="q_proj")
    with pytest.raises(ConfigError, match="three are the least"):
        RolloutNoise(service, None, steps=10, stages=2)
    with pytest.raises(ConfigError, match="seed"):
        RolloutNoise(service, None, steps=10, seed=-1)


def test_it_is_saved_with_its_noise_and_stacked_again_from_files(tmp_path: Path) -> None:
    folder = tmp_path / "noise"
    host = noisy(0.05, dtype=torch.float32)
    y = host(input_ids=IDS).logits
    host.save(folder)
    again = Host(tiny("llama"))
    again.load(folder, "noise")
    again.add("lora", LoRA(rank=2))
    again.activate("lora", "noise")
    assert torch.equal(again(input_ids=IDS).logits, y)


def test_a_served_run_of_noise_is_stacked_on_a_tenants_adapter(tmp_path: Path) -> None:
    engine = Engines(folder=tmp_path)
    engine.open("lora")
    engine.open("noise", spec=commands.RunSpec("aqn", {"sigma": 0.3}, seed=7))
    for run in ("lora", "noise"):
        engine.ask(commands.Save(0, run, f"saved/{run}", state=False))
    params = {"max_tokens": 8, "temperature": 1.0, "seed": 3}

    def drawn(*runs: str) -> list[float]:
        reply = engine.ask(sample(*(f"saved/{run}" for run in runs), **params))
        return np.frombuffer(reply.sequences[0].logprobs.data, np.float32).tolist()

    assert drawn("lora", "noise") == drawn("lora", "noise") != drawn("lora")
    assert drawn("lora") == drawn()  # its factors are zero still
