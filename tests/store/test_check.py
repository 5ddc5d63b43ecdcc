from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import sqlalchemy as sa

from lorica.store import checkpoints, journal, runs
from lorica.store.artifacts import Artifacts
from lorica.store.check import check
from lorica.store.checkpoints import Checkpoint
from lorica.store.database import Database
from lorica.store.journal import Entry
from lorica.store.runs import Run
from lorica.store.tables import requests


def tensors(size: int = 16) -> bytes:
    """A safetensors file of one tensor, as its specification says."""
    header = json.dumps({"t": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


@pytest.fixture
def run(db: Database, artifacts: Artifacts) -> str:
    """A run with a snapshot at request 1, request 2 done after it, a checkpoint, and a parent."""
    made = Run("run", "anna", None, "nano", {"method": "lora", "parent": "uploads/u"})
    db.submit(lambda c: runs.add_run(c, made)).result()
    for seq in (1, 2):
        request, _ = db.submit(lambda c, s=seq: journal.append(c, Entry("anna", "run", "train", b"body", s))).result()
        db.submit(lambda c, r=request: journal.finish(c, r, "trained", b"")).result()
    artifacts.put_bytes("runs/run/snapshot-1", tensors())
    db.submit(lambda c: runs.set_snapshot(c, "run", "runs/run/snapshot-1", 1)).result()
    artifacts.put_bytes("runs/run/a/adapter_model.safetensors", tensors())
    artifacts.put_bytes("runs/run/a/adapter_config.json", b"{}")
    artifacts.put_bytes("uploads/u/adapter_model.safetensors", tensors())
    kept = Checkpoint("tinker://run/weights/a", "run", "anna", "training", "a", "runs/run/a", 10)
    db.submit(lambda c: checkpoints.add_checkpoint(c, kept)).result()
    return "run"


@pytest.fixture(params=["directory"])
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "artifacts")


def found(db: Database, artifacts: Artifacts) -> list[tuple[str, str]]:
    return [(finding.kind, finding.subject) for finding in check(db, artifacts)]


def test_a_store_that_is_well_has_no_findings(db: Database, artifacts: Artifacts, run: str) -> None:
    assert check(db, artifacts) == []


def test_lost_artifacts_are_found(db: Database, artifacts: Artifacts, run: str) -> None:
    artifacts.delete("runs/run/a")
    artifacts.delete("runs/run/snapshot-1")
    assert [finding.message for finding in check(db, artifacts)] == [
        "Checkpoint tinker://run/weights/a has lost its artifact runs/run/a.",
        "The snapshot of run run has lost its artifact runs/run/snapshot-1.",
    ]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is no safetensors file"),
        (b"garbage!" * 4, "is no safetensors file"),
        (tensors()[:-1], "and should have"),
        (tensors() + b"\0", "and should have"),
        (tensors().replace(b"data_offsets", b"data_offsetz"), "has a damaged header"),
        (tensors().replace(b"{", b"[", 1), "has a damaged header"),
    ],
)
def test_unreadable_tensors_are_found(db: Database, artifacts: Artifacts, run: str, content: bytes, told: str) -> None:
    artifacts.put_bytes("runs/run/a/adapter_model.safetensors", content)
    artifacts.put_bytes("runs/run/snapshot-1", content)
    findings = check(db, artifacts)
    assert [finding.subject for finding in findings] == ["runs/run/a/adapter_model.safetensors", "runs/run/snapshot-1"]
    assert all(told in finding.message for finding in findings)


def test_artifacts_that_nobody_refers_to_are_found(db: Database, artifacts: Artifacts, run: str) -> None:
    artifacts.put_bytes("runs/run/ab/adapter_model.safetensors", tensors())
    assert found(db, artifacts) == [("orphan", "runs/run/ab/adapter_model.safetensors")]


def test_damaged_records_and_corrupted_runs_are_found(db: Database, artifacts: Artifacts, run: str) -> None:
    second = requests.c.seq == 2
    db.submit(lambda c: c.execute(requests.update().where(second).values(body=b"bodi"))).result()
    db.submit(lambda c: runs.mark_corrupted(c, "run", "It lost something.")).result()
    findings = check(db, artifacts)
    assert [finding.kind for finding in findings] == ["journal", "journal"]
    assert "Request 2 of run" in findings[0].message and findings[1].message.endswith("It lost something.")


def test_a_gap_before_a_done_request_is_found(db: Database, artifacts: Artifacts, run: str) -> None:
    for seq in (5, 4):
        request, _ = db.submit(lambda c, s=seq: journal.append(c, Entry("anna", "run", "train", b"body", s))).result()
    assert check(db, artifacts) == []  # they came early and wait for 3
    db.submit(lambda c: journal.finish(c, request, "trained", b"")).result()
    assert [finding.message for finding in check(db, artifacts)] == [
        "Run run has done request 4, but request 3 before it is gone."
    ]


def test_damage_of_the_sqlite_file_is_found(tmp_path: Path, artifacts: Artifacts) -> None:
    path = tmp_path / "lorica.db"
    with Database.open(f"sqlite:///{path}") as db:
        for seq in range(200):
            db.submit(lambda c, s=seq: journal.append(c, Entry("anna", "run", "train", bytes(500), s))).result()
        root = db.read(
            lambda c: c.execute(sa.text("SELECT rootpage FROM sqlite_master WHERE name='requests'")).scalar()
        )
        size = db.read(lambda c: c.exec_driver_sql("PRAGMA page_size").scalar())
    content = bytearray(path.read_bytes())
    content[(root - 1) * size : (root - 1) * size + 100] = b"\xff" * 100
    path.write_bytes(content)
    with Database.open(f"sqlite:///{path}") as db:
        assert {finding.kind for finding in check(db, artifacts)} == {"database"}
