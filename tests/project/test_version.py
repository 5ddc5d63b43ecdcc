"""One version, everywhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import lorica

ROOT = Path(__file__).parents[2]


def test_the_project_takes_its_version_from_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if "version" in project["project"]:
        assert project["project"]["version"] == lorica.__version__
    else:
        assert "version" in project["project"]["dynamic"]
        source = ROOT / project["tool"]["hatch"]["version"]["path"]
        assert f'__version__ = "{lorica.__version__}"' in source.read_text(encoding="utf-8")


def test_the_changelog_begins_with_the_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", text, re.MULTILINE)[0] == lorica.__version__
