"""The database: opened, migrated, owned, read from any thread and written by one.

In: a URL, `sqlite:///path` or `postgresql://…`, and functions of a connection. Out: their values, after a durable
commit where they write. Refuses to know what the tables mean.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Self, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from lorica.core.errors import ConfigError, StorageError
from lorica.core.storage import storage
from lorica.store import migrate, owner
from lorica.store.writer import Writer, translated

T = TypeVar("T")
_READERS = 4
_BUSY_SECONDS = 15.0


class Database:
    """Made by `Database.open`; close it, or use it in a `with` block."""

    def __init__(self, writer: sa.Engine, reader: sa.Engine, where: str, lock: IO[str] | None) -> None:
        self.where = where
        self.dialect = writer.dialect.name
        self._engines = (writer, reader)
        self._lock = lock
        self._writer = Writer(writer, where)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="lorica-store-reader")

    @classmethod
    def open(cls, url: str, *, own: bool = True) -> Self:
        """Open and migrate a database.

        A server owns it (`own`), which only one process can at a time. Commands that write a row beside a running
        server (`lorica keys create`) do not, and then migrate only where no server runs.

        Raises:
            ConfigError: the URL is of no database that Lorica knows.
            StorageError: it cannot be opened, belongs to a running server, or was written by a later Lorica.
        """
        parsed = _parse(url)
        where = _where(parsed)
        with contextlib.ExitStack() as undo:
            lock = _lock(parsed) if own else None
            undo.callback(lock.close if lock else lambda: None)
            writer, reader = _engine(parsed, where, write=True, own=own), _engine(parsed, where, write=False, own=False)
            undo.callback(writer.dispose)
            undo.callback(reader.dispose)
            try:
                if own or not migrate.is_current(writer):
                    _migrate(parsed, writer, where, own)
            except DBAPIError as error:
                raise translated(error, f"open {where}") from error
            database = cls(writer, reader, where, lock)
            undo.pop_all()
        return database

    def submit(self, fn: Callable[[sa.Connection], T]) -> Future[T]:
        """Run `fn` in the next transaction, after all that was submitted before. The future resolves after the commit.

        Fails with StorageError where the disk is full or the database is away, and with what `fn` raised; then nothing
        of `fn` is kept. A write that failed may be submitted again.
        """
        return self._writer.submit(fn)

    async def write(self, fn: Callable[[sa.Connection], T]) -> T:
        """`submit`, awaited."""
        return await asyncio.wrap_future(self.submit(fn))

    def read(self, fn: Callable[[sa.Connection], T]) -> T:
        """Run `fn` on a connection that sees all that was committed and can write nothing."""
        try:
            with self._engines[1].connect() as connection:
                return fn(connection)
        except Exception as error:
            shown = translated(error, f"read {self.where}")
            if shown is error:
                raise
            raise shown from error

    async def aread(self, fn: Callable[[sa.Connection], T]) -> T:
        """`read` in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self.read, fn)

    def close(self) -> None:
        """Commit what waits, then let go of the database."""
        self._writer.close()
        self._readers.shutdown()
        for engine in self._engines:
            engine.dispose()
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _parse(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise ConfigError(f"{url!r} is no database URL; write sqlite:///path or postgresql://user@host/name.") from None
    backend = parsed.get_backend_name()
    if backend in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise ConfigError(f"Lorica keeps its records in sqlite or postgresql, not in {backend!r}.")
    if not parsed.database or parsed.database == ":memory:":
        raise ConfigError("A store lives in a file: write sqlite:///path.")
    with storage(Path(parsed.database)):
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    return parsed


def _where(url: sa.URL) -> str:
    """The database as errors name it, without a password."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    return url.set(drivername="postgresql").render_as_string(hide_password=True)


def _lock(url: sa.URL) -> IO[str] | None:
    """For Postgres the lock is taken by the writer's connection, see `_engine`."""
    return owner.lock_file(Path(str(url.database))) if url.get_backend_name() == "sqlite" else None


def _migrate(url: sa.URL, writer: sa.Engine, where: str, own: bool) -> None:
    if own:
        migrate.upgrade(writer, where)
        return
    lock, engine = _lock(url), _engine(url, where, write=True, own=True)
    try:
        migrate.upgrade(engine, where)
    finally:
        engine.dispose()
        if lock is not None:
            lock.close()


def _engine(url: sa.URL, where: str, *, write: bool, own: bool) -> sa.Engine:
    """Writers have one connection, which holds the owner's lock in Postgres; a reader's can write nothing."""
    sqlite = url.get_backend_name() == "sqlite"
    engine = sa.create_engine(
        url,
        pool_size=1 if write else _READERS,
        max_overflow=0 if write else 2 * _READERS,
        pool_pre_ping=not sqlite,
        connect_args={"timeout": _BUSY_SECONDS} if sqlite else {},
        execution_options={} if sqlite or write else {"postgresql_readonly": True},
    )
    if sqlite:
        sa.event.listen(engine, "connect", lambda raw, _: _pragmas(raw, write))
        sa.event.listen(engine, "begin", lambda c: c.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN"))
    elif own:
        sa.event.listen(engine, "connect", lambda raw, _: owner.lock_session(raw, where))
    return engine


def _pragmas(raw: Any, write: bool) -> None:
    raw.isolation_level = None  # transactions are begun by us alone, else savepoints would not nest in them
    cursor = raw.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    if cursor.fetchone()[0] != "wal":
        raise StorageError("SQLite cannot keep a write-ahead log there.", hint="Choose a directory on a local disk.")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    if not write:
        cursor.execute("PRAGMA query_only = ON")
    cursor.close()
