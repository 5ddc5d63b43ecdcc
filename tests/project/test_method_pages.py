"""Every method has a page that says what it is, what it costs and what was measured, and is in the README's table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorica.methods import all_methods

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "methods"
HEADINGS = ("Equation", "Paper", "When to use it", "When not to", "Cost", "Settings", "Example", "Measured")


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_a_method_has_a_page_with_every_heading(name):
    path = PAGES / f"{name}.md"
    assert path.is_file(), f"write docs/methods/{name}.md"
    lines = path.read_text(encoding="utf-8").splitlines()
    headings = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert [h for h in headings if h in HEADINGS] == list(HEADINGS)


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_a_method_page_cites_the_paper_that_the_method_declares(name):
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    paper = all_methods()[name].paper
    assert paper.title in text and paper.venue in text and f"https://arxiv.org/abs/{paper.arxiv}" in text


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_a_method_page_explains_every_setting(name):
    section = (PAGES / f"{name}.md").read_text(encoding="utf-8").partition("\n## Settings\n")[2].partition("\n## ")[0]
    assert [field for field in all_methods()[name].model_fields if f"`{field}`" not in section] == []


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_a_method_page_has_a_python_block_and_the_measured_markers(name):
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert "```python" in text.partition("\n## Example\n")[2].partition("\n## ")[0]
    measured = text.partition("\n## Measured\n")[2]
    assert "<!-- measured:begin -->" in measured and "<!-- measured:end -->" in measured


def test_no_page_is_left_of_a_method_that_is_gone():
    assert {path.stem for path in PAGES.glob("*.md")} - {"index"} == set(all_methods())


def test_the_readme_table_lists_exactly_the_registered_methods():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    listed = [line.split("`")[1] for line in lines if line.startswith("| [`")]
    assert listed == list(all_methods())


def test_the_measured_pages_hold_the_figures_of_measured_json():
    from scripts.docs.measured import render

    results = json.loads((PAGES / "measured.json").read_text(encoding="utf-8"))
    for name in all_methods():
        assert name in results["methods"], f"run `python -m scripts.docs.measure_methods --only {name}`"
        text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
        assert render(results, name) in text, "run `python -m scripts.docs.measure_methods --write`"
