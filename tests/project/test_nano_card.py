"""The card of the model that ships is one text in two places."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "nano.md"


def test_the_card_in_the_package_is_the_page_in_the_docs() -> None:
    card = files("lorica").joinpath("models/nano/README.md").read_text(encoding="utf-8")
    assert card == PAGE.read_text(encoding="utf-8")


def test_the_shipped_model_is_within_its_size() -> None:
    folder = Path(str(files("lorica").joinpath("models/nano")))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12 * 10**6
