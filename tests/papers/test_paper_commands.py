"""`lorica papers`: list, show, run."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from lorica.cli.main import cli
from lorica.papers import Verdict


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def call(*words):
    return CliRunner().invoke(cli, ["papers", *words], catch_exceptions=False)


def test_the_list_has_a_line_for_each_paper_and_says_what_was_not_run(known):
    lines = call("list").stdout.splitlines()
    assert len(lines) == 2 and "coin" in lines[1] and lines[1].endswith("not run")
    assert [paper["name"] for paper in json.loads(call("list", "--json").stdout)] == ["coin"]


def test_show_tells_the_claim_before_a_run_and_the_result_after_it(known):
    before = call("show", "coin").stdout
    assert known.claim in before and "not run here yet" in before and "throws" in before
    ran = call("run", "coin")
    assert ran.exit_code == 0 and ran.stdout.startswith("The claim shows at small scale. It gains")
    assert "throwing with seed 2" in ran.stderr and "saved docs/papers/coin.md" in ran.stderr
    after = call("show", "coin").stdout
    assert "The claim shows at small scale" in after and "±" in after
    assert call("list").stdout.splitlines()[1].endswith("yes")


def test_changed_settings_and_other_scales_do_not_overwrite_the_page(known, tmp_path):
    assert call("run", "coin", "--set", "throws=5").exit_code == 0
    assert call("run", "coin", "--scale", "reduced").exit_code == 0
    assert call("run", "coin", "--seeds", "1").exit_code == 0
    assert not (tmp_path / "docs").exists() and (tmp_path / "runs" / "papers" / "coin.md").is_file()
    assert call("run", "coin", "--seeds", "1", "--out", "here").exit_code == 0
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"coin.md", "coin.png", "coin.json"}


def test_stored_rows_are_judged_and_written_again_without_a_run(known, monkeypatch):
    assert call("run", "coin").exit_code == 0
    monkeypatch.setattr(type(known), "judge", lambda self, table: Verdict(None, "Nobody knows."))
    result = call("run", "coin", "--stored")
    assert result.exit_code == 0 and result.stdout.startswith("Undecided at small scale. Nobody knows.")
    assert "throwing" not in result.stderr and "Nobody knows." in call("show", "coin").stdout
    assert "no stored results" in call("run", "coin", "--stored", "--out", "elsewhere").stderr


def test_json_is_one_document_with_means_and_raw_rows(known):
    result = call("run", "coin", "--json")
    found = json.loads(result.stdout)
    assert result.stderr == "" and found["result"]["shows"] is True and len(found["result"]["rows"]) == 3
    assert found["result"]["means"][0]["heads"].keys() == {"mean", "spread"}
    assert found["page"] == "docs/papers/coin.md"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "coi"), "no paper 'coi' in the index. Did you mean 'coin'"),
        (("show", "coi"), "no paper 'coi'"),
        (("run", "coin", "--set", "throw=3"), "no setting 'throw'. Did you mean 'throws'"),
        (("run", "coin", "--set", "throws"), "not of the form key=value"),
        (("run", "coin", "--set", "throws=0"), "throws is 0"),
        (("run", "coin", "--scale", "smal"), "no scale 'smal'"),
        (("run", "coin", "--seeds", "0"), "seeds is 0"),
    ],
)
def test_wrong_words_are_one_sentence_before_anything_is_computed(known, words, said):
    result = call(*words)
    assert result.exit_code == 1 and result.stdout == "" and said in result.stderr and "throwing" not in result.stderr
