"""Bad input: one clear sentence, a non-zero exit, and nothing lost."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorica.models.loading import locate
from lorica.recipes.rundir import RunDir

from .conftest import Run, lorica

Refuse = Callable[..., dict[str, Any]]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_missing_data_file_names_its_neighbour(refuse: Refuse, rows: Path) -> None:
    error = refuse("train", "--data", rows.with_name("row.jsonl"), "--out", "out")
    assert error["code"] == "missing"
    assert "There is no data file" in error["message"]
    assert "'rows.jsonl'" in error["message"]
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("cut.jsonl", b'{"text": "a"}\n{"text": "b', "line 2 is not valid JSON"),
        ("latin.jsonl", '{"text": "é"}\n'.encode("latin-1"), "is not UTF-8"),
        ("empty.jsonl", b"", "is empty"),
        ("broken.parquet", b"PAR1 not really", "broken.parquet"),
        ("notes.docx", b"x", "must end in .jsonl"),
    ],
)
def test_a_corrupt_data_file_is_named(refuse: Refuse, name: str, content: bytes, expected: str) -> None:
    Path(name).write_bytes(content)
    for command in (("train", "--out", "out", "--data", name), ("data", "show", name)):
        error = refuse(*command)
        assert name in error["message"]
        assert expected in error["message"]
    assert not Path("out").exists()


def test_a_row_of_the_wrong_shape_names_the_line_and_the_accepted_shapes(refuse: Refuse, rows: Path) -> None:
    lines = rows.read_text().splitlines()
    lines.insert(4, json.dumps({"question": "a", "answer": "b"}))
    rows.write_text("\n".join(lines) + "\n")
    error = refuse("train", "--data", rows, "--out", "out")
    assert "rows.jsonl, line 5" in error["message"]
    for shape in ("messages", "sharegpt", "alpaca", "prompt_completion", "text"):
        assert shape in error["hint"]
    assert not Path("out").exists()


def test_an_unknown_method_names_its_neighbour(refuse: Refuse, rows: Path) -> None:
    for command in (
        ("train", "--data", rows, "--method", "lorra"),
        ("methods", "lorra"),
        ("quickstart", "--method", "lorra"),
    ):
        assert "no method 'lorra'. Did you mean 'lora'" in refuse(*command)["message"]


@pytest.mark.parametrize(
    ("rank", "expected"), [(0, "rank"), (-3, "rank"), (1000, "is larger than site"), ("two", "rank")]
)
def test_a_rank_that_cannot_be_is_refused(refuse: Refuse, rows: Path, rank: Any, expected: str) -> None:
    error = refuse("train", "--data", rows, "--out", "out", f"method.rank={rank}")
    assert expected in error["message"]
    assert str(rank) in error["message"]
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("optimiser.lr=1e-3", "'optimizer'"),
        ("optimizer.lrr=1e-3", "'lr'"),
        ("method.ranks=3", "'rank'"),
        ("targets.include=q_prj", "'q_proj'"),
        ("stepss=3", "'steps'"),
    ],
)
def test_an_unknown_setting_names_its_neighbour(refuse: Refuse, rows: Path, setting: str, expected: str) -> None:
    assert f"Did you mean {expected}" in refuse("train", "--data", rows, "--out", "out", setting)["message"]


@pytest.mark.parametrize(("text", "expected"), [("steps: [1\n", "not valid YAML"), ("- 1\n", "must hold settings")])
def test_a_config_that_is_none_is_refused(refuse: Refuse, rows: Path, text: str, expected: str) -> None:
    Path("run.yaml").write_text(text)
    assert expected in refuse("train", "run.yaml", "--data", rows)["message"]


def test_a_missing_config_lists_the_shipped_ones(refuse: Refuse) -> None:
    error = refuse("train", "quickstrat")
    assert "Did you mean 'quickstart'" in error["message"]
    assert "dora" in error["hint"]


def test_a_missing_model_and_a_missing_adapter_are_named(refuse: Refuse) -> None:
    assert "./absent" in refuse("models", "./absent")["message"]
    assert "absent" in refuse("sample", "--prompt", "a", "--adapter", "absent")["message"]
    assert "absent" in refuse("inspect", "absent")["message"]


def test_a_model_without_a_tokenizer_is_refused_where_text_is_needed(refuse: Refuse, rows: Path) -> None:
    for command in (("train", "--data", rows), ("sample", "--prompt", "a"), ("data", "show", rows)):
        assert "has no tokenizer" in refuse(*command, "--model", "tiny-llama")["message"]


def test_an_adapter_that_is_not_finite_is_refused(refuse: Refuse, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = sorted(tensors)[3]
    tensors[key].view(-1)[0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    before = contents(adapter)
    error = refuse("sample", "--adapter", adapter, "--prompt", "a")
    assert error["code"] == "format"
    assert "finite" in error["message"]
    assert "finite" in refuse("merge", adapter, "--out", "merged")["message"]
    assert not Path("merged").exists()
    assert contents(adapter) == before


@pytest.mark.parametrize("keep", [0, 40, -10])
def test_a_truncated_adapter_is_refused(refuse: Refuse, adapter: Path, keep: int) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[: keep or None] if keep else b"")
    for command in (("sample", "--prompt", "a", "--adapter", adapter), ("inspect", adapter)):
        assert refuse(*command)["code"] == "format"


def test_an_adapter_for_another_base_is_refused(refuse: Refuse, adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(locate("nano"), other)
    tensors = load_file(other / "model.safetensors")
    for name, tensor in tensors.items():
        if "down_proj" in name:
            tensors[name] = tensor + 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    error = refuse("sample", "--model", other, "--adapter", adapter, "--prompt", "a")
    assert error["code"] == "mismatch"
    error = refuse("merge", adapter, "--model", other, "--out", "merged")
    assert error["code"] == "mismatch"
    assert not Path("merged").exists()


def test_a_run_directory_in_use_is_kept(refuse: Refuse, adapter: Path, rows: Path) -> None:
    before = contents(adapter.parent)
    error = refuse("train", "--data", rows, "--out", adapter.parent)
    assert "holds a run already" in error["message"]
    assert "--resume" in error["hint"]
    assert contents(adapter.parent) == before


def test_resuming_what_is_no_run_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    assert "is not a run directory" in refuse("train", "--resume", tmp_path)["message"]


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_previous_checkpoint_survives(run: Run, rows: Path, tmp_path: Path) -> None:
    settings = ("--data", rows, "--batch-size", "4", "method.rank=2", "save_every=2")
    assert run("train", *settings, "--out", "whole", "--steps", 6).exit_code == 0
    checkpoint = max(p.stat().st_size for p in RunDir("whole").checkpoints())

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (checkpoint // 2, checkpoint // 2))

    # a run that is stopped after four steps, and cannot write what comes next
    out = RunDir(tmp_path / "out")
    assert run("train", *settings, "--out", "out", "--steps", 6).exit_code == 0
    out.checkpoints()[-1].unlink()
    shutil.rmtree(out.adapter)
    before = {p.name: p.read_bytes() for p in out.checkpoints()}
    assert list(before) == ["step-000004.pt"]
    process = lorica("train", "--resume", "out", cwd=tmp_path, preexec_fn=limit)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr
    assert stdout == ""
    assert "error: Cannot write out/checkpoints/step-000006.pt" in stderr
    assert "Traceback" not in stderr
    assert {p.name: p.read_bytes() for p in out.checkpoints()} == before
    assert not list(out.path.rglob("*.partial"))
    assert run("train", "--resume", "out").exit_code == 0
    one, two = (Path(d, "adapter/adapter_model.safetensors").read_bytes() for d in ("out", "whole"))
    assert one == two
