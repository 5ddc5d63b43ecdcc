"""Artifacts: immutable files and folders in a directory or in any fsspec store, there whole or not at all.

In: relative paths, bytes, local files and folders. Out: the same again; a local copy where one is needed as a file.
A remote folder is there once its marker, written last, is there. Refuses to know what an artifact contains.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from lorica.core.errors import FormatError, MissingError
from lorica.core.storage import replacing_file, replacing_folder, storage
from lorica.store.backends import Directory, Remote, walk


class Backend(Protocol):
    """What a directory and a remote store both do, with paths that were validated."""

    def put_folder(self, local: Path, path: str) -> None: ...
    def put_file(self, local: Path, path: str) -> None: ...
    def put_bytes(self, path: str, content: bytes) -> None: ...
    def open(self, path: str) -> IO[bytes]: ...
    def files(self, path: str) -> dict[str, int] | None: ...
    def delete(self, path: str) -> None: ...
    def everything(self) -> Iterator[str]: ...


def clean(path: str) -> str:
    """The path itself. Raises FormatError for one that could lead anywhere but below the root."""
    parts = path.split("/")
    wrong = (
        "is empty" if not path
        else "holds a NUL" if "\0" in path
        else "holds a backslash" if "\\" in path
        else "is absolute" if path.startswith("/")
        else "leaves its folder" if ".." in parts
        else "has an empty part" if not all(parts) or "." in parts
        else "has a hidden part" if any(part.startswith(".") for part in parts)
        else "is too long" if len(path.encode("utf-8", "replace")) > 1000 or any(len(p) > 200 for p in parts)
        else ""
    )  # fmt: skip
    if wrong:
        raise FormatError(f"The artifact path {path[:200]!r} {wrong}; it should be like 'runs/r1/weights/step1'.")
    return path


class Artifacts:
    """`url` is a directory (or `file://…`), or what fsspec opens: `s3://bucket/prefix`, `memory://name`. Copies of
    remote artifacts that are needed as files are kept in `cache` until they are deleted.
    """

    def __init__(self, url: str | Path, *, cache: Path | None = None) -> None:
        text = str(url).removeprefix("file://")
        self.url = text
        self.local = "://" not in text
        self._backend: Backend
        self._own_cache: tempfile.TemporaryDirectory[str] | None = None
        self._cache = cache
        if self.local:
            self._root = Path(text).resolve()
            with storage(self._root):
                self._root.mkdir(parents=True, exist_ok=True)
            self._backend = Directory(self._root)
            return
        self._backend = Remote(text)
        if cache is None:
            self._own_cache = tempfile.TemporaryDirectory(prefix="lorica-artifacts-")
            self._cache = Path(self._own_cache.name)

    def put_folder(self, local: Path, path: str) -> None:
        """Copy a local folder to `path`; what was there before is replaced. Raises StorageError."""
        if not local.is_dir():
            raise MissingError(f"{local} is no folder that could be kept as {path}.")
        for name in walk(local):
            clean(f"{path}/{name}")
        self._backend.put_folder(local, clean(path))
        self._forget(path)

    def put_file(self, local: Path, path: str) -> None:
        """Copy a local file to `path`. Raises StorageError."""
        if not local.is_file():
            raise MissingError(f"{local} is no file that could be kept as {path}.")
        self._backend.put_file(local, clean(path))
        self._forget(path)

    def put_bytes(self, path: str, content: bytes) -> None:
        """Write a file. Raises StorageError."""
        self._backend.put_bytes(clean(path), content)
        self._forget(path)

    def get_bytes(self, path: str) -> bytes:
        """A file's content. Raises MissingError."""
        with self.open(path) as file:
            return file.read()

    def get_folder(self, path: str, local: Path) -> None:
        """Copy a folder to `local`, which appears whole. Raises MissingError, StorageError."""
        files = self._files(path)
        if "" in files:
            raise MissingError(f"The artifact {path} is a file, not a folder.")
        with storage(local), replacing_folder(local) as made:
            for name in files:
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                self._copy(f"{path}/{name}", made / name)

    def open(self, path: str) -> IO[bytes]:
        """A file to read from, which can seek. Raises MissingError."""
        return self._backend.open(clean(path))

    def exists(self, path: str) -> bool:
        """Whether a whole file or folder is there."""
        return self._backend.files(clean(path)) is not None

    def size(self, path: str) -> int:
        """Bytes of a file, or of all in a folder. Raises MissingError."""
        return sum(self._files(path).values())

    def list(self, path: str) -> dict[str, int]:
        """Names and sizes of all files in a folder, relative to it, sorted. Raises MissingError."""
        return {name: size for name, size in sorted(self._files(path).items()) if name}

    def everything(self) -> Iterator[str]:
        """Paths of all files, in no order."""
        return self._backend.everything()

    def delete(self, path: str) -> None:
        """Remove a file or folder; nothing happens where there is none."""
        self._backend.delete(clean(path))
        self._forget(path)

    def direct_path(self, path: str) -> Path | None:
        """Where another process of this machine may itself write the artifact (whole or not at all); None for a remote
        store, which is written with `put_folder` and `put_file`.
        """
        clean(path)
        if not self.local:
            return None
        target = self._root / path
        with storage(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def local_path(self, path: str) -> Path:
        """The artifact as a local file or folder, to read only: itself, or a copy. Raises MissingError."""
        files = self._files(path)
        if self._cache is None or self.local:
            return self._root / path
        copy = self._cache / path
        if not copy.exists():
            if "" in files:
                with storage(copy):
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    self._copy(path, copy)
            else:
                self.get_folder(path, copy)
        return copy

    def close(self) -> None:
        """Remove the copies, unless the caller named their place."""
        if self._own_cache is not None:
            self._own_cache.cleanup()

    def _files(self, path: str) -> dict[str, int]:
        """Sizes by relative name; a file has the name ''."""
        files = self._backend.files(clean(path))
        if files is None:
            raise MissingError(f"There is no artifact {path} in {self.url}.")
        return files

    def _copy(self, path: str, target: Path) -> None:
        with self.open(path) as source, replacing_file(target) as file:
            while chunk := source.read(1 << 20):
                file.write(chunk)

    def _forget(self, path: str) -> None:
        if self._cache is not None and not self.local:
            Directory(self._cache).delete(path)
