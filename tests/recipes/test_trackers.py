"""Trackers: the real packages get every metric with its step; one that is absent is named before anything is made."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lorica.core.errors import MissingError
from lorica.recipes import sft
from lorica.recipes.config import SFTConfig

MakeConfig = Callable[..., SFTConfig]


def installed(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'lorica[{package}]'")


def test_tensorboard_holds_every_metric_of_every_step(config: MakeConfig, rows: Path) -> None:
    installed("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    outcome = sft.run(config(track="tensorboard", eval_every=2, data={"path": str(rows), "eval_path": str(rows)}))
    events = EventAccumulator(str(outcome.path))
    events.Reload()
    records = [json.loads(line) for line in (outcome.path / "metrics.jsonl").read_text().splitlines()]
    for key in ("loss", "lr", "grad_norm", "tokens", "eval_loss"):
        found = {e.step: e.value for e in events.Scalars(key)}
        assert found == pytest.approx({r["step"]: r[key] for r in records if key in r}, rel=1e-6)


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_wandb_and_trackio_take_the_run(
    package: str, config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    assert sft.run(config(track=package)).adapter is not None
    assert any((tmp_path / package).rglob("*"))


@pytest.mark.parametrize("package", ["wandb", "trackio", "tensorboard"])
def test_a_tracker_that_is_absent_is_named_before_anything_is_written(
    package: str, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    settings = config(track=package)
    with pytest.raises(MissingError, match=f"needs the package {package!r}, which is not installed") as caught:
        sft.run(settings)
    assert f"lorica[{package}]" in str(caught.value.hint)
    assert not Path(settings.out).exists()


def test_a_tracker_that_cannot_be_imported_says_why(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trackio.py").write_text("import no_such_module_of_trackio")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(MissingError, match="cannot be imported: No module named 'no_such_module_of_trackio'"):
        sft.run(config(track="trackio"))
