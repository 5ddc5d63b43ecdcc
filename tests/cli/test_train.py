"""`lorica train`: from a file or flags to a run directory; dry runs; stopping with Ctrl-C and going on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorica.recipes.rundir import RunDir

from .conftest import ENV, Run, lorica

Ask = Callable[..., Any]


def test_flags_alone_make_a_run_and_print_the_adapter(run: Run, rows: Path, tmp_path: Path) -> None:
    result = run("train", "--data", rows, "--out", "out", "--steps", 3, "--batch-size", 4, "--method", "ia3")
    assert result.exit_code == 0
    assert result.stdout == "out/adapter\n"
    assert {p.name for p in Path("out").iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "loss.png",
        "checkpoints",
        "adapter",
    }
    for said in ("messages, because all 16 rows", "⟦alarm 0<|im_end|>⟧", "nothing is truncated", "ia3 on", "step 3/3"):
        assert said in result.stderr
    assert yaml.safe_load(Path("out/config.yaml").read_text())["method"]["name"] == "ia3"


def test_a_config_file_is_overridden_by_flags_and_both_by_assignments(ask: Ask, rows: Path) -> None:
    Path("run.yaml").write_text(f"data: {{path: {rows}}}\nsteps: 2\nseed: 1\nmethod: {{name: lora, rank: 4}}\nout: a\n")
    found = ask("train", "run.yaml", "--steps", 3, "--seed", 2, "seed=3", "method.rank=2", "--dry-run")["config"]
    assert (found["steps"], found["seed"], found["method"]["rank"], found["out"]) == (3, 3, 2, "a")


def test_a_method_flag_replaces_the_settings_of_the_files_method(ask: Ask, rows: Path) -> None:
    Path("run.yaml").write_text(f"data: {{path: {rows}}}\nmethod: {{name: lora, dropout: 0.5}}\n")
    assert (
        ask("train", "run.yaml", "--method", "prompt", "method.tokens=3", "--dry-run")["config"]["method"]["tokens"]
        == 3
    )


def test_a_finished_run_is_one_document(ask: Ask, rows: Path) -> None:
    found = ask("train", "--data", rows, "--out", "out", "--steps", 2, "--batch-size", 4)
    assert found["steps"] == 2
    assert found["adapter"] == "out/adapter"
    assert found["interrupted"] is False
    assert found["tokens_per_second"] > 0


def test_a_dry_run_shows_everything_and_writes_nothing(run: Run, ask: Ask, rows: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    args = ("train", "--data", rows, "--method", "lora", "method.rank=4", "--dry-run")
    text, found = run(*args), ask(*args)
    assert text.exit_code == 0
    for said in ("rank: 4", "q_proj", "messages, because", "peak", "Dry run: nothing was written."):
        assert said in text.stdout
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    trained = found["trained"]
    assert trained["sites"] == sum(g["count"] for g in trained["groups"]) == 42
    assert trained["parameters"] == sum(g["parameters"] for g in trained["groups"])
    assert trained["share"] == pytest.approx(trained["parameters"] / trained["base_parameters"])
    assert found["memory"]["total"] > found["memory"]["weights"] > 0


def test_nothing_to_train_on_is_wrong_usage(run: Run, rows: Path) -> None:
    for args in ((), ("steps=3",), ("a.yaml", "b.yaml"), ("--resume", "out", "steps=3")):
        assert run("train", *args).exit_code == 2, args


def test_ctrl_c_leaves_a_checkpoint_and_prints_the_command_that_goes_on(run: Run, rows: Path, tmp_path: Path) -> None:
    settings = ("--data", rows, "--batch-size", "4", "--steps", "14", "method.dropout=0.1", "save_every=100")
    process = lorica("train", *settings, "--out", "stopped dir", cwd=tmp_path)
    out = RunDir(tmp_path / "stopped dir")
    _wait_for_steps(process, out, 2)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "lorica train --resume 'stopped dir'" in stderr
    assert "Traceback" not in stderr
    assert len(out.checkpoints()) == 1
    resumed = run("train", "--resume", "stopped dir")
    assert resumed.exit_code == 0
    assert run("train", *settings, "--out", "whole").exit_code == 0
    one, two = (Path(d, "adapter/adapter_model.safetensors").read_bytes() for d in ("stopped dir", "whole"))
    assert one == two


def test_without_colour_or_terminal_progress_is_plain_lines(run: Run, rows: Path, small: str) -> None:
    settings = ("--model", small, "--steps", 40, "--batch-size", 1)
    result = run("train", "--data", rows, "--out", "out", *settings, env={"NO_COLOR": "1"})
    lines = [line for line in result.stderr.split("\n") if line.startswith("step ")]
    assert 20 <= len(lines) <= 22
    assert lines[-1].startswith("step 40/40  loss ")
    assert all("tokens/s" in line and "left" in line for line in lines)


@pytest.mark.slow
def test_on_a_terminal_there_is_a_bar(rows: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    env = {k: v for k, v in ENV.items() if k != "NO_COLOR"} | {"TERM": "xterm", "COLUMNS": "120"}
    shown = lorica("train", "--data", rows, "--out", "out", "--steps", "4", cwd=tmp_path, env=env, stderr=slave)
    os.close(slave)
    parts = []
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:
            break
        if not part:
            break
        parts.append(part)
    stdout, _ = shown.communicate(timeout=60)
    text = b"".join(parts).decode()
    assert shown.returncode == 0
    assert stdout == "out/adapter\n"
    assert "━" in text
    assert "4/4" in text
    assert "tokens/s" in text


def _wait_for_steps(process: Any, out: RunDir, steps: int) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if out.metrics.exists() and out.metrics.read_bytes().count(b"\n") >= steps:
            return
        time.sleep(0.005)
    raise AssertionError(process.communicate()[1])


def test_metrics_are_what_the_run_says(run: Run, rows: Path) -> None:
    run("train", "--data", rows, "--out", "out", "--steps", 3)
    records = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3]
