"""The command line in this process and in a process of its own, and a small data file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lorica.cli.main import cli

Run = Callable[..., Result]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command runs in a folder of its own, so that defaults such as runs/sft write nothing here."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run() -> Run:
    """Call `lorica ARGS...`; exceptions that are no Lorica errors come through."""

    def call(*args: Any, stdin: str | None = None, env: dict[str, str | None] | None = None) -> Result:
        return CliRunner().invoke(cli, [str(a) for a in args], input=stdin, catch_exceptions=False, env=env)

    return call


@pytest.fixture
def ask(run: Run) -> Callable[..., Any]:
    """Call `lorica ARGS... --json` and parse what it prints; nothing else may be on stdout or stderr."""

    def call(*args: Any, stdin: str | None = None) -> Any:
        result = run(*args, "--json", stdin=stdin)
        assert result.exit_code == 0, result.stderr
        assert result.stderr == ""
        return json.loads(result.stdout)

    return call


@pytest.fixture
def refuse(run: Run) -> Callable[..., dict[str, Any]]:
    """Call with and without --json something that must fail with one sentence; returns the error as parsed."""

    def call(*args: Any, exit_code: int = 1) -> dict[str, Any]:
        said = run(*args)
        assert said.exit_code == exit_code, said.stderr
        assert said.stdout == ""
        lines = said.stderr.rstrip("\n").split("\n")
        assert lines[0].startswith("error: ")
        result = run(*args, "--json")
        assert result.exit_code == exit_code
        assert result.stdout == ""
        error: dict[str, Any] = json.loads(result.stderr)["error"]
        assert set(error) == {"code", "message", "hint"}
        assert lines[0] == f"error: {error['message']}"
        assert (error["hint"] is None) == (len(lines) == 1)
        return error

    return call


def lorica(*args: Any, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    """Start `lorica ARGS...` in a process of its own, which Ctrl-C reaches."""
    settings = {"env": ENV, "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    command = [sys.executable, "-m", "lorica.cli.main", *map(str, args)]
    # in the background of a shell these tests ignore Ctrl-C, and whatever they start would inherit that
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, cwd=cwd, text=True, **settings)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Sixteen chat rows."""
    path = tmp_path / "rows.jsonl"
    lines = []
    for i in range(16):
        turns = [{"role": "user", "content": f"wake me at {i}"}, {"role": "assistant", "content": f"alarm {i}"}]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def adapter(run: Run, rows: Path, tmp_path: Path) -> Path:
    """A trained LoRA adapter for nano."""
    out = tmp_path / "trained"
    result = run("train", "--data", rows, "--out", out, "--steps", 2, "--batch-size", 4, "method.rank=2")
    assert result.exit_code == 0, result.stderr
    return Path(result.stdout.strip())
