"""Every test that takes `url` or `db` runs on SQLite and on Postgres; every one that takes `artifacts` on a directory
and in memory. Other suites reuse `tests/postgres.py`.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorica.store import keys
from lorica.store.artifacts import Artifacts
from lorica.store.database import Database
from tests.postgres import Cluster


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/data/lorica.db"
    running: Cluster = request.getfixturevalue("postgres")
    return running.new_database()


@pytest.fixture
def db(url: str) -> Iterator[Database]:
    """With two tenants, anna and bert."""
    with Database.open(url) as database:
        for tenant in ("anna", "bert"):
            database.submit(lambda c, tenant=tenant: keys.ensure_tenant(c, tenant)).result()
        yield database


@pytest.fixture(params=["directory", "memory", "s3"])
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Artifacts]:
    places = {
        "directory": lambda: str(tmp_path / "artifacts"),
        "memory": lambda: f"memory://{uuid.uuid4().hex}/a",
        "s3": lambda: f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}",
    }
    made = Artifacts(places[request.param]())
    yield made
    made.close()
