"""The README fits a screen: two commands, a short example, every method, every folder."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_and_the_contributors_page_fit_a_screen():
    assert len(README.splitlines()) <= 120  # one line for each method, and there are many
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 60


def test_the_readme_shows_the_two_entrances_of_the_makefile_and_there_are_no_others():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.findall(r"^([a-z-]+):", makefile, re.MULTILINE) == ["quickstart", "test"]
    assert re.findall(r"^make (\w+)", README, re.MULTILINE) == ["quickstart", "test"]


def test_the_example_of_the_readme_has_at_most_fifteen_lines_of_code():
    (example,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 15


def test_the_map_has_one_line_for_each_folder_of_the_source():
    folders = {path.parent.name for path in (ROOT / "src" / "lorica").glob("*/__init__.py")}
    listed = re.findall(r"^\| `(\w+)/` \|", README, re.MULTILINE)
    assert sorted(listed) == sorted(folders)


def test_a_folder_of_the_map_imports_none_that_stands_below_it():
    listed = re.findall(r"^\| `(\w+)/` \|", README, re.MULTILINE)
    for position, folder in enumerate(listed):
        text = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "src" / "lorica" / folder).rglob("*.py"))
        used = set(re.findall(r"^\s*(?:from|import) lorica\.(\w+)", text, re.MULTILINE))
        assert used <= set(listed[: position + 1]), f"{folder}/ imports {used - set(listed[: position + 1])}"
