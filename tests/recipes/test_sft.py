"""A run: what it leaves behind, and that stopping it anywhere changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorica.core.errors import MethodError, MissingError, ResumeError, StorageError
from lorica.recipes import sft
from lorica.recipes.config import SFTConfig, to_yaml
from lorica.recipes.rundir import RunDir

MakeConfig = Callable[..., SFTConfig]


class StoppedError(Exception):
    """Stands for anything that ends a process in the middle of a step."""


class StopAt(sft.Observer):
    """Ends the run right after one step, before its checkpoint."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, record: dict[str, Any], steps: int) -> None:
        if record["step"] == self.at:
            raise StoppedError


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def curve(path: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in RunDir(path).records()]


def same(a: Path, b: Path) -> bool:
    one, two = weights(a / "adapter"), weights(b / "adapter")
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one) and curve(a) == curve(b)


DROPPING, DORA = {"name": "lora", "rank": 4, "dropout": 0.1}, {"name": "dora", "rank": 2}


@pytest.mark.parametrize(
    ("method", "steps"),
    [(DROPPING, (1, 2, 3, 5)), (DORA, (3,)), pytest.param(DORA, (1, 2, 5), marks=pytest.mark.slow)],
    ids=["lora", "dora", "dora elsewhere"],
)
def test_a_run_stopped_after_any_step_and_resumed_equals_the_undisturbed_one_bit_for_bit(
    config: MakeConfig, tmp_path: Path, method: dict[str, Any], steps: tuple[int, ...]
) -> None:
    whole = sft.run(config(method=method, out=str(tmp_path / "whole")))
    for step in steps:
        path = tmp_path / f"stopped-{step}"
        with pytest.raises(StoppedError):
            sft.run(config(method=method, out=str(path)), StopAt(step))
        torch.manual_seed(step)  # a new process starts with another random state
        resumed = sft.resume(path)
        assert resumed.steps == whole.steps == 6
        assert same(tmp_path / "whole", path), f"stopped after step {step}"


def test_a_run_stopped_twice_still_equals_the_undisturbed_one(config: MakeConfig, tmp_path: Path) -> None:
    sft.run(config(out=str(tmp_path / "whole")))
    path = tmp_path / "run"
    with pytest.raises(StoppedError):
        sft.run(config(), StopAt(3))
    with pytest.raises(StoppedError):
        sft.resume(path, StopAt(5))
    sft.resume(path)
    assert same(tmp_path / "whole", path)


@pytest.mark.slow
def test_a_killed_process_loses_nothing_that_was_saved(config: MakeConfig, tmp_path: Path) -> None:
    sft.run(config(out=str(tmp_path / "whole"), steps=30, save_every=3))
    path = tmp_path / "run"
    settings = tmp_path / "config.yaml"
    settings.write_text(to_yaml(config(steps=30, save_every=3)), encoding="utf-8")
    code = "import sys; from lorica.recipes import sft, config; sft.run(config.read_config(sys.argv[1]))"
    for number, lines in enumerate((4, 11, 20)):
        again = "import sys; from lorica.recipes import sft; sft.resume(sys.argv[1])"
        command = (
            [sys.executable, "-c", code, str(settings)] if number == 0 else [sys.executable, "-c", again, str(path)]
        )
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        metrics = path / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= lines:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    torch.set_num_threads(1)
    sft.resume(path)
    assert same(tmp_path / "whole", path)


def test_a_run_directory_holds_config_metrics_curve_checkpoints_and_adapter(config: MakeConfig) -> None:
    outcome = sft.run(config(keep=2))
    names = {p.name for p in outcome.path.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "loss.png", "checkpoints", "adapter"}
    assert [p.name for p in RunDir(outcome.path).checkpoints()] == ["step-000004.pt", "step-000006.pt"]
    assert (outcome.path / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (outcome.path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["loss"] < records[0]["loss"]


def test_the_written_config_makes_the_same_run_again(config: MakeConfig, tmp_path: Path) -> None:
    first = sft.run(config())
    settings = SFTConfig.parse(__import__("yaml").safe_load((first.path / "config.yaml").read_text()))
    second = sft.run(settings.replace(out=str(tmp_path / "again")))
    assert same(first.path, second.path)


def test_micro_batches_do_not_change_the_step(config: MakeConfig, tmp_path: Path) -> None:
    plain = {"name": "lora", "rank": 4}
    small = sft.run(config(method=plain, token_budget=32, out=str(tmp_path / "small")))
    large = sft.run(config(method=plain, token_budget=4096, out=str(tmp_path / "large")))
    assert small.loss == pytest.approx(large.loss, rel=2e-2)


def test_checkpointing_gives_the_same_curve(config: MakeConfig, tmp_path: Path) -> None:
    sft.run(config(out=str(tmp_path / "plain")))
    sft.run(config(out=str(tmp_path / "checkpointed"), checkpointing=True))
    assert [c[1] for c in curve(tmp_path / "plain")] == [c[1] for c in curve(tmp_path / "checkpointed")]


def test_evaluation_is_logged_and_does_not_change_the_training(config: MakeConfig, rows: Path, tmp_path: Path) -> None:
    sft.run(config(out=str(tmp_path / "plain")))
    data = {"path": str(rows), "eval_path": str(rows)}
    sft.run(config(out=str(tmp_path / "watched"), data=data, eval_every=2))
    assert same(tmp_path / "plain", tmp_path / "watched")
    assert [r["step"] for r in RunDir(tmp_path / "watched").records() if "eval_loss" in r] == [2, 4, 6]


def test_a_second_run_in_the_same_directory_is_refused_and_loses_nothing(config: MakeConfig) -> None:
    first = sft.run(config())
    before = {p: p.read_bytes() for p in first.path.rglob("*") if p.is_file()}
    with pytest.raises(StorageError, match="holds a run already"):
        sft.run(config())
    assert {p: p.read_bytes() for p in first.path.rglob("*") if p.is_file()} == before


def test_resuming_on_changed_data_is_refused(config: MakeConfig, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        sft.run(config(), StopAt(3))
    rows.write_text(rows.read_text() + rows.read_text().splitlines()[0] + "\n")
    with pytest.raises(ResumeError, match="has changed since the run began"):
        sft.resume(tmp_path / "run")


def test_resuming_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"has no config\.yaml"):
        sft.resume(tmp_path)


def test_a_corrupt_checkpoint_is_named_with_the_way_out(config: MakeConfig) -> None:
    outcome = sft.run(config())
    newest = RunDir(outcome.path).checkpoints()[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.raises(ResumeError, match=r"step-000006\.pt cannot be read") as caught:
        sft.resume(outcome.path)
    assert "step-000004.pt" in str(caught.value.hint)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(config: MakeConfig) -> None:
    steep = {"lr": 1e30, "clip": None, "schedule": "constant", "warmup": 0}
    with pytest.raises(MethodError, match="training cannot go on"):
        sft.run(config(optimizer=steep, method={"name": "delta"}))


def test_a_gpu_that_is_not_there_is_said(config: MakeConfig) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(MissingError, match="'cuda' is not available"):
        sft.plan(config(device="cuda"))
