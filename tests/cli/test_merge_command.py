"""`lorica merge`: adapters made into one, or folded into a model; what was typed wrong, in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lorica.adapters.files import load_adapter
from lorica.adapters.merging import all_mergings, change_of
from lorica.cli.merge import command
from lorica.engine.host import Host
from lorica.methods import make_method
from lorica.models import load


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Host, Path]:
    """Two LoRAs and a dense change on one kind of site, saved."""
    host, folder = Host(load("nano", dtype="float32")), tmp_path_factory.mktemp("adapters")
    for seed, (name, method) in enumerate((("a", "lora"), ("b", "lora"), ("full", "delta"))):
        adapter = host.add(name, make_method(method, **({"rank": 2} if method == "lora" else {})), "v_proj")
        adapter.flat.copy_(0.01 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(seed)))
        host.save(folder / name, name)
    return host, folder


@pytest.fixture
def folders(saved: tuple[Host, Path]) -> list[Path]:
    """Copies of their folders, here."""
    return [Path(shutil.copytree(path, path.name)) for path in sorted(saved[1].iterdir())]


def test_a_rule_writes_an_adapter_with_its_parents(ask, saved, folders):
    found = ask("merge", *folders[:2], "--how", "task_arithmetic", "--weights", "0.5,2", "--scale", "0.5", "--out", "m")
    assert (found["as"], found["how"], found["model"], found["weights"]) == (
        "adapter",
        "task_arithmetic",
        "nano",
        [0.5, 2],
    )
    assert found["settings"] == {"scale": 0.5} and found["highest"] == 4 and found["losses"] == []
    lineage = json.loads(Path("m/lorica.json").read_text())["meta"]["lineage"]
    assert [parent["path"] for parent in lineage["parents"]] == [str(path.absolute()) for path in folders[:2]]
    assert [parent["weight"] for parent in lineage["parents"]] == [0.5, 2.0]
    host, _ = saved
    adapters = (load_adapter(Path("m"), host.backbone, "m"), host.adapter("a"), host.adapter("b"))
    site = next(iter(adapters[0].layout.sites))
    merged, one, two = (change_of(adapter, host.backbone, site).matrix() for adapter in adapters)
    torch.testing.assert_close(merged, 0.25 * one + two, rtol=0, atol=1e-9)


def test_a_table_compares_the_losses_of_base_parents_and_result(run, ask, folders):
    for name in ("one", "two"):
        Path(f"{name}.jsonl").write_text(json.dumps({"text": f"Say {name}."}) + "\n")
    words = ("merge", *folders, "--how", "ties", "--density", 0.5, "--eval", "one.jsonl", "--eval", "two.jsonl")
    found = ask(*words, "--out", "m")["losses"]
    assert [row["adapter"] for row in found] == ["(the base)", *map(str, folders), "merged"]
    assert all(set(row) == {"adapter", "one.jsonl", "two.jsonl"} for row in found)
    assert len({row["one.jsonl"] for row in found}) == len(found)
    said = run(*words, "--out", "n")
    lines = said.stdout.splitlines()
    assert lines[0].split() == ["loss", "one.jsonl", "two.jsonl"] and lines[-1] == "n"
    assert f"{found[0]['one.jsonl']:.4f}" in lines[1] and "3 adapters by ties: dense changes" in said.stderr
    folded = ask("merge", *folders[:2], "--eval", "one.jsonl", "--out", "model")["losses"]
    assert folded[-1]["adapter"] == "merged" and folded[-1]["one.jsonl"] != folded[0]["one.jsonl"]


def test_without_a_rule_adapters_are_folded_and_with_one_the_result_may_be(ask, folders):
    folded = ask("merge", *folders[:2], "--out", "model")
    assert folded["as"] == "model" and folded["sites"] == 6 and folded["dtype"] == "bfloat16"
    made = ask("merge", *folders[:2], "--how", "cat", "--as", "model", "--out", "again")
    assert made["as"] == "model" and made["how"] == "cat" and Path("again/model.safetensors").is_file()
    one, other = (load(name).module.state_dict() for name in ("model", "again"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_rank_goes_to_the_rule_that_has_one_and_cuts_the_others(ask, folders):
    svd = ask("merge", *folders, "--how", "svd", "--rank", 3, "--out", "m")
    assert svd["settings"]["rank"] == 3 and svd["highest"] == 3 and svd["lost"] == 0
    cut = ask("merge", *folders, "--how", "ties", "--rank", 3, "--out", "n")
    assert cut["highest"] == 3 and cut["lost"] > 0.1 and cut["worst"]


def test_the_rules_are_listed_with_their_parameters(run, ask):
    assert [rule["name"] for rule in ask("merge", "--list")] == sorted(all_mergings())
    page = run("merge", "--list").stdout
    for name, cls in all_mergings().items():
        assert cls.summary in page
        assert all(f"--{field}" in page for field in cls.model_fields), name


def test_no_parameter_of_a_rule_is_an_option_of_the_command_but_the_rank():
    options = {word.removeprefix("--").replace("-", "_") for option in command.params for word in option.opts}
    fields = {field for cls in all_mergings().values() for field in cls.model_fields}
    assert options & fields <= {"rank"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--how", "tise"), "Did you mean 'ties'"),
        (("--how", "ties", "--densty", "0.3"), "Did you mean 'density'"),
        (("--how", "ties", "--density", "2"), "density is 2"),
        (("--how", "cat", "--weights", "1"), "do not fit 2 adapters"),
        (("--how", "robustmerge", "--weights", "1,2"), "has no weights"),
    ],
)
def test_what_a_rule_does_not_take_is_refused_with_a_sentence(refuse, folders, words, message):
    assert message in refuse("merge", *folders[:2], *words, "--out", "m")["message"]
    assert not Path("m").exists()


def test_what_does_not_fit_a_rule_names_one_that_would(refuse, folders):
    error = refuse("merge", folders[0], folders[2], "--how", "linear", "--out", "m")
    assert f"{folders[2]} changes site" in error["message"] and "`task_arithmetic`" in error["hint"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Missing argument"),
        (("a", "--density", ".3", "--out", "m"), "--density belongs to a rule"),
        (("a", "--rank", "3", "--out", "m"), "--rank belongs to a rule"),
        (("a", "--as", "adapter", "--out", "m"), "--as adapter needs a rule"),
        (("a", "--how", "ties", "--fast", "--out", "m"), "No such option: --fast"),
        (("a", "--how", "ties", "--weights", "x", "--out", "m"), "not a list of numbers"),
        (("a", "--how", "ties"), "Missing option '--out'"),
        (("a", "--how", "ties", "--out", "a"), "would be lost"),
    ],
)
def test_wrong_usage_is_said(run, folders, words, message):
    result = run("merge", *words)
    assert result.exit_code == 2 and message in result.stderr


def test_a_model_in_the_place_of_an_adapter_is_told_where_it_goes(refuse, folders):
    error = refuse("merge", "nano", folders[0], "--out", "m")
    assert "no adapter at nano" in error["message"] and "--model nano" in error["hint"]


def test_a_folder_that_names_no_base_needs_the_model(refuse, folders):
    for file in (folders[0] / "lorica.json", folders[0] / "adapter_config.json"):
        record = json.loads(file.read_text())
        record.pop("base", None)
        record.pop("base_model_name_or_path", None)
        file.write_text(json.dumps(record))
    error = refuse("merge", folders[0], "--out", "m")
    assert "does not say which model" in error["message"] and "--model" in error["hint"]
