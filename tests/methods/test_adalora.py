"""AdaLoRA: identities of its specification, a trajectory beside PEFT's, and the traps of other implementations."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lorica.adapters.export import export_lora, pruned
from lorica.adapters.files import load_adapter, save_adapter
from lorica.core.budget import cubic_budget
from lorica.core.errors import ConfigError, FormatError, MethodError
from lorica.engine.host import Host
from lorica.methods.adalora import AdaLoRA
from lorica.methods.lora import LoRA
from lorica.models import wrap
from lorica.models.factory import example_inputs
from lorica.training.optimizer import AdamStep, AdapterOptimizer
from tests.methods.one import hosted, linear, matrix, same, tensors
from tests.parity.both import OLD_CACHE, OLD_CHECKPOINTING
from tests.tiny import tiny

PATTERNS = pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
"""PEFT reads AdaLoRA's `rank_pattern`, but its new check of that field expects LoRA's."""
EMPTY = pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.* have invalid shape")
"""PEFT takes a module with no triplet left for a part of a sharded one."""
pytestmark = [OLD_CHECKPOINTING, OLD_CACHE, PATTERNS, EMPTY]

W, X, DY = matrix(8, 5), matrix(6, 5, seed=1), matrix(6, 8, seed=2)


def net(*, seed: int = 0) -> nn.Sequential:
    return nn.Sequential(linear(matrix(8, 5, seed=seed)), nn.Tanh(), linear(matrix(4, 8, seed=seed + 1)))


def two_sites(method: AdaLoRA, *, perturbed: float = 0.0) -> Host:
    host = Host(wrap(net()))
    host.add("a", method, dtype=torch.float64)
    host.activate("a")
    flat = host.adapter("a").flat
    flat += perturbed * torch.randn(flat.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return host


def train(host: Host, steps: int, total: int | None = None, *, lr: float = 0.01) -> list[int]:
    """Nonzero triplets of all sites after each step."""
    adapter, seen = host.adapter("a"), []
    optimizer = AdapterOptimizer(adapter, steps=total)
    for step in range(steps):
        (host(matrix(6, 5, seed=50 + step)) - matrix(6, 4, seed=90)).square().mean().backward()
        optimizer.step(AdamStep(lr))
        seen.append(alive(host))
    return seen


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def alive(host: Host) -> int:
    adapter = host.adapter("a")
    return sum(int(adapter.values(name)["E"].count_nonzero()) for name in adapter.layout.sites)


@pytest.mark.parametrize("penalty", ["norm", "square"])
def test_the_penalty_reaches_the_gradients_whatever_the_loss_is_made_of(penalty: str) -> None:
    """PEFT adds it to `outputs.loss`: a loss computed from logits, as in RL, loses it silently."""
    method = AdaLoRA.parse({"rank": 3, "orthogonality": 0.7, "penalty": penalty, "keep": 1})
    host = two_sites(method, perturbed=0.3)
    adapter = host.adapter("a")
    before = {n: {k: v.clone() for k, v in adapter.values(n).items()} for n in adapter.layout.sites}
    leaves = {n: {k: v.clone().requires_grad_() for k, v in own.items()} for n, own in before.items()}
    total = torch.zeros((), dtype=torch.float64)
    for own in leaves.values():
        for gram in (own["P"].T @ own["P"], own["Q"] @ own["Q"].T):
            norm = torch.linalg.matrix_norm(gram - torch.eye(3).double())
            total = total + (norm.square() if penalty == "square" else norm)
    (0.7 * total / 4).backward()
    optimizer = AdapterOptimizer(adapter, steps=10)
    step = optimizer._hooked(AdamStep(0.01))
    adapter.zero_grad()
    method.before_step(step)
    seen = {n: {k: v.clone() for k, v in own.grads.items()} for n, own in step.sites.items()}
    for name, own in leaves.items():
        for param in ("P", "Q"):
            same(seen[name][param], _grad(own[param]))
        assert not seen[name]["E"].any()


def test_at_step_0_only_the_values_have_a_gradient_and_the_output_is_the_base() -> None:
    host = hosted(linear(W), AdaLoRA(rank=3))
    with host.disabled():
        base = host(X)
    assert torch.equal(host(X), base)
    (host(X) * DY).sum().backward()
    own = tensors(host)
    assert own["E"].grad is not None and own["E"].grad.all()
    assert not own["P"].grad.any() and not own["Q"].grad.any()  # type: ignore[union-attr]
    assert 0.01 < float(own["P"].detach().std()) < 0.03


def test_after_the_last_step_exactly_the_budget_is_left() -> None:
    for keep, final in itertools.product((0.25, 0.5, 2 / 3), (0, 2)):
        host = two_sites(AdaLoRA(rank=4, keep=keep, final=final))
        seen = train(host, 12, 12)
        assert seen[-1] == round(8 * keep)
        assert all(later <= earlier for earlier, later in itertools.pairwise(seen[1:]))


def test_every_step_leaves_exactly_what_the_schedule_says() -> None:
    method = AdaLoRA(rank=4, keep=0.25, warmup=2, final=2)
    seen = train(two_sites(method, perturbed=0.1), 12, 12)
    assert seen == [cubic_budget(t, 8, 2, 2, 10, 1)[0] for t in range(1, 13)]


def test_a_target_equal_to_the_start_keeps_everything_and_does_not_crash() -> None:
    """PEFT asks for the 0-th smallest score there."""
    host = two_sites(AdaLoRA(rank=3, keep=1))
    assert train(host, 4, 4)[-1] == 6


def test_smoothed_importances_of_a_constant_gradient_have_their_closed_form() -> None:
    method = AdaLoRA(rank=3, orthogonality=0)
    host = two_sites(method, perturbed=0.3)
    optimizer = AdapterOptimizer(host.adapter("a"), steps=100)
    adapter = host.adapter("a")
    kept: dict[str, Tensor] = {}
    constant = {n: {p: v.clone() for p, v in adapter.values(n).items()} for n in adapter.layout.sites}
    for n in range(1, 8):
        adapter.grad.fill_(0.5)
        step = optimizer._hooked(AdamStep(0.0))
        for name, own in step.sites.items():
            method._smooth(kept, name, own)
        for name, values in constant.items():
            now = (values["P"] * 0.5).abs()
            same(kept[f"{name}/P/importance"], (1 - 0.85**n) * now, 1e-12)
            same(kept[f"{name}/P/uncertainty"], 0.15 * n * 0.85**n * now, 1e-12)


def test_the_mask_keeps_the_triplets_of_the_largest_scores() -> None:
    method = AdaLoRA(rank=3, keep=0.5, orthogonality=0, final=0)
    host = two_sites(method)
    adapter = host.adapter("a")
    size = {"0": [1.0, 5.0, 2.0], "2": [4.0, 0.5, 3.0]}
    for name, values in size.items():
        for param in ("P", "Q", "E"):
            value = adapter.values(name)[param]
            scale = torch.tensor(values, dtype=torch.float64)
            adapter.set(name, param, torch.ones_like(value) * (scale[:, None] if param == "Q" else scale))
    optimizer = AdapterOptimizer(adapter, steps=4)
    for _ in range(4):
        adapter.grad.fill_(0.1)
        optimizer.step(AdamStep(0.0))
    masks = {name: adapter.values(name)["mask"].tolist() for name in size}
    assert masks == {"0": [0, 1, 0], "2": [1, 0, 1]}


def test_it_is_a_lora_with_p_times_e_and_stays_one_when_pruned() -> None:
    host = two_sites(AdaLoRA(rank=4, alpha=8, keep=0.4), perturbed=0.2)
    train(host, 10, 10)
    y = host(X)
    reference = Host(wrap(net()))
    lora = reference.add("a", LoRA(rank=4, alpha=4 * 8 / (4 + 1e-5)), dtype=torch.float64)
    for name in lora.layout.sites:
        own = host.adapter("a").values(name)
        lora.set(name, "A", own["Q"])
        lora.set(name, "B", own["P"] * own["E"])
    reference.activate("a")
    same(y, reference(X))
    small = pruned(host.adapter("a"))
    assert sum(m.rank for m in small.layout.methods.values() if isinstance(m, AdaLoRA)) == round(0.4 * 8)
    again = Host(wrap(net()))
    for name in small.layout.sites:
        update: Any = small.update(name, again.backbone.weight(name))
        whole: Any = host.adapter("a").update(name, host.backbone.weight(name))
        same(update.factors[0].dense(), whole.factors[0].dense())
        assert small.layout.methods[name].scaling() == host.adapter("a").method.scaling()  # type: ignore[attr-defined]


def test_pruning_in_the_middle_of_a_run_is_refused_where_it_would_change_the_function() -> None:
    host = two_sites(AdaLoRA(rank=4, keep=0.25, every=3))
    train(host, 7, 12)
    with pytest.raises(MethodError, match="acts at site"):
        pruned(host.adapter("a"))
    plain = hosted(linear(W), LoRA(rank=2))
    with pytest.raises(MethodError, match="no triplets"):
        pruned(plain.adapter("a"))


def test_an_export_has_the_ranks_that_are_left() -> None:
    host = two_sites(AdaLoRA(rank=4, keep=0.5), perturbed=0.2)
    train(host, 10, 10)
    lora, report = export_lora(pruned(host.adapter("a")), host.backbone)
    left = {n: max(1, int(host.adapter("a").values(n)["mask"].sum())) for n in lora.layout.sites}
    assert {n: m.rank for n, m in lora.layout.methods.items() if isinstance(m, LoRA)} == left
    assert report.relative < 1e-6


def test_it_asks_how_many_steps_there_are_before_it_changes_anything() -> None:
    host = two_sites(AdaLoRA(rank=3))
    before = host.adapter("a").flat.clone()
    with pytest.raises(MethodError, match="how many steps"):
        train(host, 1)
    with pytest.raises(MethodError, match="leave none of 5"):
        train(two_sites(AdaLoRA(rank=3, warmup=3, final=2)), 1, 5)
    assert torch.equal(host.adapter("a").flat, before)
    assert train(two_sites(AdaLoRA(rank=3, keep=0.5, steps=4)), 4, 1000)[-1] == 3


@pytest.mark.parametrize("stop", [2, 6, 9])
def test_a_resumed_run_is_the_run_that_never_stopped(stop: int) -> None:
    method = AdaLoRA(rank=4, keep=0.25, warmup=1, final=3)
    whole, part = two_sites(method), two_sites(method)
    ends = []
    for host, stops in ((whole, False), (part, True)):
        optimizer = AdapterOptimizer(host.adapter("a"), steps=11)
        for step in range(11):
            if stops and step == stop:
                state, old = optimizer.state_dict(), host.adapter("a")
                host = two_sites(method)
                host.adapter("a").flat.copy_(old.flat)
                for name, value in host.adapter("a").changing().items():
                    value.copy_(old.changing()[name])
                optimizer = AdapterOptimizer(host.adapter("a"), steps=11)
                optimizer.load_state_dict(state)
            (host(matrix(6, 5, seed=50 + step)) - 1).square().mean().backward()
            optimizer.step(AdamStep(0.01))
        ends.append(host.adapter("a"))
    assert torch.equal(ends[0].flat, ends[1].flat)
    assert all(torch.equal(v, ends[1].changing()[n]) for n, v in ends[0].changing().items())


# -- beside PEFT -------------------------------------------------------------------------------------------------------


def config(**fields: Any) -> peft.AdaLoraConfig:
    return peft.AdaLoraConfig(target_modules=["0", "2"], **{"total_step": 8, **fields})


def test_its_run_is_pefts() -> None:
    """Importances, budget, masks and regulariser; PEFT's threshold leaves as many, there being no ties."""
    method = AdaLoRA(rank=4, keep=0.5, warmup=1, final=2, alpha=8)
    host = two_sites(method)
    theirs = peft.get_peft_model(net(), config(init_r=4, target_r=2, tinit=1, tfinal=2, lora_alpha=8, lora_dropout=0.0))
    adapter = host.adapter("a")
    layers = {name: theirs.get_submodule(f"base_model.model.{name}") for name in ("0", "2")}
    with torch.no_grad():
        for name, layer in layers.items():
            own = adapter.values(name)
            layer.lora_A["default"].data = own["Q"].clone()
            layer.lora_B["default"].data = own["P"].clone()
            layer.lora_E["default"].data = own["E"][:, None].clone()
            layer.ranknum["default"].data = layer.ranknum["default"].data.double()
            layer.ranknum["default"].requires_grad_(False)  # beside a float64 base PEFT makes it trained
    groups = [p for p in theirs.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)
    optimizer = AdapterOptimizer(adapter, steps=8)
    for step in range(8):
        x, goal = matrix(6, 5, seed=50 + step), matrix(6, 4, seed=90)
        (host(x) - goal).square().mean().backward()
        optimizer.step(AdamStep(0.01))
        loss = (theirs(x) - goal).square().mean()
        for layer in layers.values():  # what PEFT's forward adds to `outputs.loss`
            for gram in (
                layer.lora_A["default"] @ layer.lora_A["default"].T,
                layer.lora_B["default"].T @ layer.lora_B["default"],
            ):
                loss = loss + 0.5 / 4 * torch.linalg.matrix_norm(gram - torch.eye(4).double())
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        theirs.base_model.update_and_allocate(step + 1)
        for name, layer in layers.items():
            own = adapter.values(name)
            torch.testing.assert_close(own["E"], layer.lora_E["default"].data[:, 0], rtol=1e-5, atol=1e-8)
            torch.testing.assert_close(own["Q"], layer.lora_A["default"].data, rtol=1e-5, atol=1e-8)
    assert alive(host) == 4


def trained() -> Host:
    """An adapter of `tiny("llama")` after all its steps."""
    base = tiny("llama")
    host = Host(base)
    host.add("a", AdaLoRA(rank=4, keep=0.5), ["q_proj", "down_proj"])
    host.activate("a")
    optimizer, given = AdapterOptimizer(host.adapter("a"), steps=5), example_inputs(base)
    for _ in range(5):
        host(**given, labels=given["input_ids"]).loss.backward()
        optimizer.step(AdamStep(0.02))
    return host


def test_peft_reads_our_folder_and_we_read_pefts(tmp_path: Path) -> None:
    host = trained()
    folder, given = host.save(tmp_path / "ours"), example_inputs(host.backbone)
    with torch.no_grad():
        y = host(**given).logits
    theirs = peft.PeftModel.from_pretrained(tiny("llama").module, str(folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**given).logits, y, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    host.load(tmp_path / "theirs", "b")
    host.activate("b")
    with torch.no_grad():
        assert torch.equal(host(**given).logits, y)


def test_a_pruned_adapter_is_a_rank_pattern_to_peft_and_back(tmp_path: Path) -> None:
    host = trained()
    given = example_inputs(host.backbone)
    with torch.no_grad():
        y = host(**given).logits
    small = pruned(host.adapter("a"))
    save_adapter(small, host.backbone, tmp_path / "small")
    written = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert written["peft_type"] == "ADALORA" and written["init_r"] == 4
    assert written["rank_pattern"]
    assert {sum(kept) for kept in written["rank_pattern"].values()} <= {1, 2, 3, 4}
    theirs = peft.PeftModel.from_pretrained(tiny("llama").module, str(tmp_path / "small")).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**given).logits, y, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    for path in ("small", "theirs"):
        back = load_adapter(tmp_path / path, host.backbone, "b")
        assert {n: m.rank for n, m in back.layout.methods.items() if isinstance(m, AdaLoRA)} == {
            n: m.rank for n, m in small.layout.methods.items() if isinstance(m, AdaLoRA)
        }
        for name in back.layout.sites:
            update: Any = back.update(name, host.backbone.weight(name))
            whole: Any = host.adapter("a").update(name, host.backbone.weight(name))
            torch.testing.assert_close(update.factors[0].dense(), whole.factors[0].dense())


def test_a_folder_that_peft_pruned_to_nothing_somewhere_is_read(tmp_path: Path) -> None:
    base = tiny("llama")
    theirs = peft.get_peft_model(
        base.module, peft.AdaLoraConfig(init_r=4, target_r=2, target_modules=["q_proj"], total_step=9)
    )
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    theirs.peft_config["default"].rank_pattern = {
        f"model.layers.{k}.self_attn.q_proj.lora_E.default": kept
        for k, kept in enumerate(([True, False, True, True], [False] * 4))
    }
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=False)
    host = Host(tiny("llama"))
    adapter = host.load(tmp_path, "a")
    assert [(n, m.rank) for n, m in adapter.layout.methods.items() if isinstance(m, AdaLoRA)] == [
        ("model.layers.0.self_attn.q_proj", 3)
    ]


def test_a_rank_that_the_settings_deny_is_refused(tmp_path: Path) -> None:
    host = trained()
    folder = host.save(tmp_path / "ours")
    (folder / "lorica.json").unlink()
    written = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**written, "init_r": 6}))
    with pytest.raises(FormatError, match="4 triplets"):
        host.load(folder, "b")


@pytest.mark.parametrize(
    "bad", [{"keep": 0}, {"keep": 1.5}, {"beta1": 1.0}, {"every": 0}, {"orthogonality": -1}], ids=str
)
def test_a_setting_out_of_range_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        AdaLoRA(**bad)
