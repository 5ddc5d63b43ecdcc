from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.store import overview, points, runs, usage
from lorica.store.database import Database
from lorica.store.keys import Quotas
from lorica.store.points import Dropped, Passed, Stepped
from lorica.store.runs import Run
from lorica.store.tables import now


def run_of(db: Database, name: str = "r", tenant: str = "anna") -> str:
    db.submit(lambda c: runs.add_run(c, Run(name, tenant, None, "nano", {"method": "lora"}))).result()
    return name


def do(db: Database, run: str, *steps: points.Did, seq: int = 1) -> list[points.Point | None]:
    return [db.submit(lambda c, n=n, did=did: points.add(c, run, n, did)).result() for n, did in enumerate(steps, seq)]


def test_a_step_sums_the_passes_since_the_last_one(db: Database) -> None:
    run = run_of(db)
    *_, point = do(db, run, Passed(6.0, 2.0, 4), Passed(2.0, 2.0, 5), Stepped(0.5, 1e-3))
    assert point is not None and (point.step, point.mean, point.tokens) == (1, 2.0, 9)
    *_, second = do(db, run, Passed(3.0, 3.0, 3), Stepped(), seq=4)
    assert second is not None and (second.step, second.mean, second.tokens, second.lr) == (2, 1.0, 12, None)
    curve, stride = db.read(lambda c: points.curve(c, run))
    assert [p.step for p in curve] == [1, 2] and stride == 1 and curve[0].lr == 1e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_a_gap(db: Database, bad: float) -> None:
    run = run_of(db)
    *_, point = do(db, run, Passed(1.0, 1.0, 1), Passed(bad, 1.0, 1), Stepped(bad, 1e-3))
    assert point is not None and point.loss is None and point.mean is None and point.grad_norm is None
    assert point.tokens == 2


def test_a_step_without_a_pass_has_no_loss(db: Database) -> None:
    (point,) = do(db, run_of(db), Stepped())
    assert point is not None and point.step == 1 and point.mean is None


def test_loaded_weights_drop_what_had_passed(db: Database) -> None:
    run = run_of(db)
    *_, point = do(db, run, Passed(8.0, 1.0, 8), Dropped(), Passed(1.0, 1.0, 1), Stepped())
    assert point is not None and point.mean == 1.0


def test_runs_do_not_mix(db: Database) -> None:
    one, two = run_of(db), run_of(db, "s", "bert")
    do(db, one, Passed(8.0, 1.0, 8))
    *_, point = do(db, two, Passed(2.0, 1.0, 2), Stepped())
    assert point is not None and point.mean == 2.0
    assert set(db.read(lambda c: points.last_points(c, [one, two]))) == {two}


def test_a_curve_survives_a_restart(url: str) -> None:
    from lorica.store import keys

    with Database.open(url) as db:
        db.submit(lambda c: keys.ensure_tenant(c, "anna")).result()
        do(db, run_of(db), Passed(2.0, 1.0, 2), Stepped())
    with Database.open(url) as db:
        do(db, "r", Passed(1.0, 1.0, 1), Stepped(), seq=3)
        assert [p.mean for p in db.read(lambda c: points.curve(c, "r"))[0]] == [2.0, 1.0]


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory):
    from lorica.store import keys

    with Database.open(f"sqlite:///{tmp_path_factory.mktemp('long')}/db") as db:
        db.submit(lambda c: keys.ensure_tenant(c, "anna")).result()
        do(db, run_of(db), *[did for _ in range(53) for did in (Passed(1.0, 1.0, 1), Stepped())])
        yield db


@given(most=st.integers(2, 60))
def test_a_long_curve_is_thinned_and_ends_with_the_last_step(long: Database, most: int) -> None:
    curve, stride = long.read(lambda c: points.curve(c, "r", most))
    steps = [p.step for p in curve]
    assert len(steps) <= most + 1 and steps[-1] == 53
    assert steps[:-1] == list(range(stride, 53, stride))


def test_an_operator_sees_all_and_a_tenant_its_own(db: Database) -> None:
    run_of(db), run_of(db, "s", "bert")
    assert db.read(lambda c: overview.runs_of(c, None, 10)).total == 2
    assert [run.id for run in db.read(lambda c: overview.runs_of(c, "bert", 10)).items] == ["s"]
    assert db.read(lambda c: overview.run_of(c, "r", "bert")) is None
    assert db.read(lambda c: overview.run_of(c, "r", None)) is not None
    assert [t.name for t in db.read(lambda c: overview.tenants_of(c, "bert", now().date()))] == ["bert"]
    assert db.read(lambda c: overview.checkpoints_of(c, None, 10)).total == 0


def test_a_tenant_is_shown_with_its_tokens_of_the_day(db: Database) -> None:
    db.submit(lambda c: usage.add_usage(c, "anna", "train", 7)).result()
    anna, bert = db.read(lambda c: overview.tenants_of(c, None, now().date()))
    assert anna.tokens == {"train": 7} and bert.tokens == {} and anna.quotas == Quotas()
