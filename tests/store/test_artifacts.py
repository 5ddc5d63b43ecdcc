from __future__ import annotations

import errno
import uuid
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.core.errors import ConfigError, FormatError, MissingError, StorageError
from lorica.store.artifacts import Artifacts, clean

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x" * 5000, "deep/er/file": b""}


def folder(path: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def read(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_folder_comes_back_as_it_was(artifacts: Artifacts, tmp_path: Path) -> None:
    assert not artifacts.exists("runs/r:1/a")
    artifacts.put_folder(folder(tmp_path / "in"), "runs/r:1/a")
    assert artifacts.exists("runs/r:1/a")
    assert artifacts.list("runs/r:1/a") == {name: len(content) for name, content in FILES.items()}
    assert artifacts.size("runs/r:1/a") == 5002
    artifacts.get_folder("runs/r:1/a", tmp_path / "out")
    assert read(tmp_path / "out") == FILES
    assert read(artifacts.local_path("runs/r:1/a")) == FILES
    assert artifacts.get_bytes("runs/r:1/a/adapter_config.json") == b"{}"
    assert sorted(artifacts.everything()) == sorted(f"runs/r:1/a/{name}" for name in FILES)


def test_a_file_comes_back_as_it_was(artifacts: Artifacts, tmp_path: Path) -> None:
    artifacts.put_bytes("snap/one", b"one")
    (tmp_path / "two").write_bytes(b"two")
    artifacts.put_file(tmp_path / "two", "snap/two")
    assert artifacts.get_bytes("snap/one") == b"one" and artifacts.size("snap/two") == 3
    with artifacts.open("snap/two") as file:
        file.seek(1)
        assert file.read() == b"wo"
    assert artifacts.local_path("snap/two").read_bytes() == b"two"
    with pytest.raises(MissingError, match="is a file"):
        artifacts.get_folder("snap/one", tmp_path / "out")


def test_what_replaces_leaves_nothing_of_the_old(artifacts: Artifacts, tmp_path: Path) -> None:
    artifacts.put_folder(folder(tmp_path / "old"), "a")
    assert "deep" in {path.name for path in artifacts.local_path("a").iterdir()}
    artifacts.put_folder(folder(tmp_path / "new", {"only": b"1"}), "a")
    assert artifacts.list("a") == {"only": 1}
    assert read(artifacts.local_path("a")) == {"only": b"1"}
    artifacts.put_bytes("f", b"1")
    artifacts.local_path("f")
    artifacts.put_bytes("f", b"22")
    assert artifacts.local_path("f").read_bytes() == b"22"


def test_what_is_deleted_is_gone(artifacts: Artifacts, tmp_path: Path) -> None:
    artifacts.put_folder(folder(tmp_path / "in"), "a/b")
    artifacts.put_bytes("a/c", b"c")
    artifacts.local_path("a/b")
    artifacts.delete("a/b")
    artifacts.delete("a/b")
    assert not artifacts.exists("a/b") and artifacts.exists("a/c")
    artifacts.delete("a/c")
    assert list(artifacts.everything()) == []
    for ask in (artifacts.get_bytes, artifacts.size, artifacts.list, artifacts.local_path, artifacts.open):
        with pytest.raises(MissingError, match="no artifact"):
            ask("a/b")
    with pytest.raises(MissingError):
        artifacts.get_folder("a/b", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_cannot_be_kept(artifacts: Artifacts, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no folder"):
        artifacts.put_folder(tmp_path / "none", "a")
    with pytest.raises(MissingError, match="no file"):
        artifacts.put_file(tmp_path / "none", "a")


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "..", "a/../b", "a//b", "a/", "./a", "a\0b", "a\\b", ".hidden", "a/.x", "x" * 201]
)
def test_a_path_that_could_lead_elsewhere_is_refused(artifacts: Artifacts, tmp_path: Path, path: str) -> None:
    asks = [artifacts.get_bytes, artifacts.exists, artifacts.size, artifacts.list, artifacts.delete, artifacts.open]
    for ask in [*asks, artifacts.local_path, artifacts.direct_path, lambda p: artifacts.put_bytes(p, b"")]:
        with pytest.raises(FormatError, match="artifact path"):
            ask(path)
    with pytest.raises(FormatError):
        artifacts.put_folder(folder(tmp_path / "in"), path)


@given(st.text(st.sampled_from("ab./\\\0~:"), max_size=12))
def test_an_accepted_path_stays_below_the_root(path: str) -> None:
    try:
        clean(path)
    except FormatError:
        return
    root = Path("/root/of/all")
    assert (root / path).resolve().is_relative_to(root) and (root / path).resolve() != root


def test_a_hidden_file_is_refused_not_dropped(artifacts: Artifacts, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="hidden"):
        artifacts.put_folder(folder(tmp_path / "in", {".secret": b""}), "a")
    assert not artifacts.exists("a")


def test_a_failed_copy_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = Artifacts(tmp_path / "artifacts")
    artifacts.put_folder(folder(tmp_path / "old", {"a": b"old"}), "x")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(StorageError, match="No space left"):
        artifacts.put_folder(folder(tmp_path / "new", {"a": b"new"}), "x")
    assert artifacts.get_bytes("x/a") == b"old"
    assert list(artifacts.everything()) == ["x/a"]


def test_a_remote_folder_without_its_marker_is_not_there(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    artifacts = Artifacts(url)
    artifacts.put_folder(folder(tmp_path / "in"), "x")
    fsspec.filesystem("memory").rm_file(f"{url.removeprefix('memory:/')}/x/.complete.json")  # as after a kill
    assert not artifacts.exists("x")
    artifacts.put_folder(folder(tmp_path / "again", {"a": b"1"}), "x")
    assert artifacts.list("x") == {"a": 1} and list(artifacts.everything()) == ["x/a"]
    artifacts.close()


def test_only_a_directory_can_be_written_directly(tmp_path: Path) -> None:
    artifacts = Artifacts(f"file://{tmp_path}/artifacts")
    target = artifacts.direct_path("runs/a")
    assert target is not None
    folder(target)
    assert artifacts.exists("runs/a") and artifacts.local_path("runs/a") == target
    remote = Artifacts("memory://x")
    assert remote.direct_path("a") is None
    remote.close()


def test_an_unknown_store_is_refused() -> None:
    with pytest.raises(ConfigError, match="Cannot keep artifacts at 'nonsense://x'"):
        Artifacts("nonsense://x")
