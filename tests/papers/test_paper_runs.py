"""A run of a paper: seeds, overrides, the record and its file, the page, the picture."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lorica.core.errors import ConfigError, FormatError, MethodError, MissingError
from lorica.papers.kit.page import render
from lorica.papers.kit.plot import Plot, Series, draw
from lorica.papers.kit.record import Record, digest, read_record
from lorica.papers.kit.running import command_line, run_paper, save, settings_of, why_stale


def silent(text):
    pass


@pytest.fixture
def record(coin):
    return run_paper(coin, "small", silent)


def test_seeds_differ_and_a_seed_is_the_same_in_every_run(coin, record):
    again = run_paper(coin, "small", silent)
    assert record.rows == again.rows and record.seeds == (0, 1, 2)
    assert len({seed[0]["heads"] for seed in record.rows}) > 1


def test_torchs_random_state_is_left_alone(coin):
    before = torch.get_rng_state()
    run_paper(coin, "reduced", silent, seeds=1)
    assert torch.equal(before, torch.get_rng_state())


def test_the_verdict_is_the_judges(coin, record):
    assert record.shows is True and record.verdict() == coin.judge(record.table(coin))


def test_a_record_survives_its_file_with_values_that_are_not_finite(coin, record, tmp_path):
    save(coin, record, tmp_path)
    assert read_record(coin, tmp_path) == record
    assert math.isinf(read_record(coin, tmp_path).rows[0][1]["never"])
    assert json.loads((tmp_path / "coin.json").read_text())["rows"][0][1]["never"] == "inf"  # strict JSON


def test_a_page_says_claim_figures_settings_result_and_command(coin, record, tmp_path):
    text = save(coin, record, tmp_path).read_text(encoding="utf-8")
    assert text == render(coin, record)
    for part in (coin.claim, "| heads | 1 ± 2 | the paper |", "| `throws` | `100` | `1000` | throws of each coin |",
                 "**The claim shows at small scale.**", "| c0 | 0.001 |", "never", "![coin](coin.png)",
                 "lorica papers run coin", "[coin.json](coin.json)", coin.limits, "arXiv 0000.00000"):  # fmt: skip
        assert part in text
    assert (tmp_path / "coin.png").read_bytes().startswith(b"\x89PNG")


def test_a_claim_that_does_not_show_is_said_plainly(coin):
    record = run_paper(coin, "small", silent, overrides=["bias=[0.9,0.1]"])
    assert "**The claim does not show at small scale.**" in render(coin, record)
    undecided = run_paper(coin, "small", silent, overrides=["bias=[0.5,0.5]"])
    assert undecided.shows is None and "**Undecided at small scale.**" in render(coin, undecided)


def test_overrides_are_checked_and_are_in_the_command(coin):
    record = run_paper(coin, "full", silent, seeds=1, overrides=["throws=7"])
    assert record.settings["throws"] == 7
    assert record.command == "lorica papers run coin --scale full --seeds 1 --set throws=7"
    assert command_line(coin, "small", 3) == "lorica papers run coin"
    with pytest.raises(ConfigError, match="no setting 'throw'. Did you mean 'throws'"):
        settings_of(coin, "small", ["throw=7"])
    with pytest.raises(ConfigError, match="no scale 'smal'.*Did you mean 'small'"):
        settings_of(coin, "smal")
    with pytest.raises(ConfigError, match="seeds is 0"):
        run_paper(coin, "small", silent, seeds=0)


def test_a_record_is_stale_once_settings_or_revision_change(coin, record, monkeypatch):
    assert why_stale(coin, record) is None and record.digest == digest(coin, coin.small)
    monkeypatch.setattr(type(coin), "revision", 2)
    assert isinstance(why_stale(coin, record), MethodError)
    monkeypatch.setattr(type(coin), "revision", 1)
    monkeypatch.setattr(type(coin), "small", coin.small.replace(throws=99))
    assert "other settings" in str(why_stale(coin, record))


def test_an_experiment_without_rows_is_an_error(coin, monkeypatch):
    monkeypatch.setattr(type(coin), "run", lambda self, settings, seed, say: [])
    with pytest.raises(MethodError, match="'coin' gave no rows for seed 0"):
        run_paper(coin, "small", silent)


def test_a_record_that_is_absent_or_broken_is_one_sentence(coin, tmp_path):
    with pytest.raises(MissingError, match="no stored results"):
        read_record(coin, tmp_path)
    for text in ("{", "[]", '{"rows": 3}', '{"rows": [], "seeds": [], "colour": 1}'):
        (tmp_path / "coin.json").write_text(text)
        with pytest.raises(FormatError, match="coin.json is not the record"):
            read_record(coin, tmp_path)
    assert isinstance(Record, type)


def test_a_picture_says_how_many_points_it_cannot_show():
    lines = Plot("p", "x", "y", (Series("a", (1.0, 10.0), (1.0, math.inf), (0.1, math.nan)),), log_x=True, log_y=True)
    bars = Plot("q", "x", "y", (Series("a", ("m", "n"), (1.0, 2.0), (0.1, 0.2)), Series("b", ("m",), (math.nan,))))
    assert draw([lines, bars]).startswith(b"\x89PNG")
