"""Group commit: one thread writes, and whoever waits shares one transaction and one flush of the disk.

In: functions of a connection. Out: futures that hold a function's value only after its transaction is committed; a
function that fails is undone alone. Refuses to know what is written and which database it is.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from lorica.core.errors import DataError, StorageError
from lorica.core.storage import ROOM

T = TypeVar("T")
_Job = tuple[Callable[[sa.Connection], Any], "Future[Any]"]
_GROUP = 512  # functions in one transaction at most, so that the first of them does not wait for ever


def translated(error: BaseException, what: str) -> BaseException:
    """A driver's failure as one sentence: of the database (a full disk says so), or of a value that no column takes.
    What breaks a constraint or is our own mistake stays as it is.
    """
    if isinstance(error, sa.exc.DataError | UnicodeEncodeError | OverflowError):
        return DataError(f"A value cannot be stored: {_cause(error)}.")
    if not isinstance(error, DBAPIError) or isinstance(error, sa.exc.IntegrityError | sa.exc.ProgrammingError):
        return error
    return StorageError(f"Cannot {what}: {_cause(error)}.", hint=ROOM)


def _cause(error: BaseException) -> str:
    shown = error.orig if isinstance(error, DBAPIError) else error
    return (str(shown).strip() or type(shown).__name__).splitlines()[0].rstrip(".")


class Writer:
    """Runs functions in the order of their submission. `where` names the database in errors."""

    def __init__(self, engine: sa.Engine, where: str) -> None:
        self._engine = engine
        self._where = where
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="lorica-store-writer", daemon=True)
        self._thread.start()

    def submit(self, fn: Callable[[sa.Connection], T]) -> Future[T]:
        future: Future[T] = Future()
        with self._gate:  # nothing may enter behind the end mark
            if self._closed:
                raise StorageError(f"{self._where} is closed; nothing can be written any more.")
            self._jobs.put((fn, future))
        return future

    def close(self) -> None:
        """Commit what was submitted, then stop."""
        with self._gate:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            group, last = self._collect()
            if group:
                self._commit(group)
            if last:
                return

    def _collect(self) -> tuple[list[_Job], bool]:
        """All that waits (at least one), and whether it is the end."""
        group: list[_Job] = []
        job = self._jobs.get()
        while job is not None:
            if job[1].set_running_or_notify_cancel():
                group.append(job)
            if len(group) >= _GROUP:
                return group, False
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return group, False
        return group, True

    def _commit(self, group: list[_Job]) -> None:
        settled: list[tuple[Future[Any], Any, BaseException | None]] = []
        try:
            with self._engine.begin() as connection:
                if len(group) == 1:  # nobody else to be kept: a failure ends the transaction
                    settled.append((group[0][1], group[0][0](connection), None))
                else:
                    settled += [(future, *self._run(connection, fn)) for fn, future in group]
        except BaseException as error:  # the transaction is gone: nobody is told that anything was written
            shown = translated(error, f"write {self._where}")
            settled = [(future, None, shown) for _, future in group]
        for future, value, failure in settled:
            if failure is None:
                future.set_result(value)
            else:
                future.set_exception(failure)

    def _run(self, connection: sa.Connection, fn: Callable[[sa.Connection], Any]) -> tuple[Any, BaseException | None]:
        """A function's value or its failure, after which the connection is as before. Raises where it cannot be."""
        savepoint = connection.begin_nested()
        try:
            value = fn(connection)
            savepoint.commit()
        except BaseException as error:
            if not _undo(connection, savepoint):
                raise
            return None, translated(error, f"write {self._where}")
        return value, None


def _undo(connection: sa.Connection, savepoint: sa.NestedTransaction) -> bool:
    """Go back to a savepoint; False where a full disk or a lost connection has ended the whole transaction."""
    try:
        savepoint.rollback()
    except DBAPIError:
        return False
    return not connection.invalidated
