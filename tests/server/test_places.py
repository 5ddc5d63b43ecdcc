"""Where artifacts are read: looked for once, and gone when they are deleted."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lorica.core.errors import MissingError
from lorica.server.places import Places
from lorica.store.artifacts import Artifacts


def test_an_artifact_is_looked_for_once_until_it_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = Artifacts(tmp_path / "artifacts")
    places, looked = Places(artifacts, tmp_path / "staging"), []
    own = artifacts.local_path
    monkeypatch.setattr(artifacts, "local_path", lambda path: (looked.append(path), own(path))[1])

    async def use() -> None:
        for name in ("one", "two"):
            places.target(name).write_bytes(b"weights")
        assert [Path(await places.read(name)).read_bytes() for name in ("one", "one", "two")] == [b"weights"] * 3
        assert looked == ["one", "two"]
        await places.delete("one")
        with pytest.raises(MissingError, match="one"):
            await places.read("one")
        assert Path(await places.read("two")).exists()

    asyncio.run(use())


def test_what_was_missing_is_looked_for_again(tmp_path: Path) -> None:
    places = Places(Artifacts(tmp_path / "artifacts"), tmp_path / "staging")

    async def use() -> None:
        with pytest.raises(MissingError):
            await places.read("late")
        places.target("late").write_bytes(b"here")
        assert Path(await places.read("late")).read_bytes() == b"here"

    asyncio.run(use())
