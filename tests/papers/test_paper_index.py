"""Every paper of the index is declared in full, has a page of its present settings, and shows again what it showed."""

from __future__ import annotations

import pytest

from lorica.core.errors import MissingError
from lorica.methods import all_methods
from lorica.papers import all_papers, get_paper
from lorica.papers.base import SCALES
from lorica.papers.kit.page import render
from lorica.papers.kit.record import digest, read_record
from lorica.papers.kit.running import SEEDS, run_paper
from scripts.docs.reference import DOCS

PAGES = DOCS / "papers"
NAMES = sorted(all_papers())


@pytest.mark.parametrize("name", NAMES)
def test_a_paper_says_everything_about_itself(name):
    paper = get_paper(name)
    for field in ("title", "authors", "venue", "claim", "limits"):
        assert getattr(paper, field).strip(), field
    assert all(paper.cited()) and bool(paper.arxiv) != bool(paper.link)
    assert 2018 <= paper.year <= 2030 and paper.figures and paper.keys and paper.columns
    assert (type(paper).__doc__ or "").strip() and set(paper.methods) <= set(all_methods())
    for scale in SCALES:
        fields = type(paper.settings(scale)).model_fields
        assert [field for field, info in fields.items() if not info.description] == []


def test_an_unknown_paper_is_one_sentence_with_the_nearest_names():
    with pytest.raises(MissingError, match="no paper 'lorra' in the index. Did you mean 'lora'"):
        get_paper("lorra")


@pytest.mark.parametrize("name", NAMES)
def test_a_paper_has_a_page_that_was_measured_with_its_present_settings(name):
    paper = get_paper(name)
    record = read_record(paper, PAGES)
    assert record.digest == digest(paper, paper.small), f"stale; run `lorica papers run {name}`"
    assert record.scale == "small" and len(record.seeds) >= SEEDS
    assert record.verdict() == paper.judge(record.table(paper)), f"judged anew; run `lorica papers run {name} --stored`"


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_what_its_record_says(name):
    paper = get_paper(name)
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert text == render(paper, read_record(paper, PAGES)), "stale; run `python -m scripts.docs.reference`"
    assert (PAGES / f"{name}.png").is_file() == ("![" in text)


def test_no_page_is_left_of_a_paper_that_is_gone():
    assert {path.stem for path in PAGES.iterdir()} - {"index"} == set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_claim_that_shows_on_the_page_shows_at_reduced_size(name):
    paper = get_paper(name)
    record = run_paper(paper, "reduced", lambda text: None)
    if read_record(paper, PAGES).shows:
        assert record.shows is True, record.sentence
