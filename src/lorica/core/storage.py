"""Files and folders that appear whole or not at all, and failures to write as one sentence.

In: a path. Out: something beside it to write to, which takes its place when the block ends well; what was there before
survives a full disk, an error and a kill. Refuses to know what is written.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lorica.core.errors import StorageError

ROOM = "Free some space, or choose another path."


@contextlib.contextmanager
def storage(path: Path, *also: type[Exception], hint: str = ROOM) -> Iterator[None]:
    """Inside, failures of the system (and exceptions of the types `also`) are StorageErrors that name `path`."""
    caught: tuple[type[Exception], ...] = (OSError, *also)
    try:
        yield
    except StorageError:
        raise
    except caught as error:
        told = error.strerror if isinstance(error, OSError) else None
        cause = told or (str(error) or type(error).__name__).splitlines()[0]
        raise StorageError(f"Cannot write {path}: {cause.rstrip('.')}.", hint=hint) from error


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` to write to, flushed to the disk and renamed to it at the end."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    with replacing_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, flushed and renamed to it at the end.

    No folder can replace another at once: the old one steps aside for a moment, and returns on failure. A kill in that
    moment leaves it as `.<name>.….partial/old`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    new, old = made / "new", made / "old"
    try:
        new.mkdir()
        if path.is_dir():
            shutil.copymode(path, new)
        yield new
        for file in new.iterdir():
            flush(file)
        flush(new)
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
        flush(path.parent)
    finally:
        if path.exists() or not old.exists():  # never the only copy
            shutil.rmtree(made, ignore_errors=True)


def flush(path: Path) -> None:
    """Make what was written survive a power cut; directories cannot be flushed everywhere."""
    with contextlib.suppress(PermissionError, IsADirectoryError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
