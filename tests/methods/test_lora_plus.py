"""LoRA+: a learning rate for each factor, in every method that has such groups."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.layout import Layout
from lorica.adapters.targets import Targets, select
from lorica.core.errors import ConfigError
from lorica.engine.worker import method_settings
from lorica.methods import Method, all_methods, make_method
from lorica.methods.dora import DoRA
from lorica.methods.lora import LearningRates, LoRA
from lorica.recipes.config import SFTConfig
from lorica.server import specs
from lorica.server.bodies import CreateModelBody
from lorica.training.optimizer import AdamStep, AdamWConfig, AdapterOptimizer
from tests.tiny import tiny

EMBEDDED = ["q_proj", "embed_tokens"]


def made(method: Method, targets: list[str] | None = None) -> Adapter:
    base = tiny("llama", dtype=torch.float64, tie_word_embeddings=False)
    layout = Layout(method, select(base.sites, method, Targets.of(targets or ["q_proj"])))
    return Adapter("a", layout, dtype=torch.float64).initialise(base.weight)


def moved(method: Method, step: AdamStep, targets: list[str] | None = None, *, seed: int = 1) -> dict[str, Tensor]:
    """What one step changes, by group, for the same random gradient whatever the method's rates."""
    a = made(method, targets)
    before = a.flat.clone()
    a.grad.normal_(generator=torch.Generator().manual_seed(seed))
    AdapterOptimizer(a).step(step)
    return {g.name: (a.flat - before)[g.start : g.stop] for g in a.layout.groups}


def test_a_ratio_of_one_is_adamw_on_one_group_bit_for_bit() -> None:
    a = made(LoRA(rank=2, lr_ratio=1, lr_embedding=1), EMBEDDED)
    values = torch.nn.Parameter(a.flat.clone())
    plain = torch.optim.AdamW([values], lr=0.01, weight_decay=0.1, fused=True)
    optimizer = AdapterOptimizer(a)
    for seed in range(4):
        a.grad.normal_(generator=torch.Generator().manual_seed(seed))
        values.grad = a.grad.clone()
        optimizer.step(AdamStep(0.01, weight_decay=0.1))
        plain.step()
    assert torch.equal(a.flat, values)


def test_with_plain_steps_from_init_a_only_b_moves_and_by_the_ratio() -> None:
    class Plain(LoRA):
        @property
        def plain_steps(self) -> bool:
            return True

    def change(ratio: float) -> dict[str, Tensor]:
        a = made(Plain(rank=2, lr_ratio=ratio))
        before = a.flat.clone()
        for group in a.layout.groups:
            if group.name == "B":  # B = 0, so that A has no gradient
                a.grad[group.start : group.stop].normal_(generator=torch.Generator().manual_seed(0))
        AdapterOptimizer(a).step(AdamStep(0.01))
        return {g.name: (a.flat - before)[g.start : g.stop] for g in a.layout.groups}

    plain, faster = change(1), change(16)
    torch.testing.assert_close(faster["B"], 16 * plain["B"], rtol=1e-12, atol=0)
    assert not faster["A"].any() and plain["B"].any()


def test_adams_first_step_moves_b_by_the_ratio_and_leaves_a_without_gradient() -> None:
    a = made(LoRA(rank=2, lr_ratio=16))
    before = a.flat.clone()
    (group_A, group_B) = a.layout.groups
    a.grad[group_B.start : group_B.stop].normal_(generator=torch.Generator().manual_seed(0))
    AdapterOptimizer(a).step(AdamStep(0.001, eps=1e-12))
    change = a.flat - before
    assert not change[group_A.start : group_A.stop].any()
    torch.testing.assert_close(
        change[group_B.start : group_B.stop].abs(), torch.full((group_B.stop - group_B.start,), 0.016).double()
    )


def test_every_trained_tensor_is_in_one_group_with_the_rate_and_decay_of_its_kind() -> None:
    base = tiny("bert", dtype=torch.float64)
    method = LoRA(rank=2, lr_ratio=8, lr_embedding=0.25, lora_bias=True)
    layout = Layout(method, select(base.sites, method, Targets.of(["query"])))
    groups = {g.name: g for g in layout.groups}
    assert {name: g.decay for name, g in groups.items()} == {"A": True, "B": True, "bias": False}
    covered = sorted((g.start, g.stop) for g in layout.groups)
    assert covered[0][0] == 0 and covered[-1][1] == layout.size
    assert all(left[1] == right[0] for left, right in itertools.pairwise(covered))
    rates = moved(LoRA(rank=2, lr_ratio=8, lr_embedding=0.25), AdamStep(0.01, eps=1e-12), EMBEDDED)
    assert {name: round(float(change.abs().max()), 6) for name, change in rates.items()} == {
        "A": 0.01,
        "B": 0.08,
        "embedding": 0.0025,
    }


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_under_a_schedule_the_ratio_stays_at_every_step(schedule: str) -> None:
    a = made(LoRA(rank=2, lr_ratio=16))
    optimizer = AdapterOptimizer(a, AdamWConfig.parse({"lr": 0.01, "schedule": schedule, "warmup": 0.3}), steps=8)
    for _ in range(8):
        a.grad.fill_(1.0)
        optimizer.step()
        rates = {group["name"]: group["lr"] for group in optimizer._ready(AdamStep(optimizer.lr)).param_groups}
        assert rates["B"] == pytest.approx(16 * rates["A"])


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_weight_decay_is_not_lost_when_a_ratio_is_set(ratio: float) -> None:
    """PEFT's optimiser for LoRA+ writes a decay of its own, 0, into every group."""
    a = made(LoRA(rank=2, init_factor="b", lr_ratio=ratio))
    before = a.flat.clone()
    a.zero_grad()
    AdapterOptimizer(a).step(AdamStep(0.01, weight_decay=0.1))
    for group in a.layout.groups:
        factor = 1 - 0.01 * 0.1 * (ratio if group.name == "B" else 1)
        span = slice(group.start, group.stop)
        torch.testing.assert_close(a.flat[span], before[span] * factor, rtol=1e-12, atol=0)


def test_a_magnitude_keeps_the_plain_rate_unless_the_optimiser_is_told() -> None:
    """The authors' code sends every tensor of one axis to the rate of B."""
    change = moved(DoRA(rank=2, lr_ratio=16), AdamStep(0.001, eps=1e-12))
    assert float(change["m"].abs().max()) == pytest.approx(0.001)
    a = made(DoRA(rank=2, lr_ratio=16))
    a.grad.fill_(1.0)
    before = a.flat.clone()
    optimizer = AdapterOptimizer(a, AdamWConfig(lr=0.001, group_lr={"m": 16.0}, warmup=0, schedule="constant"))
    optimizer.step()
    m = next(group for group in a.layout.groups if group.name == "m")
    assert float((a.flat - before)[m.start]) == pytest.approx(-0.016)


@pytest.mark.parametrize("name", [n for n, cls in all_methods().items() if issubclass(cls, LearningRates)])
def test_every_method_with_two_sides_takes_the_ratio(name: str) -> None:
    fields = all_methods()[name].model_fields
    if name == "lora_pro":
        with pytest.raises(ConfigError, match="one rate"):
            make_method(name, lr_ratio=4)
        return
    method = make_method(name, lr_ratio=4, **({"rank": 2} if "rank" in fields else {}))
    assert method.group_lr()["B"] == 4


def test_the_methods_with_two_sides_are_all_there() -> None:
    found = {n for n, cls in all_methods().items() if issubclass(cls, LearningRates)}
    assert {"lora", "dora", "adalora", "lora_pro", "pissa", "milora", "multilora"} <= found


@pytest.mark.parametrize("name", [n for n, cls in all_methods().items() if issubclass(cls, LearningRates)])
def test_a_rate_of_embeddings_is_refused_where_a_method_has_none(name: str) -> None:
    if "embedding" in all_methods()[name].kinds:
        assert make_method(name, lr_embedding=0.5).group_lr()["embedding"] == 0.5
        return
    with pytest.raises(ConfigError, match=f"lr_embedding is 0.5, but '{name}' adapts no embeddings"):
        make_method(name, lr_embedding=0.5)
    assert make_method(name, lr_embedding=1.0) == make_method(name)


@pytest.mark.parametrize("bad", [0.0, -1.0])
@pytest.mark.parametrize("field", ["lr_ratio", "lr_embedding"])
def test_a_rate_that_is_not_positive_is_refused(field: str, bad: float) -> None:
    with pytest.raises(ConfigError, match=field):
        LoRA.parse({field: bad})


def test_the_ratio_is_set_in_a_training_config() -> None:
    config = SFTConfig.parse({"data": {"path": "everyday:train"}, "method": {"name": "dora", "lr_ratio": 16}})
    assert config.make_method().group_lr()["B"] == 16


METADATA: list[Callable[[], dict[str, object]]] = [
    lambda: {"method": "lora", "lr_ratio": 16, "lr_embedding": "0.5"},
    lambda: {"method": "lora", "config": '{"rank": 4, "lr_ratio": 16, "lr_embedding": 0.5}'},
]


@pytest.mark.parametrize("metadata", METADATA)
def test_the_ratio_is_asked_for_on_a_server_by_metadata(metadata: Callable[[], dict[str, object]]) -> None:
    body = CreateModelBody.model_validate(
        {
            "session_id": "s",
            "model_seq_id": 0,
            "base_model": "nano",
            "lora_config": {"rank": 4},
            "user_metadata": metadata(),
        }
    )
    spec = specs.spec_of(body, "qwen3", method_settings())
    assert make_method(spec["method"], **spec["config"]).group_lr() == {"B": 16.0, "embedding": 0.5}
