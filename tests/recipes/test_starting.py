"""Runs that begin with another adapter: continued from one, stacked on some; and what changes are noticed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import lorica
from lorica.adapters.lineage import Data, Lineage, lineage_at, parent_at, sha256_of
from lorica.client.local import Service
from lorica.core.errors import ConfigError, MethodError, ResumeError
from lorica.data.packing import Sampler
from lorica.data.records import load_records
from lorica.data.render import Renderer, prepare
from lorica.recipes import quickstart, sft, sft_loop
from lorica.recipes.config import SFTConfig
from tests.recipes.test_sft import StopAt, StoppedError

MakeConfig = Callable[..., SFTConfig]


@pytest.fixture
def first(config: MakeConfig, tmp_path: Path) -> Path:
    """An adapter of a short run, with a rank of its own in one place."""
    targets = {"include": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}
    outcome = sft.run(config(out=str(tmp_path / "first"), targets=targets, steps=2))
    assert outcome.adapter is not None
    return outcome.adapter


@pytest.fixture
def begin(config: MakeConfig, tmp_path: Path) -> MakeConfig:
    """A config that says nothing of method and targets."""

    def make(**changes: Any) -> SFTConfig:
        plain = config(out=str(tmp_path / "second"), steps=4)
        values = plain.model_dump(exclude={"method", "targets"}, exclude_unset=True)
        return SFTConfig.parse(values | changes)

    return make


@pytest.fixture
def model(config: MakeConfig) -> str:
    """What `config` trains on."""
    return config().model


def values(folder: Path) -> torch.Tensor:
    return torch.cat(
        [tensor.flatten() for _, tensor in sorted(load_file(folder / "adapter_model.safetensors").items())]
    )


def test_a_continued_run_is_the_same_as_training_on_by_hand(
    begin: MakeConfig, first: Path, rows: Path, model: str
) -> None:
    config = begin(continue_from=str(first))
    outcome = sft.run(config)
    assert outcome.adapter is not None
    backbone = lorica.load(model)
    examples = prepare(load_records(rows), Renderer(backbone.tokenizer), 1024).examples
    batches = Sampler(examples, batch_size=config.batch_size, seed=config.seed)
    client = Service(backbone, token_budget=64).continue_client(first, optimizer=config.optimizer, steps=4)
    for _ in range(4):
        client.forward_backward([examples[i] for i in next(batches)])
        client.optim_step()
    again = lorica.Host(lorica.load(model)).load(outcome.adapter)
    assert torch.equal(again.flat, client.adapter.flat)
    assert again.forwards == client.adapter.forwards == 6
    assert not torch.equal(values(outcome.adapter), values(first))


def test_a_continued_run_takes_method_and_sites_and_writes_them_out(begin: MakeConfig, first: Path) -> None:
    outcome = sft.run(begin(continue_from=str(first)))
    assert outcome.adapter is not None
    written = yaml.safe_load((outcome.path / "config.yaml").read_text())
    assert (written["method"]["rank"], written["method"]["dropout"]) == (4, 0.1)
    assert written["targets"] == {
        "include": ["q_proj", "v_proj"],
        "exclude": [],
        "layers": None,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {},
    }
    known = lineage_at(outcome.adapter)
    assert known.parents == (parent_at(first, "continued-from"),)
    assert known.recipe is not None
    assert (known.recipe["name"], known.recipe["steps"]) == ("sft", 4)
    assert known.data is not None
    assert known.data.rows == 24


def test_a_folder_that_peft_wrote_is_continued_at_its_own_sites(begin: MakeConfig, first: Path) -> None:
    (first / "lorica.json").unlink()
    config = sft.plan(begin(continue_from=str(first))).config
    assert config.method["rank"] == 4
    again = SFTConfig.parse(config.model_dump())  # as a resumed run reads it
    assert sft.plan(again).client.adapter.layout.size == sft.plan(config).client.adapter.layout.size


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"name": "dora", "rank": 4}}, "method.name is 'dora'"),
        ({"method": {"name": "lora", "rank": 8, "dropout": 0.1}}, "method.rank is 8"),
        ({"targets": {"include": ["q_proj"]}}, "leave out 'model.layers.0.self_attn.v_proj'"),
        ({"targets": {"include": ["q_proj", "k_proj", "v_proj"]}}, "select 'model.layers.0.self_attn.k_proj'"),
        ({"targets": {"include": ["q_proj", "v_proj"]}}, "give 'model.layers.0.self_attn.v_proj' other settings"),
    ],
    ids=["method", "rank", "fewer sites", "more sites", "other settings"],
)
def test_what_differs_from_the_continued_adapter_is_refused(
    begin: MakeConfig, first: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        sft.plan(begin(continue_from=str(first), **changes))
    assert said in str(caught.value)
    assert str(first) in str(caught.value)
    assert "stack_on" in str(caught.value.hint)


def test_the_same_method_and_sites_may_be_named_again(begin: MakeConfig, first: Path) -> None:
    same = {"name": "lora", "rank": 4, "dropout": 0.1}
    targets = {"include": ["v_proj", "q_proj"], "rank_pattern": {"v_proj": 2}}
    assert sft.plan(begin(continue_from=str(first), method=same, targets=targets)).client.adapter.layout.size


@pytest.mark.parametrize("field", ["continue_from", "stack_on"])
def test_such_a_run_stopped_and_resumed_equals_the_undisturbed_one(
    begin: MakeConfig, first: Path, tmp_path: Path, field: str
) -> None:
    whole = sft.run(begin(out=str(tmp_path / "whole"), **{field: str(first)}))
    with pytest.raises(StoppedError):
        sft.run(begin(**{field: str(first)}), StopAt(3))
    resumed = sft.resume(tmp_path / "second")
    assert whole.adapter is not None
    assert resumed.adapter is not None
    assert sha256_of(whole.adapter) == sha256_of(resumed.adapter)
    assert lineage_at(whole.adapter).parents == lineage_at(resumed.adapter).parents


@pytest.mark.parametrize("field", ["continue_from", "stack_on"])
def test_a_parent_that_changed_meanwhile_stops_the_resumption(
    begin: MakeConfig, first: Path, tmp_path: Path, field: str
) -> None:
    with pytest.raises(StoppedError):
        sft.run(begin(**{field: str(first)}), StopAt(3))
    file = first / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(ResumeError, match="has changed since the run began"):
        sft.resume(tmp_path / "second")


def test_a_stacked_run_trains_the_new_adapter_above_the_frozen_one(
    begin: MakeConfig, first: Path, tmp_path: Path, rows: Path, model: str
) -> None:
    before = sha256_of(first)
    data = {"path": str(rows), "eval_path": str(rows)}
    method = {"name": "dora", "rank": 2}
    seen: list[float] = []

    class Evaluations(sft.Observer):
        def evaluated(self, record: dict[str, Any]) -> None:
            seen.append(record["eval_loss"])

    outcome = sft.run(begin(stack_on=[str(first)], method=method, data=data), Evaluations())
    assert outcome.adapter is not None
    assert sha256_of(first) == before
    assert lineage_at(outcome.adapter).parents == (parent_at(first, "stacked-on"),)
    backbone = lorica.load(model)
    examples = prepare(load_records(rows), Renderer(backbone.tokenizer), 1024).examples
    home = Service(backbone, token_budget=64)
    home.host.load(first, "below")
    home.host.load(outcome.adapter, "above")
    losses = [
        sum(r.loss for r in home.sampling_client(stack).logprobs(examples)) / sum(e.trained for e in examples)
        for stack in (("below", "above"), "above")
    ]
    assert losses[0] == pytest.approx(seen[-1], rel=1e-6)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_merging_and_going_on_trains_on_the_merged_weights_and_knows_it(
    begin: MakeConfig, first: Path, tmp_path: Path, model: str
) -> None:
    from lorica.adapters.save_merged import save_merged

    host = lorica.Host(lorica.load(model))
    host.load(first, "first")
    host.merge("first")
    save_merged(host.backbone, tmp_path / "merged")
    outcome = sft.run(begin(model=str(tmp_path / "merged")))
    assert outcome.adapter is not None
    known = lineage_at(outcome.adapter)
    assert [(p.relation, p.path, p.sha256) for p in known.parents] == [("trained-from", str(first), sha256_of(first))]
    assert known.base is not None
    assert known.base.name == str(tmp_path / "merged")


def test_the_stack_beneath_a_continued_adapter_has_to_be_named(begin: MakeConfig, first: Path, tmp_path: Path) -> None:
    second = sft.run(begin(stack_on=[str(first)], steps=1)).adapter
    with pytest.raises(MethodError, match="was trained on top of"):
        sft.plan(begin(continue_from=str(second)))
    ready = sft.plan(begin(continue_from=str(second), stack_on=[str(first)]))
    assert [adapter.held for adapter in ready.client.stack] == [True, False]
    shutil.move(first, tmp_path / "elsewhere")  # it is told by its hash
    sft.plan(begin(continue_from=str(second), stack_on=[str(tmp_path / "elsewhere")]))


def test_a_base_of_its_own_begins_with_no_other_adapter(begin: MakeConfig, first: Path) -> None:
    method = {"name": "loftq", "rank": 2, "iterations": 2}
    with pytest.raises(ConfigError, match="makes a base of its own"):
        sft.plan(begin(stack_on=[str(first)], method=method, quantize="nf2"))


def test_the_quickstart_begins_with_the_plain_base(begin: MakeConfig, first: Path) -> None:
    with pytest.raises(ConfigError, match="begins without another one"):
        quickstart.run(begin(stack_on=[str(first)]))


def test_the_flat_loop_says_what_it_trained_on(rows: Path, tmp_path: Path) -> None:
    sft_loop.train("nano", str(rows), lorica.make_method("ia3"), str(tmp_path / "a"), steps=1, batch_size=2)
    found: Lineage = lineage_at(tmp_path / "a")
    assert found.recipe == {"name": "sft_loop", "steps": 1, "batch_size": 2, "lr": 2e-3}
    assert found.data == Data(str(rows), load_records(rows).fingerprint, 24)


def test_clients_share_the_adapters_that_they_stand_on(first: Path, model: str) -> None:
    home = Service(lorica.load(model))
    clients = [home.training_client(lorica.make_method("ia3"), name=name, on=[first]) for name in "ab"]
    assert clients[0].stack[0] is clients[1].stack[0]
    below = clients[0].stack[0]
    third = home.training_client(lorica.make_method("ia3"), name="c", on=[below, clients[0].adapter])
    assert third.stack == (below, clients[0].adapter, third.adapter)
    with pytest.raises(MethodError, match="held beneath another one"):
        clients[0].forward_backward([lorica.data.example.Example.whole([5, 6, 7], "row")])


def test_a_changed_copy_of_a_config_still_tells_what_nobody_has_set(begin: MakeConfig, first: Path) -> None:
    config = begin(continue_from=str(first)).replace(seed=3)
    assert {"method", "targets"}.isdisjoint(config.model_fields_set)
    assert sft.plan(config).config.method["rank"] == 4
