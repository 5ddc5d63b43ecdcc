from __future__ import annotations

import datetime as dt
import hashlib
from dataclasses import replace

import pytest
import sqlalchemy as sa

from lorica.core.errors import ConfigError, DataError
from lorica.store import checkpoints, keys, runs, sessions, tables, usage
from lorica.store.checkpoints import Checkpoint
from lorica.store.database import Database
from lorica.store.keys import Quotas
from lorica.store.runs import Run
from lorica.store.sessions import Sampler, Session
from lorica.store.tables import now

HOUR = dt.timedelta(hours=1)


def test_a_key_opens_until_it_is_revoked_and_its_secret_is_nowhere(db: Database) -> None:
    key, secret = db.submit(lambda c: keys.create_key(c, "carl", "laptop")).result()
    assert secret.startswith(f"tml-{key.id}-") and key.prefix == f"tml-{key.id}"
    assert db.read(lambda c: keys.find_key(c, secret)) == key
    assert key.hash == hashlib.sha256(secret.encode()).hexdigest()
    everything = str(db.read(lambda c: c.execute(sa.select(tables.keys)).all()))
    assert secret.rsplit("-", 1)[1] not in everything
    assert db.submit(lambda c: keys.revoke_key(c, key.id)).result()
    assert not db.submit(lambda c: keys.revoke_key(c, key.id)).result()
    assert db.read(lambda c: keys.find_key(c, secret)) is None
    assert [k.label for k in db.read(lambda c: keys.list_keys(c, "carl"))] == ["laptop"]
    assert db.read(lambda c: keys.list_keys(c, "anna")) == []
    assert db.read(keys.list_tenants) == ["anna", "bert", "carl"]


def test_no_other_secret_opens(db: Database) -> None:
    _, secret = db.submit(lambda c: keys.create_key(c, "anna")).result()
    start, last = secret[:-1], "1" if secret[-1] == "0" else "0"
    for other in (secret.upper(), secret + "0", start, start + "\0", start + last, secret[4:], "", "tml-", "\ud800"):
        assert db.read(lambda c, s=other: keys.find_key(c, s)) is None


@pytest.mark.parametrize("name", ["", "../x", "a b", "é", "x" * 64, "-x", "a\0"])
def test_a_tenant_has_a_plain_name(db: Database, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a tenant"):
        db.submit(lambda c: keys.create_key(c, name)).result()


def test_quotas_are_null_until_set(db: Database) -> None:
    assert db.read(lambda c: keys.get_quotas(c, "anna")) == Quotas()
    quotas = Quotas(max_rank=8, storage_bytes=0)
    db.submit(lambda c: keys.set_quotas(c, "anna", quotas)).result()
    assert db.read(lambda c: keys.get_quotas(c, "anna")) == quotas
    assert db.read(lambda c: keys.get_quotas(c, "bert")) == Quotas()


def test_sessions_belong_to_their_tenant(db: Database) -> None:
    session = Session("s1", "anna", tags=["a"], user_metadata={"k": "v\0\ud800"}, display_name="probe")
    db.submit(lambda c: sessions.add_session(c, session)).result()
    assert db.read(lambda c: sessions.get_session(c, "s1", "anna")) == session
    assert db.read(lambda c: sessions.get_session(c, "s1", "bert")) is None
    assert not db.submit(lambda c: sessions.beat(c, "s1", "bert")).result()
    assert db.submit(lambda c: sessions.beat(c, "s1", "anna")).result()
    assert not db.submit(lambda c: sessions.finish_session(c, "s1", "bert", "x")).result()
    assert [s.id for s in db.read(lambda c: sessions.silent_sessions(c, now() + HOUR))] == ["s1"]
    assert db.submit(lambda c: sessions.finish_session(c, "s1", "anna", "success")).result()
    assert not db.submit(lambda c: sessions.finish_session(c, "s1", "anna", "errored")).result()
    assert not db.submit(lambda c: sessions.beat(c, "s1", "anna")).result()
    found = db.read(lambda c: sessions.get_session(c, "s1", "anna"))
    assert found is not None and found.reason == "success" and found.last_heartbeat > session.last_heartbeat
    assert db.read(lambda c: sessions.silent_sessions(c, now() + HOUR)) == []
    assert db.read(lambda c: sessions.list_sessions(c, "bert", 10)).total == 0


def test_samplers_belong_to_their_tenant(db: Database) -> None:
    db.submit(lambda c: sessions.add_session(c, Session("s1", "anna"))).result()
    sampler = Sampler("s1:sample:0", "anna", "s1", "nano", "tinker://r/sampler_weights/a", info={"x": 1})
    assert db.submit(lambda c: sessions.add_sampler(c, sampler)).result()
    assert not db.submit(lambda c: sessions.add_sampler(c, replace(sampler, base_model="other"))).result()
    assert db.read(lambda c: sessions.get_sampler(c, sampler.id, "anna")) == sampler
    assert db.read(lambda c: sessions.get_sampler(c, sampler.id, "bert")) is None
    assert db.read(lambda c: sessions.session_samplers(c, "s1", "anna")) == [sampler]
    assert db.read(lambda c: sessions.session_samplers(c, "s1", "bert")) == []


def test_runs_belong_to_their_tenant_and_come_newest_first(db: Database) -> None:
    start = now()
    made = [Run(f"r{i}", "anna", None, "nano", {"method": "lora"}, created=start + i * HOUR) for i in range(5)]
    for run in made:
        assert db.submit(lambda c, run=run: runs.add_run(c, run)).result()
    assert not db.submit(lambda c: runs.add_run(c, replace(made[0], tenant="bert"))).result()
    assert db.read(lambda c: runs.get_run(c, "r0", "anna")) == made[0]
    assert db.read(lambda c: runs.get_run(c, "r0", "bert")) is None
    page = db.read(lambda c: runs.list_runs(c, "anna", 2, 1))
    assert [run.id for run in page.items] == ["r3", "r2"] and page.total == 5
    assert db.read(lambda c: runs.list_runs(c, "bert", 2)).total == 0


def test_a_run_keeps_what_the_engine_told_and_its_first_corruption(db: Database) -> None:
    db.submit(lambda c: runs.add_run(c, Run("r", "anna", None, "nano", {}))).result()
    db.submit(lambda c: runs.set_run(c, "r", rank=8, info={"sites": 4})).result()
    db.submit(lambda c: runs.set_run(c, "r", optimizer_config={"type": "adamw"})).result()
    for sentence in ("First.", "Second."):
        db.submit(lambda c, s=sentence: runs.mark_corrupted(c, "r", s)).result()
    before = now()
    db.submit(lambda c: runs.touch_run(c, "r")).result()
    run = db.read(lambda c: runs.get_run(c, "r", "anna"))
    assert run is not None
    assert (run.rank, run.info, run.optimizer_config, run.corrupted) == (8, {"sites": 4}, {"type": "adamw"}, "First.")
    assert run.last_request >= before
    assert [r.id for r in db.read(runs.living_runs)] == ["r"]
    assert db.submit(lambda c: runs.close_run(c, "r")).result()
    assert not db.submit(lambda c: runs.close_run(c, "r")).result()
    assert db.read(runs.living_runs) == []


def checkpoint(name: str, tenant: str = "anna", run: str = "r", **more) -> Checkpoint:
    return Checkpoint(f"tinker://{run}/weights/{name}", run, tenant, "training", name, f"c/{name}", 10, **more)


def add(db: Database, made: Checkpoint, **how: bool) -> Checkpoint | None:
    return db.submit(lambda c: checkpoints.add_checkpoint(c, made, **how)).result()


def get(db: Database, made: Checkpoint, tenant: str) -> Checkpoint | None:
    return db.read(lambda c: checkpoints.get_checkpoint(c, made.path, tenant))


def test_a_checkpoint_is_absent_to_others_until_it_is_published(db: Database) -> None:
    made = checkpoint("a", user_metadata={"k": 1}, info={"rank": 8})
    add(db, made)
    assert get(db, made, "anna") == made and get(db, made, "bert") is None
    assert not db.submit(lambda c: checkpoints.set_public(c, made.path, "bert", True)).result()
    assert db.submit(lambda c: checkpoints.set_public(c, made.path, "anna", True)).result()
    assert get(db, made, "bert") == replace(made, public=True)
    assert db.read(lambda c: checkpoints.list_checkpoints(c, "bert", 10)).items == []
    assert db.submit(lambda c: checkpoints.delete_checkpoint(c, made.path, "bert")).result() is None
    assert not db.submit(lambda c: checkpoints.set_expiry(c, made.path, "bert", now())).result()
    assert db.submit(lambda c: checkpoints.set_public(c, made.path, "anna", False)).result()
    assert get(db, made, "bert") is None
    assert db.submit(lambda c: checkpoints.delete_checkpoint(c, made.path, "anna")).result() == made
    assert get(db, made, "anna") is None


def test_a_taken_path_is_refused_and_overwriting_tells_what_was_there(db: Database) -> None:
    made = checkpoint("a")
    assert add(db, made) is None
    with pytest.raises(DataError, match="exists already"):
        add(db, made)
    with pytest.raises(DataError, match="exists already"):
        add(db, checkpoint("a", "bert"), overwrite=True)
    other = replace(made, artifact="c/b", size=20)
    assert add(db, other, overwrite=True) == made
    assert get(db, made, "anna") == other


def test_what_has_expired_is_absent_and_listed_for_deletion(db: Database) -> None:
    old, young, ever = (checkpoint(n, expires=e) for n, e in (("o", now() - HOUR), ("y", now() + HOUR), ("e", None)))
    for made in (old, young, ever):
        add(db, made)
    assert get(db, old, "anna") is None and get(db, young, "anna") == young
    assert db.read(lambda c: checkpoints.list_checkpoints(c, "anna", 10)).total == 2
    assert db.read(lambda c: checkpoints.expired_checkpoints(c, now())) == [old]
    assert db.submit(lambda c: checkpoints.set_expiry(c, ever.path, "anna", now())).result()
    assert get(db, ever, "anna") is None
    assert add(db, replace(old, expires=None)) == old  # an expired name is free


def test_checkpoints_are_listed_by_run_kind_and_page(db: Database) -> None:
    start = now()
    for i in range(4):
        add(db, checkpoint(f"a{i}", created=start + i * HOUR))
    add(db, checkpoint("b", run="q"))
    add(db, replace(checkpoint("s"), kind="sampler", ephemeral=True))
    listed = lambda **how: db.read(lambda c: checkpoints.list_checkpoints(c, "anna", 10, **how))  # noqa: E731
    assert listed().total == 5 and listed(ephemeral=True).total == 6
    assert [c.name for c in listed(run_id="r").items] == ["a3", "a2", "a1", "a0"]
    assert listed(kind="sampler").total == 0 and listed(kind="sampler", ephemeral=True).total == 1
    page = db.read(lambda c: checkpoints.list_checkpoints(c, "anna", 2, 1, run_id="r"))
    assert [c.name for c in page.items] == ["a2", "a1"] and page.total == 4
    assert db.read(lambda c: checkpoints.storage_bytes(c, "anna")) == 60
    assert db.read(lambda c: checkpoints.storage_bytes(c, "bert")) == 0


def test_usage_adds_up(db: Database) -> None:
    for kind, tokens in (("train", 5), ("train", 7), ("sample", 2**40)):
        db.submit(lambda c, k=kind, n=tokens: usage.add_usage(c, "anna", k, n)).result()
    today = now().date()
    assert db.read(lambda c: usage.used(c, "anna", today)) == {"train": 12, "sample": 2**40}
    assert db.read(lambda c: usage.used(c, "anna", today + dt.timedelta(days=1))) == {}
    assert db.read(lambda c: usage.used(c, "bert", today)) == {}


def test_a_time_without_a_zone_is_refused_and_others_become_utc(db: Database) -> None:
    with pytest.raises(sa.exc.StatementError, match="has no zone"):
        add(db, checkpoint("a", expires=dt.datetime(2030, 1, 1)))
    east = dt.datetime(2030, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=5)))
    made = checkpoint("a", expires=east)
    add(db, made)
    found = get(db, made, "anna")
    assert found is not None and found.expires == east and found.expires.utcoffset() == dt.timedelta(0)
