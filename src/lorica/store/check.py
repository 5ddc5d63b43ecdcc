"""`lorica store check`: whether a store holds what it says, found without changing anything.

In: a database and its artifacts. Out: findings, each a sentence; none for a store that is well.
Refuses to know how to repair.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from lorica.core.errors import LoricaError
from lorica.store import replay, rows
from lorica.store.artifacts import Artifacts
from lorica.store.checkpoints import Checkpoint
from lorica.store.database import Database
from lorica.store.runs import Run
from lorica.store.tables import checkpoints, requests, runs

_HEADER_LIMIT = 100_000_000  # bytes; safetensors' own


@dataclass(frozen=True, slots=True)
class Finding:
    """`kind`: database, journal, artifact, orphan or gap. `subject`: the id or path that it is about."""

    kind: str
    subject: str
    message: str


def check(database: Database, artifacts: Artifacts) -> list[Finding]:
    """Everything that is wrong, worst first. A store that a server works on shows what that is about to write as
    orphans.
    """
    damage = list(_database(database))
    if damage:  # nothing that is read from it means anything
        return damage
    return [
        *database.read(lambda connection: list(_journal(connection))),
        *_artifacts(database, artifacts),
    ]


def _database(database: Database) -> Iterator[Finding]:
    if database.dialect != "sqlite":
        return  # Postgres verifies its pages itself where its cluster was made with checksums
    try:
        for line in database.read(lambda c: list(c.exec_driver_sql("PRAGMA integrity_check").scalars())):
            if line != "ok":
                yield Finding("database", database.where, f"SQLite finds damage in {database.where}: {line}.")
        for row in database.read(lambda c: c.exec_driver_sql("PRAGMA foreign_key_check").all()):
            yield Finding("database", str(row[0]), f"A row of table {row[0]} refers to a row of {row[2]} that is gone.")
    except (LoricaError, sa.exc.DatabaseError) as error:
        yield Finding("database", database.where, f"SQLite cannot read {database.where}: {_first_line(error)}.")


def _journal(connection: sa.Connection) -> Iterator[Finding]:
    for entry in replay.damaged_records(connection):
        sentence = f"Request {entry.seq} of {entry.scope} ({entry.id}) is damaged: its checksum is wrong."
        yield Finding("journal", entry.id, sentence)
    for run in rows.many(connection, runs, sa.true(), Run):
        if run.corrupted is not None:
            yield Finding("journal", run.id, f"Run {run.id} is marked as corrupted: {run.corrupted}")
        after = (requests.c.scope == run.id) & (requests.c.seq > run.snapshot_seq)
        select = sa.select(requests.c.seq, requests.c.done_at).where(after).order_by(requests.c.seq)
        expected = run.snapshot_seq + 1
        for seq, done in connection.execute(select):
            # a request that came early may wait for its forerunners; one that is done cannot have overtaken them
            if seq != expected and done is not None:
                sentence = f"Run {run.id} has done request {seq}, but request {expected} before it is gone."
                yield Finding("gap", run.id, sentence)
                break
            expected += seq == expected


def _artifacts(database: Database, artifacts: Artifacts) -> Iterator[Finding]:
    known: set[str] = set()
    for checkpoint in database.read(lambda c: rows.many(c, checkpoints, sa.true(), Checkpoint)):
        known.add(checkpoint.artifact)
        yield from _artifact(artifacts, checkpoint.artifact, f"Checkpoint {checkpoint.path}")
    for run in database.read(lambda c: rows.many(c, runs, sa.true(), Run)):
        for path in {run.snapshot_path, run.spec.get("parent")} - {None}:
            known.add(str(path))
        if run.snapshot_path is not None:
            yield from _artifact(artifacts, run.snapshot_path, f"The snapshot of run {run.id}")
    for path in sorted(artifacts.everything()):
        parts = path.split("/")
        if not any("/".join(parts[:count]) in known for count in range(1, len(parts) + 1)):
            yield Finding("orphan", path, f"Nothing refers to the artifact {path}.")


def _artifact(artifacts: Artifacts, path: str, owner: str) -> Iterator[Finding]:
    """What is wrong with one artifact: a file, or a folder whose tensors are in `*.safetensors`."""
    try:
        if not artifacts.exists(path):
            yield Finding("artifact", path, f"{owner} has lost its artifact {path}.")
            return
        files = [f"{path}/{name}" for name in artifacts.list(path) if name.endswith(".safetensors")] or [path]
        for file in files:
            wrong = _header(artifacts, file)
            if wrong:
                yield Finding("artifact", file, f"{owner} has an artifact that cannot be read: {file} {wrong}.")
    except LoricaError as error:
        yield Finding("artifact", path, f"{owner} has an artifact that cannot be read: {_first_line(error)}.")


def _header(artifacts: Artifacts, file: str) -> str:
    """What is wrong with a safetensors file, from its header and its length alone: the tensors are not read, so that a
    remote store is checked without fetching it.
    """
    size = artifacts.size(file)
    with artifacts.open(file) as content:
        start = content.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 2 <= length <= min(size - 8, _HEADER_LIMIT):
            return "is no safetensors file"
        try:
            header: dict[str, Any] = json.loads(content.read(length))
            ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return "has a damaged header"
    expected = 8 + length + max(ends, default=0)
    return "" if size == expected else f"has {size} bytes and should have {expected}"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
