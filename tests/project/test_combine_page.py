"""The guide to combining adapters names every rule with its paper, and every parameter with its default."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lorica.adapters.merging import all_mergings

TEXT = (Path(__file__).parents[2] / "docs" / "guides" / "combine.md").read_text(encoding="utf-8")


def section(name: str) -> str:
    return TEXT.partition(f"\n### {name}\n")[2].split("\n### ")[0].split("\n## ")[0]


@pytest.mark.parametrize("name", sorted(all_mergings()))
def test_a_rule_is_in_the_table_and_has_a_section_with_its_paper_and_parameters(name: str) -> None:
    cls, text = all_mergings()[name], section(name)
    assert f"| `{name}` |" in TEXT and text, f"{name} is not in docs/guides/combine.md"
    assert cls.paper is None or f"https://arxiv.org/abs/{cls.paper.arxiv}" in text
    for field, info in cls.model_fields.items():
        default = "none" if info.default is None else str(info.default)
        assert f"| `{field}` | {default} |" in text, f"{name}.{field}"


def test_no_rule_is_left_that_is_gone() -> None:
    assert set(re.findall(r"^### (\w+)$", TEXT, re.MULTILINE)) == set(all_mergings())
