"""The quickstart: its report is what was seen, a finished run is shown again, and its two proofs can fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorica
from lorica.core.errors import FormatError, MethodError, StorageError, TargetError
from lorica.methods import all_methods
from lorica.recipes import quickstart, sft
from lorica.recipes.proofs import peft_proof
from lorica.recipes.quickstart import Report

ROWS = 3
SHORT = ["steps=2", "batch_size=4"]


@pytest.fixture
def short(small: str, rows: Path) -> list[str]:
    """Two steps on a small model and few rows."""
    return [*SHORT, f"model={small}", f"data.path={rows}"]


@pytest.fixture
def report(tmp_path: Path, short: list[str]) -> Report:
    """Two steps of LoRA, and three questions of each file."""
    return quickstart.run(quickstart.configure("lora", str(tmp_path / "run"), short), rows=ROWS)


def test_a_run_is_trained_asked_proved_merged_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "run"
    report = quickstart.run(quickstart.configure("lora", str(out), SHORT), rows=ROWS)
    names = {"config.yaml", "metrics.jsonl", "loss.png", "checkpoints", "adapter", "merged", quickstart.REPORT}
    assert {p.name for p in out.iterdir()} == names
    assert (report.steps, report.method, report.model, report.reused) == (2, "lora", "nano", False)
    assert {name: score.rows for name, score in report.scores.items()} == {"test": ROWS, "handwritten": ROWS}
    assert report.scores["test"].total >= 300 and report.scores["handwritten"].total >= 150
    assert len(report.cases) == 3 and all(case.expected.startswith('{"call": ') for case in report.cases)
    assert report.parameters == sum(t.numel() for t in load_file(out / "adapter/adapter_model.safetensors").values())
    assert set(report.seconds) == {"before", "training", "after", "proofs", "total"}
    assert Report.from_dict(json.loads((out / quickstart.REPORT).read_text())) == report


def test_both_proofs_hold_and_say_by_how_much(report: Report) -> None:
    assert report.peft.status == "same"
    assert report.peft.difference is not None and report.peft.effect is not None
    assert report.peft.difference < 1e-3 < report.peft.effect
    assert report.merge.status == "merged" and report.merge.path is not None
    host = lorica.attach(lorica.load(report.model, dtype="float32"), lorica.make_method("lora"))
    host.load(report.adapter, "trained")
    host.activate("trained")
    ids = torch.tensor([[1, 40, 50, 60]])
    merged = lorica.load(report.merge.path)
    with torch.no_grad():
        torch.testing.assert_close(merged.module(input_ids=ids).logits, host(input_ids=ids).logits, atol=1e-3, rtol=0)


def test_a_finished_run_is_shown_again_and_fresh_redoes_it(report: Report, short: list[str]) -> None:
    config = quickstart.configure("lora", report.path, short)
    again = quickstart.run(config, rows=ROWS)
    assert again == replace(report, reused=True)
    redone = quickstart.run(config, fresh=True, rows=ROWS)
    assert not redone.reused
    assert (redone.loss, redone.scores, redone.cases) == (report.loss, report.scores, report.cases)


def test_another_number_of_rows_asks_again_without_training_again(report: Report, short: list[str]) -> None:
    more = quickstart.run(quickstart.configure("lora", report.path, short), rows=ROWS + 1)
    assert not more.reused and more.steps == 2
    assert more.scores["test"].rows == ROWS + 1


def test_a_run_of_other_settings_is_kept(report: Report, short: list[str]) -> None:
    with pytest.raises(StorageError, match="holds a run with other settings"):
        quickstart.run(quickstart.configure("lora", report.path, ["steps=3"]))
    (Path(report.path) / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"holds 'notes.txt', which the quickstart did not write"):
        quickstart.run(quickstart.configure("lora", report.path, short), fresh=True)
    assert (Path(report.path) / "adapter").is_dir()


def test_a_corrupt_report_is_refused_by_name(report: Report, short: list[str]) -> None:
    file = Path(report.path) / quickstart.REPORT
    for text in ("{", '{"method": "lora"}'):
        file.write_text(text)
        with pytest.raises(FormatError, match=quickstart.REPORT):
            quickstart.run(quickstart.configure("lora", report.path, short), rows=ROWS)


def test_an_interrupted_run_goes_on_to_the_same_end(report: Report, short: list[str], tmp_path: Path) -> None:
    class Interrupt(quickstart.QuickstartObserver):
        def step(self, record: dict[str, object], total: int) -> None:
            raise ZeroDivisionError

    config = quickstart.configure("lora", str(tmp_path / "stopped"), [*short, "save_every=1"])
    with pytest.raises(ZeroDivisionError):
        quickstart.run(config, Interrupt(), rows=ROWS)
    resumed = quickstart.run(config, rows=ROWS)
    assert (resumed.loss, resumed.scores, resumed.cases) == (report.loss, report.scores, report.cases)


def test_a_folder_with_other_values_is_not_proved_the_same(report: Report, short: list[str]) -> None:
    ready = sft.plan(quickstart.configure("lora", report.path, short))
    file = Path(report.adapter) / "adapter_model.safetensors"
    tensors = load_file(file)
    prompts = [[1, 40, 50, 60]]
    ready.client.adapter.flat.add_(0.01 * torch.randn(ready.client.adapter.flat.shape))
    assert peft_proof(ready, Path(report.adapter), prompts).status == "different"
    save_file({key: torch.zeros_like(value) for key, value in tensors.items()}, file, metadata={"format": "pt"})
    ready.client.adapter.flat.zero_()  # equal, and both without any effect
    assert peft_proof(ready, Path(report.adapter), prompts).status == "different"


def test_an_unknown_method_is_refused_with_its_neighbour() -> None:
    with pytest.raises(MethodError, match="Did you mean 'lora'"):
        quickstart.configure("lorra")


NO_MERGE = {"prompt": "prompt", "prefix": "prefix", "longlora": "tied"}
"""Methods that nano cannot be merged with, each with a word of the reason: no weight, or one that is tied."""
NO_PLACE = ("lora_fused",)
"""Methods that nano has no place for."""


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in all_methods() if name not in ("lora", "bias", *NO_PLACE)])
def test_every_method_can_be_chosen(method: str, tmp_path: Path) -> None:
    found = quickstart.run(quickstart.configure(method, str(tmp_path / method), SHORT), rows=ROWS)
    assert found.method == method and found.parameters > 0
    has_peft = all_methods()[method].peft is not None
    assert found.peft.status == ("same" if has_peft else "unsupported")
    assert found.merge.status == ("impossible" if method in NO_MERGE else "merged")
    assert NO_MERGE.get(method, "") in (found.merge.reason or "")


@pytest.mark.parametrize("method", NO_PLACE)
def test_a_method_without_a_place_in_nano_is_refused_with_what_it_looks_for(
    method: str, rows: Path, tmp_path: Path
) -> None:
    settings = [*SHORT, f"data.path={rows}"]
    with pytest.raises(TargetError, match="this backbone has none of them") as refused:
        quickstart.run(quickstart.configure(method, str(tmp_path / method), settings), rows=ROWS)
    assert all(name in str(refused.value) for name in all_methods()[method].default_targets)
