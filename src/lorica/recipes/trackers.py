"""Trackers: where metrics go besides `metrics.jsonl`.

In: records. Out: calls to wandb, trackio or tensorboard, each an optional package. Refuses to know training.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from lorica.core.errors import MissingError


class Tracker(Protocol):
    """Three calls, as wandb has them."""

    def log(self, record: dict[str, Any]) -> None: ...

    def finish(self) -> None: ...


class _Nothing:
    def log(self, record: dict[str, Any]) -> None:
        pass

    def finish(self) -> None:
        pass


class _Runs:
    """wandb, and trackio, which has the same calls."""

    def __init__(self, package: str, project: str, name: str, config: dict[str, Any]) -> None:
        self._module = _import(package)
        self._module.init(project=project, name=name, config=config)

    def log(self, record: dict[str, Any]) -> None:
        self._module.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def finish(self) -> None:
        self._module.finish()


class _Tensorboard:
    def __init__(self, directory: str) -> None:
        _import("tensorboard")
        self._writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(directory)

    def log(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if key != "step":
                self._writer.add_scalar(key, value, record["step"])

    def finish(self) -> None:
        self._writer.close()


def make_tracker(kind: str, *, project: str, name: str, directory: str, config: dict[str, Any]) -> Tracker:
    """The tracker called `kind`. Raises MissingError when its package is not installed."""
    if kind == "none":
        return _Nothing()
    return _Tensorboard(directory) if kind == "tensorboard" else _Runs(kind, project, name, config)


def check_tracker(kind: str) -> None:
    """Raises MissingError when the package of a tracker cannot be imported, before anything is written."""
    if kind != "none":
        _import(kind)


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == package
        what = "is not installed" if absent else f"cannot be imported: {str(error).splitlines()[0]}"
        raise MissingError(
            f"Tracking with {package!r} needs the package {package!r}, which {what.rstrip('.')}.",
            hint=f"pip install --upgrade 'lorica[{package}]'",
        ) from None
