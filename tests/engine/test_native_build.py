"""A C file is compiled once, kept where nobody else can write, and never stands in the way."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorica.engine.native import build, kernels, passes, proved

FOUR = "int four(void) { return NUMBER; }\n"
pytestmark = pytest.mark.skipif(
    proved.kernels_for(torch.float32) is None, reason="there is no C compiler on this machine"
)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "code" / "four.c"
    path.parent.mkdir()
    path.write_text(FOUR)
    return path


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "lorica" / "native").iterdir())


def test_a_file_is_compiled_once_and_again_when_it_or_a_header_or_a_macro_changes(source: Path, tmp_path: Path) -> None:
    for _ in range(2):
        found = build.library(source, ["NUMBER=4"])
        assert found is not None
        assert found.four() == 4
    (only,) = kept(tmp_path)
    written = only.stat().st_mtime_ns
    assert build.library(source, ["NUMBER=5"]).four() == 5  # type: ignore[union-attr]
    source.with_name("other.h").write_text("/* */")
    assert build.library(source, ["NUMBER=4"]) is not None
    source.write_text(FOUR.replace("NUMBER", "NUMBER + 1"))
    assert build.library(source, ["NUMBER=4"]).four() == 5  # type: ignore[union-attr]
    assert len(kept(tmp_path)) == 4
    assert only.stat().st_mtime_ns == written
    assert only.parent.stat().st_mode & 0o077 == 0


def test_without_a_compiler_there_are_no_kernels_and_the_log_says_how_to_have_some(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "/no/such/compiler")
    with caplog.at_level(logging.INFO):
        assert build.library(source, ["NUMBER=4"]) is None
    assert "no C compiler (set CC, or install one): four.c runs as torch operations" in caplog.text


@pytest.mark.parametrize("broken", ["code", "compiler", "library"])
def test_what_cannot_be_compiled_or_loaded_is_said_and_does_without(
    broken: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if broken == "code":
        source.write_text("nonsense")
    elif broken == "compiler":
        monkeypatch.setenv("CC", str(shutil.which("false")))
    else:
        compiler = build._compiler()
        assert compiler is not None
        name = f"four-{build._fingerprint(source, ['NUMBER=4'], compiler)}.so"
        (build._cache() / name).write_bytes(b"not a library")
    assert build.library(source, ["NUMBER=4"]) is None
    assert "four.c could not be compiled and loaded" in caplog.text
    assert not [path for path in kept(tmp_path) if path.name.startswith("tmp")]


def test_a_folder_that_others_may_write_to_is_not_used(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "lorica" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert build.library(source, ["NUMBER=4"]).four() == 4  # type: ignore[union-attr]
    assert not list(folder.iterdir())


def test_processes_that_compile_at_once_do_not_disturb_each_other(source: Path, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from lorica.engine.native.build import library
assert library(Path({str(source)!r}), ["NUMBER=4"]).four() == 4
"""
    running = [subprocess.Popen([sys.executable, "-c", code], env=os.environ.copy()) for _ in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    assert len(kept(tmp_path)) == 1


def test_kernels_that_differ_from_torch_are_not_handed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for owner, wrong in ((kernels, ("(acc + i) / sum", "(acc + i)")), (passes, ("* root / width", "* root"))):
        copied = tmp_path / owner.SOURCE.name
        text = owner.SOURCE.read_text()
        copied.write_text(text.replace(*wrong))
        assert copied.read_text() != text
        for header in owner.SOURCE.parent.glob("*.h"):
            shutil.copy(header, tmp_path)
        monkeypatch.setattr(owner, "SOURCE", copied)
        monkeypatch.setattr(proved, "SOURCE", copied)
        ask = proved.kernels_for if owner is kernels else proved.passes_for
        assert ask.__wrapped__(torch.float32) is None
        assert "differ from torch here, and are not used" in caplog.text
        caplog.clear()
