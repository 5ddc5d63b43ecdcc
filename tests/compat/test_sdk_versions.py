"""The same script with every tinker SDK since the oldest that still works, against one server.

An SDK is unpacked into a folder of its own, kept between runs, before the other packages on the path: their
dependencies have been the same since 0.22.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.cookbook.offline import MODEL
from scripts.cookbook.served import QUIET, Served

pytestmark = pytest.mark.slow

VERSIONS = ["0.22.7", "0.24.1", "0.25.0", "0.26.2", "0.28.1", "0.30.4", "0.32.0", "0.34.0", "0.36.0", "0.38.0"]
"""The last patch of every minor version at which the wire changed. 0.37 was never published."""
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lorica-tests" / "tinker"
FLOW = Path(__file__).with_name("flow.py")


def sdk(version: str) -> Path | None:
    """A folder to put first on the path; None where the installed SDK is that version."""
    if importlib.metadata.version("tinker") == version:
        return None
    folder = CACHE / version
    if not (folder / "tinker").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*command, f"tinker=={version}"], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"tinker {version} could not be fetched: {done.stderr.strip().splitlines()[-1]}")
    return folder


def run(version: str, served: Served) -> dict[str, Any]:
    """What flow.py prints with that SDK."""
    folder = sdk(version)
    path = {"PYTHONPATH": str(folder)} if folder else {}
    done = subprocess.run(
        [sys.executable, str(FLOW), MODEL],
        cwd=served.output.parent,  # where the tokenizer of a relative name is found
        env=os.environ | QUIET | served.environment() | path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"tinker {version}:\n{done.stderr[-5000:]}"
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["sdk"] == version
    return told


@pytest.mark.parametrize("version", VERSIONS)
def test_an_sdk_trains_samples_saves_loads_and_lists(version: str, served: Served) -> None:
    told = run(version, served)
    assert MODEL in told["models"] and told["info"] == MODEL == told["run"]
    assert told["rank"] == 4 == told["weights rank"]
    first, second, third = told["losses"]
    assert first > second > third > told["after"][0]
    assert told["sampler"] == pytest.approx(told["trainer"], abs=1e-4)
    assert told["loaded"] == pytest.approx(told["trainer"], abs=1e-6)
    assert told["in place"] == pytest.approx(told["trainer"], abs=1e-6)
    assert told["ephemeral"] != pytest.approx(told["trainer"], abs=1e-4), "the ephemeral sampler has the next step"
    assert told["again"] == pytest.approx(told["after"], rel=1e-6), "a loaded optimiser continues as the first did"
    assert told["custom"] == pytest.approx(sum(value**2 for value in told["trainer"]), rel=1e-5)
    assert told["sampled"] == [len(tokens) for tokens in told["sequences"]] and len(told["sampled"]) == 2
    assert all(0 < count <= 5 for count in told["sampled"])
    assert told["runs"] and told["user"]
    assert len(told["before"]) == 2 and told["left"] == [told["state"]]


def test_every_sdk_gets_the_same_numbers(served: Served) -> None:
    oldest, newest = run(VERSIONS[0], served), run(VERSIONS[-1], served)
    same = ["losses", "trainer", "sampler", "sequences", "after", "loaded", "again", "custom"]
    assert {name: oldest[name] for name in same} == {name: newest[name] for name in same}
