from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from lorica.core.errors import DataError
from lorica.store import journal, replay, runs
from lorica.store.database import Database
from lorica.store.journal import Entry, Failure
from lorica.store.runs import Run
from lorica.store.tables import now, requests


def entry(seq: int | None, body: bytes = b"body", scope: str = "run", **more: Any) -> Entry:
    return Entry("anna", scope, "train", body, seq=seq, **more)


def put(db: Database, *entries: Entry) -> list[str]:
    return [db.submit(lambda c, e=e: journal.append(c, e)).result()[0] for e in entries]


def done(db: Database, request_id: str, outcome: bytes | Failure = b"result", **more: Any) -> bool:
    return db.submit(lambda c: journal.finish(c, request_id, "trained", outcome, **more)).result()


def pending(db: Database, after: int, scope: str = "run", ordered: bool = True) -> list[journal.Pending]:
    return db.submit(lambda c: replay.pending(c, scope, after, ordered=ordered)).result()


def add_run(db: Database) -> None:
    db.submit(lambda c: runs.add_run(c, Run("run", "anna", None, "nano", {}))).result()


def flip(db: Database, request_id: str) -> None:
    """A byte of a body changes on the disk."""

    def write(connection: sa.Connection) -> None:
        mine = requests.c.id == request_id
        body = bytearray(connection.scalar(sa.select(requests.c.body).where(mine)))
        body[len(body) // 2] ^= 1
        connection.execute(requests.update().where(mine).values(body=bytes(body)))

    db.submit(write).result()


def test_a_second_append_finds_the_first_done_or_not(db: Database) -> None:
    first = entry(1)
    assert db.submit(lambda c: journal.append(c, first)).result() == (first.id, True)
    assert db.submit(lambda c: journal.append(c, entry(1, b"other"))).result() == (first.id, False)
    assert done(db, first.id)
    assert db.submit(lambda c: journal.append(c, entry(1))).result() == (first.id, False)
    assert db.submit(lambda c: journal.append(c, entry(1, scope="other"))).result()[1]


def test_entries_without_seq_are_all_kept(db: Database) -> None:
    assert len(set(put(db, entry(None), entry(None)))) == 2
    assert len(pending(db, 5, ordered=False)) == 2


def test_the_first_result_wins_and_only_its_tenant_reads_it(db: Database) -> None:
    (request,) = put(db, entry(1))
    before = db.read(lambda c: journal.result(c, request, "anna"))
    assert before is not None and not before.done
    assert done(db, request, b"one")
    assert not done(db, request, b"two")
    assert not done(db, "nobody", b"two")
    after = db.read(lambda c: journal.result(c, request, "anna"))
    assert after is not None and after.done and after.result == b"one" and after.result_type == "trained"
    assert db.read(lambda c: journal.result(c, request, "bert")) is None
    assert [o.id for o in db.read(lambda c: journal.outcomes(c, [request, "x"], "anna"))] == [request]
    assert db.read(lambda c: journal.outcomes(c, [request], "bert")) == []


def test_a_failure_is_kept_as_it_was_told(db: Database) -> None:
    (request,) = put(db, entry(1))
    failure = Failure("user", "data", "Token 9 is out of the vocabulary \u2014 \0.")
    assert done(db, request, failure)
    outcome = db.read(lambda c: journal.result(c, request, "anna"))
    assert outcome is not None and outcome.error == failure and outcome.result is None


def test_pending_is_in_order_of_seq_and_holds_what_is_done(db: Database) -> None:
    bodies = {seq: bytes([seq]) * seq for seq in (3, 1, 5, 2)}
    ids = put(db, *(entry(seq, body, tokens=seq) for seq, body in bodies.items()))
    done(db, ids[0])
    done(db, ids[2], Failure("user", "data", "No."))
    found = pending(db, 1)
    assert [(e.seq, e.body, e.tokens, e.done, e.failed) for e in found] == [
        (2, bodies[2], 2, False, False),
        (3, bodies[3], 3, True, False),
        (5, bodies[5], 5, True, True),
    ]
    assert [e.seq for e in pending(db, 0, ordered=False)] == [1, 2]
    assert db.read(journal.open_scopes) == ["run"]


def test_bodies_leave_after_a_snapshot_and_results_stay(db: Database) -> None:
    ids = put(db, *(entry(seq, b"x" * 10) for seq in range(1, 5)))
    for request in ids[:3]:
        done(db, request)
    assert db.read(journal.bytes_pending) == 40
    assert db.submit(lambda c: journal.trim(c, "run", 2)).result() == 2
    assert db.read(journal.bytes_pending) == 20
    assert db.submit(lambda c: journal.trim(c, "run", 9)).result() == 1  # what is not done keeps its body
    assert [e.seq for e in pending(db, 3)] == [4]
    outcome = db.read(lambda c: journal.result(c, ids[0], "anna"))
    assert outcome is not None and outcome.result == b"result"


def test_a_snapshot_trims_and_names_the_one_before(db: Database) -> None:
    add_run(db)
    for request in put(db, entry(1), entry(2)):
        done(db, request)
    assert db.submit(lambda c: runs.set_snapshot(c, "run", "snap/1", 1)).result() is None
    assert db.submit(lambda c: runs.set_snapshot(c, "run", "snap/2", 2)).result() == "snap/1"
    assert db.read(journal.bytes_pending) == 0
    assert pending(db, 2) == []


def test_old_results_expire_but_not_what_a_replay_needs(db: Database) -> None:
    add_run(db)
    ids = put(db, entry(1), entry(2), entry(3, b""), entry(4))
    for request in ids[:3]:
        done(db, request)
    sample = put(db, entry(0, scope="sampler"))[0]
    done(db, sample, drop_body=True)
    db.submit(lambda c: runs.set_snapshot(c, "run", "snap", 1)).result()
    later = now() + dt.timedelta(seconds=1)
    assert db.submit(lambda c: journal.expire(c, now() - dt.timedelta(hours=1))).result() == 0
    assert db.submit(lambda c: journal.expire(c, later)).result() == 2  # request 1 and the sample
    assert [e.seq for e in pending(db, 1)] == [2, 3, 4]
    assert db.read(lambda c: journal.result(c, ids[0], "anna")) is None


def test_a_request_that_left_the_journal_does_not_run_again(db: Database) -> None:
    add_run(db)
    (request,) = put(db, entry(1))
    done(db, request)
    db.submit(lambda c: runs.set_snapshot(c, "run", "snap", 1)).result()
    db.submit(lambda c: journal.expire(c, now() + dt.timedelta(seconds=1))).result()
    with pytest.raises(DataError, match="was done before"):
        put(db, entry(1))
    assert db.read(lambda c: journal.highest_seq(c, "run")) == 1
    put(db, entry(2))
    assert db.read(lambda c: journal.highest_seq(c, "run")) == 2
    assert db.read(lambda c: journal.highest_seq(c, "nobody")) == -1


@pytest.mark.parametrize("damaged_is_done", [False, True])
def test_a_damaged_record_recovers_the_run_to_the_last_good_one(db: Database, damaged_is_done: bool) -> None:
    add_run(db)
    ids = put(db, *(entry(seq) for seq in range(1, 7)))
    done(db, ids[0])
    if damaged_is_done:
        done(db, ids[2], b"three")
    done(db, ids[3], b"four")
    flip(db, ids[2])
    assert [e.id for e in db.read(replay.damaged_records)] == [ids[2]]

    assert [e.seq for e in pending(db, 0)] == [1, 2]
    run = db.read(lambda c: runs.get_run(c, "run", "anna"))
    assert run is not None
    assert run.corrupted == (
        "Request 3 was damaged in the journal; the run was recovered to the last good record, request 2."
    )
    told = {o.seq: o for o in db.read(lambda c: journal.outcomes(c, ids, "anna"))}
    assert told[4].result == b"four"  # a stored result stays
    for seq in (5, 6) if damaged_is_done else (3, 5, 6):
        error = told[seq].error
        assert error is not None and error.category == "server" and error.code == "corrupted"
    assert not told[1].error and not told[2].done


def test_a_recovered_run_goes_on_and_recovers_again_to_the_same_state(db: Database) -> None:
    add_run(db)
    ids = put(db, *(entry(seq) for seq in range(1, 5)))
    done(db, ids[3])
    flip(db, ids[1])
    assert [e.seq for e in pending(db, 0)] == [1]
    put(db, entry(5))
    assert [e.seq for e in pending(db, 0)] == [1, 5]
    assert db.read(replay.damaged_records) == []


def test_without_order_a_damaged_record_fails_alone(db: Database) -> None:
    ids = put(db, *(entry(seq, scope="sampler") for seq in range(3)))
    flip(db, ids[1])
    assert [e.seq for e in pending(db, -1, scope="sampler", ordered=False)] == [0, 2]
    assert db.read(lambda c: [o.done for o in [journal.result(c, i, "anna") for i in ids] if o]) == [False, True, False]


@given(st.binary(min_size=1, max_size=50), st.data())
def test_the_checksum_sees_any_change_of_a_byte(body: bytes, data: st.DataObject) -> None:
    original = entry(1, body)
    at, bit = data.draw(st.integers(0, len(body) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(body)
    changed[at] ^= 1 << bit
    assert journal.checksum(replace(original, body=bytes(changed))) != journal.checksum(original)


@pytest.mark.parametrize("field", [{"seq": 2}, {"seq": None}, {"scope": "other"}, {"kind": "step"}, {"id": "other"}])
def test_the_checksum_sees_a_record_under_another_name(field: dict[str, Any]) -> None:
    original = entry(1)
    assert journal.checksum(replace(original, **field)) != journal.checksum(original)
