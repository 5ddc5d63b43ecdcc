"""Writing: all or nothing, whatever goes wrong and whenever; failures are one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorica.core.errors import FormatError, StorageError
from lorica.core.storage import replacing_file, replacing_folder, storage, write_file


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_file(path, b"old")
    with pytest.raises(ZeroDivisionError), replacing_file(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and names(tmp_path) == {"a"}
    with replacing_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and names(tmp_path) == {"a"}


def test_a_folder_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a"
    with replacing_folder(path) as folder:
        (folder / "x").write_text("old")
        assert not path.exists()
    path.chmod(0o750)
    with pytest.raises(ZeroDivisionError), replacing_folder(path) as folder:
        (folder / "y").write_text("half")
        raise ZeroDivisionError
    assert names(path) == {"x"} and names(path.parent) == {"a"}
    with replacing_folder(path) as folder:
        (folder / "y").write_text("new")
    assert names(path) == {"y"} and names(path.parent) == {"a"}
    assert path.stat().st_mode & 0o777 == 0o750


def test_the_old_folder_returns_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    with replacing_folder(path) as folder:
        (folder / "x").write_text("old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="No space"), replacing_folder(path) as folder:
        (folder / "y").write_text("new")
    assert names(path) == {"x"} and names(tmp_path) == {"a"}


def test_the_only_copy_is_never_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    with replacing_folder(path) as folder:
        (folder / "x").write_text("old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name in ("new", "old"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"), replacing_folder(path):
        pass
    (aside,) = tmp_path.glob(".a.*.partial/old")
    assert names(aside) == {"x"}


def test_failures_of_the_system_are_one_sentence_that_names_the_path(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with (
        pytest.raises(StorageError, match=r"^Cannot write /no/where: Not a directory\.$") as caught,
        storage(Path("/no/where"), hint="Go elsewhere."),
    ):
        (file / "inside").read_bytes()
    assert caught.value.hint == "Go elsewhere."
    with pytest.raises(StorageError, match="first line"), storage(tmp_path, RuntimeError):
        raise RuntimeError("first line\nsecond line")
    with pytest.raises(RuntimeError), storage(tmp_path):
        raise RuntimeError
    with pytest.raises(StorageError, match="^mine$"), storage(tmp_path):
        raise StorageError("mine")
    with pytest.raises(FormatError), storage(tmp_path):
        raise FormatError("not about storage")
