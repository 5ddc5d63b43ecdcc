"""`import lorica` and `lorica --help` are quick, because neither loads torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "matplotlib", "pydantic")
LIMIT = 0.3
"""Seconds of CPU time above a bare interpreter's; CPU time does not depend on what else the machine does."""

REPORT = "import json, resource, sys; used = resource.getrusage(resource.RUSAGE_SELF); " + (
    "print(json.dumps([used.ru_utime + used.ru_stime, sorted(sys.modules)]), file=sys.stderr)"
)
IMPORT = "import lorica\n"
HELP = """
from lorica.cli.main import cli
try:
    cli(["--help"], prog_name="lorica")
except SystemExit as done:
    assert not done.code
"""


def spent(program):
    """CPU seconds and module names of a fresh interpreter that runs a program."""
    done = subprocess.run([sys.executable, "-c", program + REPORT], capture_output=True, text=True, check=True)
    seconds, modules = json.loads(done.stderr.splitlines()[-1])
    return seconds, modules


def best(program, tries=3):
    return min(spent(program)[0] for _ in range(tries))


def heavy(program):
    return [name for name in spent(program)[1] if name in HEAVY]


def test_importing_lorica_loads_nothing_heavy_and_takes_under_300_ms():
    assert heavy(IMPORT) == []
    assert best(IMPORT) - best("") < LIMIT


def test_the_help_of_the_command_loads_nothing_heavy_and_takes_under_300_ms():
    assert heavy(HELP) == []
    assert best(HELP) - best("") < LIMIT


def test_an_unknown_public_name_is_an_attribute_error():
    import lorica

    assert not hasattr(lorica, "no_such_name")
    assert all(getattr(lorica, name) is not None for name in lorica.__all__)


@pytest.mark.slow
def test_importing_lorica_changes_nothing_in_torch_and_transformers():
    program = """
import torch, transformers
def state():
    owners = [torch, torch.nn, torch.nn.functional, torch.nn.Linear, torch.nn.Module, torch.Tensor,
              transformers.PreTrainedModel]
    return [{name: id(value) for name, value in vars(owner).items() if not name.startswith("__")} for owner in owners]
before = state()
import pkgutil, importlib, lorica
for info in pkgutil.walk_packages(lorica.__path__, "lorica."):
    if ".migrations." not in info.name:  # scripts that Alembic runs
        importlib.import_module(info.name)
changed = [
    name for was, now in zip(before, state()) for name in was
    if was[name] != now.get(name) and name not in ("_sync", "_inductor", "_dynamo")
]
assert changed == [], changed
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)
