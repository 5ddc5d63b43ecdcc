from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from lorica.core.errors import ConfigError, DataError, StorageError
from lorica.store import journal, keys, migrate
from lorica.store.database import Database
from lorica.store.tables import metadata, tenants


def names(connection: sa.Connection) -> list[str]:
    return keys.list_tenants(connection)


def add(name: str):
    return lambda connection: connection.execute(tenants.insert(), {"name": name})


def test_models_and_migrations_agree(url: str) -> None:
    with Database.open(url) as db:
        options = {"compare_type": True, "compare_server_default": True}
        assert db.read(lambda c: compare_metadata(MigrationContext.configure(c, opts=options), metadata)) == []


def test_what_was_written_is_there_after_reopening(url: str) -> None:
    with Database.open(url) as db:
        db.submit(add("anna")).result()
    with Database.open(url) as db:
        assert db.read(names) == ["anna"]


def test_a_database_of_a_later_version_is_refused_in_a_sentence(url: str) -> None:
    with Database.open(url) as db:
        db.submit(lambda c: c.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")).result()
    for own in (True, False):
        with pytest.raises(StorageError, match=r"was written by a later version of Lorica \(revision '9999'\)"):
            Database.open(url, own=own)


def test_two_servers_cannot_own_one_database(url: str) -> None:
    with Database.open(url), pytest.raises(StorageError, match="in use by another server"):
        Database.open(url)
    Database.open(url).close()  # and it is free again


def test_a_command_writes_beside_a_running_server(url: str) -> None:
    with Database.open(url) as server, Database.open(url, own=False) as command:
        command.submit(add("anna")).result()
        server.submit(add("bert")).result()
        assert server.read(names) == command.read(names) == ["anna", "bert"]


def test_a_command_makes_the_tables_where_no_server_was_yet(url: str) -> None:
    with Database.open(url, own=False) as command:
        command.submit(add("anna")).result()
    with Database.open(url) as server:
        assert server.read(names) == ["anna"]


def test_a_command_does_not_migrate_under_a_running_server(url: str) -> None:
    with Database.open(url) as server:
        server.submit(lambda c: c.exec_driver_sql("DELETE FROM alembic_version")).result()
        with pytest.raises(StorageError, match="in use by another server"):
            Database.open(url, own=False)


def test_a_failing_function_fails_alone(db: Database) -> None:
    gate = threading.Event()
    started = threading.Event()
    db.submit(lambda _: (started.set(), gate.wait()))
    started.wait()  # the rest becomes one group
    first, bad, last = db.submit(add("c")), db.submit(add("c")), db.submit(add("d"))
    worse = db.submit(lambda c: (add("e")(c), 1 / 0))
    gate.set()
    first.result()
    last.result()
    assert isinstance(bad.exception(), sa.exc.IntegrityError)
    assert isinstance(worse.exception(), ZeroDivisionError)
    assert db.read(names) == ["anna", "bert", "c", "d"]


def test_writes_run_in_the_order_of_submission(db: Database) -> None:
    order: list[int] = []
    futures = [db.submit(lambda _, i=i: order.append(i)) for i in range(1500)]
    for future in futures:
        future.result()
    assert order == list(range(1500))


def test_waiting_writes_share_a_transaction(db: Database) -> None:
    gate = threading.Event()
    commits = 0

    def count(_: sa.Connection) -> None:
        nonlocal commits
        commits += 1

    sa.event.listen(db._engines[0], "commit", count)
    started = threading.Event()
    futures = [db.submit(lambda _: (started.set(), gate.wait()))]
    started.wait()
    futures += [db.submit(add(f"t{i}")) for i in range(100)]
    gate.set()
    for future in futures:
        future.result()
    assert commits == 2


def test_a_future_resolves_only_after_the_commit(db: Database) -> None:
    for i in range(20):
        db.submit(add(f"t{i}")).result()
        assert f"t{i}" in db.read(names)


def test_a_cancelled_write_that_has_not_begun_is_not_run(db: Database) -> None:
    gate = threading.Event()
    started = threading.Event()
    blocked = db.submit(lambda _: (started.set(), gate.wait()))
    started.wait()
    cancelled, kept = db.submit(add("c")), db.submit(add("d"))
    assert cancelled.cancel()
    gate.set()
    blocked.result()
    kept.result()
    assert db.read(names) == ["anna", "bert", "d"]


def test_a_full_disk_is_told_and_the_next_write_works(tmp_path: Path) -> None:
    with Database.open(f"sqlite:///{tmp_path}/lorica.db") as db:
        db.submit(lambda c: c.exec_driver_sql("CREATE TABLE big (content BLOB)")).result()
        limit = "PRAGMA max_page_count = 1"  # SQLite's own: not below what there is
        assert db.submit(lambda c: c.exec_driver_sql(limit).scalar()).result() > 1
        started, gate = threading.Event(), threading.Event()
        db.submit(lambda _: (started.set(), gate.wait()))
        started.wait()
        small = db.submit(add("anna"))
        large = db.submit(lambda c: c.exec_driver_sql("INSERT INTO big VALUES (zeroblob(1000000))"))
        gate.set()
        for future in (small, large):  # one group: neither is acknowledged
            with pytest.raises(StorageError, match="Cannot write .*lorica.db: database or disk is full"):
                future.result()
        assert db.read(names) == []
        db.submit(add("bert")).result()
        assert db.read(names) == ["bert"]


def test_asynchronous_reads_and_writes(db: Database) -> None:
    async def main() -> list[str]:
        await asyncio.gather(*(db.write(add(f"t{i}")) for i in range(5)))
        return await db.aread(names)

    assert asyncio.run(main()) == ["anna", "bert", "t0", "t1", "t2", "t3", "t4"]


def test_a_read_cannot_write(db: Database) -> None:
    with pytest.raises(StorageError, match="Cannot read"):
        db.read(add("c"))
    assert db.read(names) == ["anna", "bert"]


def test_a_value_that_no_column_takes_is_told_in_a_sentence(db: Database) -> None:
    with pytest.raises(DataError, match="cannot be stored"):
        db.submit(add("\ud800")).result()
    with pytest.raises(DataError, match="cannot be stored"):
        db.read(lambda c: journal.result(c, "\ud800", "anna"))
    with pytest.raises(DataError, match="cannot be stored"):
        db.submit(lambda c: journal.append(c, journal.Entry("anna", "run", "train", b"", seq=2**63))).result()
    if db.dialect != "sqlite":
        with pytest.raises(DataError, match="cannot be stored"):
            db.read(lambda c: journal.result(c, "\0", "anna"))


def test_closing_commits_what_waits_and_refuses_the_rest(url: str) -> None:
    db = Database.open(url)
    futures = [db.submit(add(f"t{i}")) for i in range(50)]
    db.close()
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(StorageError, match="closed"):
        db.submit(add("late"))
    db.close()


def test_a_lost_connection_fails_its_group_and_the_next_one_works(postgres) -> None:
    url = postgres.new_database()
    with Database.open(url) as db:

        def suicide(connection: sa.Connection) -> None:
            add("a")(connection)
            connection.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid())")

        with pytest.raises(StorageError, match="Cannot write"):
            db.submit(suicide).result()
        db.submit(add("b")).result()
        assert db.read(names) == ["b"]
        with pytest.raises(StorageError, match="in use"):  # the new connection owns it again
            Database.open(url)


def test_urls_of_nothing_that_we_know_are_refused() -> None:
    for url, told in {
        "mysql://root@/x": "not in 'mysql'",
        "nonsense": "no database URL",
        "sqlite://": "lives in a file",
        "sqlite:///:memory:": "lives in a file",
    }.items():
        with pytest.raises(ConfigError, match=told):
            Database.open(url)


def test_an_unreachable_postgres_is_told_in_a_sentence() -> None:
    with pytest.raises(StorageError, match="Cannot open postgresql://anna:\\*\\*\\*@127.0.0.1:1/x"):
        Database.open("postgresql://anna:secret@127.0.0.1:1/x")


def test_a_file_that_is_no_database_is_told_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "lorica.db"
    path.write_bytes(b"no database at all" * 1000)
    with pytest.raises(StorageError, match="Cannot open .*not a database"):
        Database.open(f"sqlite:///{path}")


def test_sqlite_is_durable_and_checks_references(tmp_path: Path) -> None:
    with Database.open(f"sqlite:///{tmp_path}/lorica.db") as db:
        pragmas = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
        for name, value in pragmas.items():
            assert db.submit(lambda c, n=name: c.exec_driver_sql(f"PRAGMA {n}").scalar()).result() == value


def test_the_head_of_the_migrations_is_what_a_new_database_has(db: Database) -> None:
    assert migrate.is_current(db._engines[1])


def test_the_store_imports_no_torch() -> None:
    modules = ", ".join(f"lorica.store.{m}" for m in ("check", "database", "replay", "usage", "sessions"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
