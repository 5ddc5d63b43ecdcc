"""Every Python block of the README and the docs runs, and every shipped config trains.

The blocks of a page run in order, in one namespace and one empty working directory. A block whose fence says `slow`
makes the whole page a slow test; `server` too, and then a server runs, and the environment says where.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lorica.recipes import sft
from lorica.recipes.config import SFTConfig, read_config, to_yaml
from lorica.recipes.configs import find_config, shipped

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page):
    """(first line, info string, source) of every Python block."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start()) + 2, m[1], m[2]) for m in BLOCK.finditer(text)]


def pages():
    found = [path for path in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))] if blocks(path)]
    return [pytest.param(path, marks=marks(path), id=path.relative_to(ROOT).as_posix()) for path in found]


def marks(page):
    return [pytest.mark.slow] if any({"slow", "server"} & set(info.split()) for _, info, _ in blocks(page)) else []


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The environment of a client whose server runs."""
    from tests.server.conftest import Process

    server = Process(tmp_path_factory.mktemp("served"))
    server.start()
    yield {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": server.key, "TINKER_TELEMETRY": "0"}
    assert server.terminate() == 0


@pytest.mark.parametrize("page", pages())
def test_every_python_block_of_a_page_runs(page, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if any("server" in info.split() for _, info, _ in blocks(page)):
        for name, value in request.getfixturevalue("served").items():
            monkeypatch.setenv(name, value)
    namespace = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]):
        for line, _, source in blocks(page):
            padded = "\n" * (line - 1) + source  # errors then name the line of the page
            exec(compile(padded, str(page), "exec"), namespace)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_config_parses_and_begins_with_what_it_is_for(name):
    config = read_config(find_config(name))
    assert SFTConfig.parse(read_config(find_config(name)).model_dump()) == config
    lines = find_config(name).read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and any(line.startswith("#   lorica train ") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_config_trains_for_two_steps(name, tmp_path):
    settings = ["steps=2", "batch_size=2", f"out={tmp_path / name}", "device=cpu"]
    outcome = sft.run(read_config(find_config(name), settings))
    assert outcome.steps == 2 and outcome.adapter is not None and (tmp_path / name / "loss.png").is_file()
    assert read_config(tmp_path / name / "config.yaml") == read_config(find_config(name), settings)
    assert to_yaml(read_config(tmp_path / name / "config.yaml")) == (tmp_path / name / "config.yaml").read_text()
