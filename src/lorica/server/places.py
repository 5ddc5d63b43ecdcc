"""Where the engine writes and reads: artifacts as local paths, whatever store keeps them.

In: artifact names. Out: local paths; what the engine wrote beside a remote store is put into it. Names are never used
twice, so an artifact never changes. Refuses to know what is in one.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
from pathlib import Path

from lorica.core.storage import storage
from lorica.store.artifacts import Artifacts


class Places:
    """`staging` is a local folder for what goes to a remote store."""

    def __init__(self, artifacts: Artifacts, staging: Path) -> None:
        self.artifacts = artifacts
        self._staging = staging
        self._known: dict[str, str] = {}

    def new(self, run: str, what: str) -> str:
        """A name that nothing has: `runs/<run>/<what>-<random>`."""
        return f"runs/{run.replace('/', '_')[:180]}/{what}-{secrets.token_hex(6)}"

    def target(self, artifact: str) -> Path:
        """Where the engine should write it."""
        direct = self.artifacts.direct_path(artifact)
        if direct is not None:
            return direct
        path = self._staging / artifact
        with storage(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    async def publish(self, artifact: str) -> None:
        """Put what the engine wrote to its `target` into the store."""
        if self.artifacts.local:
            return
        await asyncio.to_thread(self._publish, artifact)

    def _publish(self, artifact: str) -> None:
        path = self._staging / artifact
        if path.is_dir():
            self.artifacts.put_folder(path, artifact)
            shutil.rmtree(path, ignore_errors=True)
        else:
            self.artifacts.put_file(path, artifact)
            path.unlink(missing_ok=True)

    async def read(self, artifact: str) -> str:
        """The local path to read it from, looked for once as long as nobody deletes it. Raises MissingError."""
        if artifact not in self._known:
            self._known[artifact] = str(await asyncio.to_thread(self.artifacts.local_path, artifact))
        return self._known[artifact]

    async def delete(self, artifact: str) -> None:
        """Remove it, if it is there."""
        self._known.pop(artifact, None)
        await asyncio.to_thread(self.artifacts.delete, artifact)
