"""`lorica compose`: an adapter folder, a log beside it, and the table of what it must be compared with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lorica.adapters.files import load_adapter
from lorica.adapters.lineage import lineage_at
from lorica.engine.host import Host
from lorica.methods import make_method
from lorica.models import load

pytest.importorskip("nevergrad", reason="nevergrad is not installed: pip install 'lorica[compose]'")


@pytest.fixture
def folders(tmp_path):
    """Three small adapters of nano, a little off the base."""
    host = Host(load("nano"))
    for seed, name in enumerate("abc"):
        adapter = host.add(name, make_method("lora", rank=2), ["q_proj"], seed=seed)
        adapter.flat += 0.05 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(seed))
        host.save(name, name)
    return ["a", "b", "c"]


def test_a_composed_adapter_is_written_with_its_log_and_a_table(run, folders, rows):
    result = run("compose", *folders, "--data", rows, "--test", rows, "--out", "made", "--budget", 6, "--seed", 2)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == "made"
    lines = result.stderr.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("weights"))
    assert lines[head].split() == ["weights", "loss", "with", "penalty", "test", "loss"]
    names = [line.split("  ")[0] for line in lines[head + 1 : head + 6]]
    assert names == ["zero", "uniform", "best single", "random search", "lorahub"]
    log = json.loads(Path("made/compose.json").read_text(encoding="utf-8"))
    assert log["optimizer"]["name"] == "Cobyla" and len(log["evaluations"]) == 6
    assert [Path(parent.path).name for parent in lineage_at("made").parents] == folders
    assert load_adapter(Path("made"), load("nano"), "made").layout.trainable_count() == 6 * 2 * 512


def test_json_is_one_document(ask, folders, rows):
    found = ask("compose", *folders, "--data", rows, "--out", "made", "--budget", 4, "--candidates", 2, "--l1", 0.2)
    assert found["path"] == "made" and len(found["examples"]) == 5 and len(found["adapters"]) == 2
    assert [row["name"] for row in found["rows"]][-1] == "lorahub" and found["settings"]["l1"] == 0.2


def test_other_ways_and_their_settings(ask, folders, rows):
    given = ["compose", *folders, "--data", rows, "--out", "made"]
    found = ask(*given, "--how", "task_arithmetic", "--set", "scale=0.5", "--budget", 3)
    assert found["report"]["settings"]["scale"] == 0.5 and found["rows"][-1]["name"] == "task_arithmetic"
    learnt = ask(*given[:-1], "soup", "--how", "lora_soups", "--steps", 2, "--examples", 4)
    assert learnt["settings"]["steps"] == 2 and len(learnt["losses"]) == 2 and len(learnt["examples"]) == 4
    assert set(learnt["rows"][-1]) == {"name", "weights", "loss", "value", "test"}


def test_what_does_not_fit_is_one_sentence(refuse, run, folders, rows):
    given = ["compose", *folders, "--data", rows, "--out", "made"]
    assert "chooses another optimiser" in refuse(*given, "--optimizer", "NGOpt")["message"]
    assert "no optimiser 'cobila'" in refuse(*given, "--optimizer", "cobila")["message"]
    assert "no rule of merging 'lorahug'" in refuse(*given, "--how", "lorahug")["message"]
    assert "has 16 rows, and 40 examples were asked for" in refuse(*given, "--examples", 40)["message"]
    assert "has no setting 'densty'. Did you mean" in refuse(*given, "--how", "ties", "--set", "densty=1")["message"]
    wrong = run(*given, "--steps", 3)
    assert wrong.exit_code == 2 and "--steps does nothing with --how lorahub" in wrong.stderr
    wrong = run(*given, "--how", "lora_soups", "--budget", 3)
    assert wrong.exit_code == 2 and "--budget does nothing with --how lora_soups" in wrong.stderr
    wrong = run(*given[:-1], "./a")
    assert wrong.exit_code == 2 and "--out a is one of the adapters" in wrong.stderr
    assert not Path("made").exists()
