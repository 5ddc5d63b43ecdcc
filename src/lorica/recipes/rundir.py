"""A run's directory: resolved config, metrics, curve, checkpoints, adapter.

In: a path. Out: atomic writes, so that a kill or a full disk at any moment leaves the last good checkpoint.
    config.yaml  metrics.jsonl  loss.png  adapter/  base/ (of its own)  checkpoints/step-000100.pt
Refuses to know clients and training.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from lorica.core.errors import ResumeError, StorageError
from lorica.core.storage import replacing_file, storage, write_file

ROOM = "Free some space, or choose another `out`."


class RunDir:
    """The files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def base(self) -> Path:
        """The model directory of a base that was made together with the adapter."""
        return self.path / "base"

    def create(self, config: str) -> None:
        """Make the directory for a new run. Raises StorageError when it holds a run already."""
        if self.config.exists():
            raise StorageError(
                f"{self.path} holds a run already.",
                hint=f"Continue it with `lorica train --resume {self.path}`, or choose another `out`.",
            )
        with storage(self.path, hint=ROOM):
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_file(self.config, config.encode())

    def checkpoints(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*.pt"))

    def save(self, step: int, state: dict[str, Any], *, keep: int) -> Path:
        """Write a checkpoint, then delete all but the newest `keep`. Raises StorageError; older checkpoints survive
        that.
        """
        path = self.path / "checkpoints" / f"step-{step:06d}.pt"
        # torch.save reports a failed write as a RuntimeError
        with storage(path, RuntimeError, hint=ROOM), replacing_file(path) as file:
            torch.save(state, file)
        for old in self.checkpoints()[:-keep]:
            old.unlink()
        return path

    def latest(self) -> dict[str, Any] | None:
        """The newest checkpoint's state; None when the run ended before its first. Raises ResumeError when it is
        unreadable.
        """
        found = self.checkpoints()
        if not found:
            return None
        try:
            state: dict[str, Any] = torch.load(found[-1], map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            hint = f"Delete it to resume from {found[-2].name}." if len(found) > 1 else None
            raise ResumeError(f"Checkpoint {found[-1]} cannot be read: {error}.", hint=hint) from None
        return state

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with storage(self.metrics, hint=ROOM), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl; a last line that a kill cut short is left out."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def rewind(self, step: int) -> None:
        """Drop metrics after `step`: they will be made again."""
        kept = [record for record in self.records() if record["step"] <= step]
        with storage(self.metrics, hint=ROOM):
            write_file(self.metrics, "".join(json.dumps(record) + "\n" for record in kept).encode())
