"""One server owns one store: a lock that the system releases when its holder dies, however it dies.

In: a database's URL or a fresh connection to Postgres. Out: a lock, or a sentence that names the holder.
Refuses to know tables and what a server does.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO, Any

import psycopg

from lorica.core.errors import StorageError
from lorica.core.storage import storage

_ADVISORY = 0x10_12_1C_A  # any number that nobody else uses in the same database
_PATIENCE_MS = 1000  # a killed server's connection takes a moment to vanish
_HINT = "Stop that server, or give this one another data directory or database."


def lock_file(database: Path) -> IO[str]:
    """Hold `<database>.lock` until the returned file is closed or the process ends.

    Raises StorageError where another process holds it.
    """
    path = database.with_name(database.name + ".lock")
    with storage(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    file = os.fdopen(handle, "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = file.read().strip() or "unknown"
        file.close()
        raise StorageError(f"{database} is in use by another server (process {holder}).", hint=_HINT) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def lock_session(connection: Any, where: str) -> None:
    """Hold Postgres's advisory lock as long as this driver connection lives.

    Raises StorageError where another session holds it.
    """
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT set_config('lock_timeout', %s, true)", (f"{_PATIENCE_MS}ms",))
            cursor.execute("SELECT pg_advisory_lock(%s)", (_ADVISORY,))
        connection.commit()
    except psycopg.errors.LockNotAvailable:
        connection.rollback()
        raise StorageError(f"{where} is in use by another server.", hint=_HINT) from None
