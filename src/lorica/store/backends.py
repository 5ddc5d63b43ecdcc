"""Where artifacts lie: a directory, or a remote store behind fsspec.

In: validated relative paths. Out: files and folders that are there whole or not at all.
Refuses to know what is in them, and caches.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import fsspec

from lorica.core.errors import ConfigError, LoricaError, MissingError, StorageError
from lorica.core.storage import ROOM, flush, replacing_file, replacing_folder, storage, write_file

_MARKER = ".complete.json"  # names and sizes of a remote folder's files; no artifact's part begins with a dot
_CHUNK = 1 << 20


class Directory:
    """Artifacts below a local directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put_folder(self, local: Path, path: str) -> None:
        target = self._root / path
        with storage(target), replacing_folder(target) as made:
            for name in walk(local):
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(local / name, made / name)
                flush(made / name)

    def put_file(self, local: Path, path: str) -> None:
        target = self._root / path
        with storage(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with local.open("rb") as source, replacing_file(target) as file:
                shutil.copyfileobj(source, file, _CHUNK)

    def put_bytes(self, path: str, content: bytes) -> None:
        target = self._root / path
        with storage(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_file(target, content)

    def open(self, path: str) -> IO[bytes]:
        try:
            return (self._root / path).open("rb")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise MissingError(f"There is no artifact file {path} in {self._root}.") from None

    def files(self, path: str) -> dict[str, int] | None:
        target = self._root / path
        if target.is_file():
            return {"": target.stat().st_size}
        return (
            {name: (target / name).stat().st_size for name in walk(target, hidden=False)} if target.is_dir() else None
        )

    def delete(self, path: str) -> None:
        target = self._root / path
        with storage(target):
            if target.is_file():
                target.unlink()
            elif target.is_dir():
                # out of sight in one step: a kill while its files go must not leave a half
                aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
                target.rename(aside / "old")
                shutil.rmtree(aside)

    def everything(self) -> Iterator[str]:
        return walk(self._root, hidden=False)


class Remote:
    """Artifacts in a store whose single objects appear whole (S3 …). Raises ConfigError for an unknown one."""

    def __init__(self, url: str) -> None:
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"Cannot keep artifacts at {url!r}: {str(error).splitlines()[0].rstrip('.')}.",
                hint="For s3:// install lorica[s3].",
            ) from None
        self._url = url.rstrip("/")

    def put_folder(self, local: Path, path: str) -> None:
        names = {name: (local / name).stat().st_size for name in walk(local)}
        self.delete(path)
        with self._failures(path):
            for name in names:
                self._fs.put_file(str(local / name), self._at(f"{path}/{name}"))
            self._fs.pipe_file(self._at(f"{path}/{_MARKER}"), json.dumps(names).encode())

    def put_file(self, local: Path, path: str) -> None:
        with self._failures(path):
            self._fs.put_file(str(local), self._at(path))

    def put_bytes(self, path: str, content: bytes) -> None:
        with self._failures(path):
            self._fs.pipe_file(self._at(path), content)

    def open(self, path: str) -> IO[bytes]:
        try:
            return cast(IO[bytes], self._fs.open(self._at(path), "rb"))
        except (FileNotFoundError, IsADirectoryError):
            raise MissingError(f"There is no artifact file {path} in {self._url}.") from None

    def files(self, path: str) -> dict[str, int] | None:
        self._fs.invalidate_cache()
        with self._failures(path):
            try:
                return cast(dict[str, int], json.loads(self._fs.cat_file(self._at(f"{path}/{_MARKER}"))))
            except (FileNotFoundError, NotADirectoryError):
                pass
            try:
                found: dict[str, Any] = self._fs.info(self._at(path))
            except FileNotFoundError:
                return None
            return {"": int(found["size"])} if found["type"] == "file" else None

    def delete(self, path: str) -> None:
        self._fs.invalidate_cache()
        with self._failures(path), contextlib.suppress(FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._at(f"{path}/{_MARKER}"))  # first: without it the folder is not there
            self._fs.rm(self._at(path), recursive=True)

    def everything(self) -> Iterator[str]:
        self._fs.invalidate_cache()
        prefix = self._root.rstrip("/") + "/"
        for found in self._fs.find(self._root):
            name = str(found).removeprefix(prefix)
            if not name.endswith("/" + _MARKER):
                yield name

    def _at(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}"

    @contextlib.contextmanager
    def _failures(self, path: str) -> Iterator[None]:
        """Whatever a remote store raises is a StorageError; its clients have no common exception."""
        try:
            yield
        except (LoricaError, FileNotFoundError):
            raise
        except Exception as error:
            cause = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise StorageError(f"Cannot reach {self._url}/{path}: {cause}.", hint=ROOM) from error


def walk(folder: Path, *, hidden: bool = True) -> Iterator[str]:
    """Relative paths of all files below; without `hidden` not those that are still being written."""
    for here, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if hidden or not name.startswith("."))
        for name in sorted(names):
            if hidden or not (name.startswith(".") or name.endswith(".partial")):
                yield (Path(here) / name).relative_to(folder).as_posix()
