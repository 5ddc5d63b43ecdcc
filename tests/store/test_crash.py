"""Nothing acknowledged is lost: processes killed, logs cut, bytes flipped, disks filled."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from lorica.core.errors import StorageError
from lorica.store import journal, replay
from lorica.store.database import Database
from lorica.store.journal import Entry
from lorica.store.tables import requests

PROCESS = Path(__file__).with_name("writer_process.py")


def start(url: str, *words: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROCESS), url, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def kill_after(process: subprocess.Popen[str], lines: int) -> list[list[str]]:
    """What the process had acknowledged when it was killed without warning."""
    with process:
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(lines)]
        process.kill()
        told += process.stdout.readlines()
    return [line.split() for line in told if line.endswith("\n")]


def kept(connection: sa.Connection) -> dict[str, tuple[str, int]]:
    select = sa.select(requests.c.id, requests.c.scope, requests.c.seq)
    return {row.id: (row.scope, row.seq) for row in connection.execute(select)}


def check_nothing_lost(url: str, told: list[list[str]]) -> None:
    with Database.open(url) as db:
        there = db.read(kept)
        for _, scope, seq, request in told:
            assert there[request] == (scope, int(seq))
        assert db.read(replay.damaged_records) == []
        for scope in db.read(journal.open_scopes):
            found = db.submit(lambda c, s=scope: replay.pending(c, s, 0)).result()
            assert [entry.seq for entry in found] == list(range(1, len(found) + 1))


def test_a_kill_amid_group_commits_loses_nothing_acknowledged(url: str) -> None:
    told = kill_after(start(url, 8, 500), 300)
    assert len(told) >= 300
    check_nothing_lost(url, told)


@pytest.mark.slow
def test_many_kills_of_one_database_lose_nothing_acknowledged(url: str) -> None:
    chance = random.Random(3)
    told: list[list[str]] = []
    for _ in range(15):
        # a process that starts again appends what is there already and is told the first ids
        told += kill_after(start(url, 8, 500), chance.randrange(1, 1500))
    check_nothing_lost(url, told)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 0.999])
def test_a_truncated_log_recovers_to_the_last_good_commit(tmp_path: Path, share: float) -> None:
    path = tmp_path / "lorica.db"
    url = f"sqlite:///{path}"
    Database.open(url).close()
    told = kill_after(start(url, 1, 500), 200)
    log = path.with_name("lorica.db-wal")
    content = log.read_bytes()
    log.write_bytes(content[: int(len(content) * share)])
    with Database.open(url) as db:
        assert db.read(lambda c: c.exec_driver_sql("PRAGMA integrity_check").scalar()) == "ok"
        found = db.submit(lambda c: replay.pending(c, "s0", 0)).result()
        assert [entry.seq for entry in found] == list(range(1, len(found) + 1))
        assert len(found) < len(told) + 8  # whatever is there is a beginning of what was written
        assert db.submit(lambda c: journal.append(c, Entry("anna", "s0", "train", b"", seq=len(found) + 1))).result()[1]


def test_a_byte_flipped_in_the_file_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "lorica.db"
    bodies = [bytes([65 + seq]) * 300 for seq in range(5)]
    with Database.open(f"sqlite:///{path}") as db:
        for seq, body in enumerate(bodies, 1):
            entry = Entry("anna", "run", "train", body, seq=seq)
            db.submit(lambda c, e=entry: journal.append(c, e)).result()
    content = bytearray(path.read_bytes())
    content[content.index(bodies[3]) + 100] ^= 0x20
    path.write_bytes(content)
    with Database.open(f"sqlite:///{path}") as db:
        assert [entry.seq for entry in db.submit(lambda c: replay.pending(c, "run", 0)).result()] == [1, 2, 3]


def test_a_full_disk_is_reported_and_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/lorica.db"
    Database.open(url).close()
    with start(url, 4, 2000, 600_000) as process:
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
    told = [line.split() for line in lines if line.startswith("ok")]
    failures = [line for line in lines if line.startswith("full")]
    assert process.returncode == 0 and len(told) > 20 and len(failures) == 4
    assert all("Cannot write" in line and "lorica.db" in line for line in failures)
    check_nothing_lost(url, told)


def test_two_processes_cannot_own_one_data_directory(url: str) -> None:
    with start(url, 1, 10) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(StorageError, match="in use by another server"):
            Database.open(url)
        process.kill()
    Database.open(url).close()  # the lock went with its holder
