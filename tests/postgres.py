"""A temporary Postgres from Debian's binaries: in a temporary directory, on a unix socket, gone afterwards."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

ABSENT = "Postgres is absent: install Debian's postgresql (no /usr/lib/postgresql/*/bin/initdb here)."


def binaries() -> Path | None:
    """The newest installed version's folder."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


@dataclass
class Cluster:
    socket: Path
    count: Iterator[int] = field(default_factory=itertools.count)

    def url(self, database: str) -> str:
        return f"postgresql://lorica@/{database}?host={self.socket}"

    def new_database(self) -> str:
        """The URL of a database that is empty."""
        name = f"d{next(self.count)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A running cluster. `binaries()` must have found some."""
    bin_ = binaries()
    assert bin_ is not None
    home = Path(tempfile.mkdtemp(prefix="lorica-postgres-"))  # short: a socket's path has 107 bytes at most
    as_user = _as_user(home)
    data = home / "data"
    settings = f"-c listen_addresses= -c unix_socket_directories={home} -c shared_buffers=16MB -c max_connections=40"
    control = [*as_user, str(bin_ / "pg_ctl"), "-D", str(data), "-w"]
    try:
        _run([*as_user, str(bin_ / "initdb"), "-D", str(data), "-U", "lorica", "-A", "trust", "-E", "UTF8", "-N"], home)
        _run([*control, "-l", str(home / "log"), "-o", settings, "start"], home)
        try:
            yield Cluster(home)
        finally:
            _run([*control, "-m", "immediate", "stop"], home)
    finally:
        shutil.rmtree(home)


def _as_user(home: Path) -> list[str]:
    """initdb refuses root: run it as somebody else, who then needs the folder."""
    if os.geteuid() != 0:
        return []
    names = {user.pw_name: user for user in pwd.getpwall()}
    user = names.get("postgres") or names["nobody"]
    os.chown(home, user.pw_uid, user.pw_gid)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


def _run(command: list[str], home: Path) -> None:
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    log = home / "log"
    assert done.returncode == 0, f"{command} failed: {done.stderr}{log.read_text() if log.exists() else ''}"
