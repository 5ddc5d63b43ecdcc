"""Probes on made scalars with a known answer, judged answers, and tables of scalars."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.adapters.analysis.directions_judge import JudgeThresholds, balanced, judge_all, rates
from lorica.adapters.analysis.directions_probe import CONTRASTS, ProbeConfig, contrasts, probe
from lorica.adapters.analysis.directions_scalars import ScalarTable, TokenLine, load_scalars, save_scalars
from lorica.core.errors import ConfigError, DataError, FormatError, MissingError

SITES = ("general", "general too", "domain", "noise", "still")
CONFIG = ProbeConfig(repeats=10)


def made(count=1200, seed=0):
    """Two sites follow the behaviour (one against it), one the domain, one neither, one never changes."""
    rng = np.random.default_rng(seed)
    behaviour, domain = rng.random(count) < 0.4, rng.random(count) < 0.6
    noise = rng.standard_normal((count, 5))
    x = noise * [1.0, 100.0, 1.0, 1.0, 0.0] + np.stack(
        [2.0 * behaviour, -200.0 * behaviour, 2.0 * domain, 0.0 * domain, 3.0 + 0.0 * domain], axis=1
    )
    return x, behaviour, domain


def test_a_probe_finds_the_site_that_tells_the_classes_apart_whatever_its_scale():
    x, behaviour, _ = made()
    found = probe(x, behaviour, SITES, CONFIG)
    assert found.accuracy > 0.9 and found.repeats == 10 and found.unconverged == 0
    assert found.coefficients["general"] > 0.1 and found.coefficients["general too"] < -0.1
    assert abs(found.coefficients["domain"]) < 0.03 and found.coefficients["still"] == 0.0
    assert [site for site in SITES if found.weighs(site, CONFIG)] == ["general", "general too"]
    assert found.positive == behaviour.sum() and found.negative == (~behaviour).sum()


def test_few_tokens_under_the_papers_penalty_weigh_nothing():
    """C multiplies a sum over tokens: the same C is a stronger penalty where there are fewer."""
    x, behaviour, _ = made(200)
    assert not any(probe(x, behaviour, SITES, CONFIG).coefficients.values())
    assert probe(x, behaviour, SITES, ProbeConfig(C=0.1, repeats=5)).accuracy > 0.8


def test_noise_is_told_apart_no_better_than_by_chance_and_classes_are_balanced():
    rng = np.random.default_rng(1)
    x, rare = rng.standard_normal((2000, 2)), rng.random(2000) < 0.1
    found = probe(x, rare, ("a", "b"), ProbeConfig(C=10.0, repeats=20))
    assert abs(found.accuracy - 0.5) < 0.06, "nine of ten would be right without balancing"


def test_the_four_contrasts_name_general_and_domain_sites():
    report = contrasts(*made(4000), SITES, CONFIG)
    assert tuple(report.contrasts) == CONTRASTS
    assert report.roles == {
        "general": "general", "general too": "general", "domain": "domain", "noise": "none", "still": "none"
    }  # fmt: skip
    assert report.contrasts[CONTRASTS[0]].coefficients["general too"] > 0.1, "the sign is the behaviour's"
    assert report.signs["general too"] == -1 and report.signs["general"] == 1


@settings(max_examples=6)
@given(flips=st.lists(st.sampled_from([-1.0, 1.0]), min_size=5, max_size=5))
def test_the_report_does_not_depend_on_the_arbitrary_signs_of_a_and_b(flips):
    x, behaviour, domain = made(1200)
    config = ProbeConfig(repeats=3)
    plain, turned = (contrasts(x * f, behaviour, domain, SITES, config) for f in (np.ones(5), np.array(flips)))
    assert plain.roles == turned.roles
    for name in CONTRASTS:
        one, other = plain.contrasts[name], turned.contrasts[name]
        assert one.accuracy == pytest.approx(other.accuracy, abs=0.02)
        weighty = [s for s in SITES[:3] if abs(one.coefficients[s]) > 0.1]
        for site in weighty:
            assert one.coefficients[site] == pytest.approx(other.coefficients[site], rel=0.02)


def test_whole_answers_are_held_out_where_tokens_of_an_answer_resemble_each_other():
    """Every answer has a scalar of its own and a class by chance: only tokens that were seen can be told."""
    rng = np.random.default_rng(2)
    answers, length = 40, 25
    own = rng.standard_normal((answers, 30))
    x = np.repeat(own, length, axis=0) + 0.01 * rng.standard_normal((answers * length, 30))
    label, group = np.repeat(rng.random(answers) < 0.5, length), np.repeat(np.arange(answers), length)
    config, sites = ProbeConfig(C=10.0, repeats=10), tuple(map(str, range(30)))
    split = probe(x, label, sites, config)
    whole = probe(x, label, sites, config, groups_N=group.tolist())
    assert split.accuracy > 0.9 and whole.accuracy < 0.75


def test_a_seed_gives_the_same_probe_and_another_one_another():
    x, behaviour, _ = made()
    first, again = (probe(x, behaviour, SITES, ProbeConfig(repeats=2)) for _ in range(2))
    assert first == again != probe(x, behaviour, SITES, ProbeConfig(repeats=2, seed=1))


def test_what_cannot_be_probed_is_one_sentence(monkeypatch):
    x, behaviour, domain = made(100)
    with pytest.raises(DataError, match="'positive' has 0 answers or tokens"):
        probe(x, np.zeros(100, bool), SITES)
    with pytest.raises(DataError, match=r"\(100, 5\) came with 100 labels and 2 sites"):
        probe(x, behaviour, SITES[:2])
    x[3, 1] = np.nan
    with pytest.raises(DataError, match="finite scalars"):
        probe(x, behaviour, SITES)
    with pytest.raises(DataError, match="Contrast 'behaviour, inside the domain': The class 'positive' has 0"):
        contrasts(made(100)[0], behaviour & ~domain, domain, SITES)
    with pytest.raises(ConfigError, match="steady"):
        ProbeConfig(steady=0.2)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MissingError, match="scikit-learn, which is not installed") as caught:
        probe(made(100)[0], behaviour, SITES)
    assert caught.value.hint == "pip install 'lorica[papers]'"


# -- judges ------------------------------------------------------------------------------------------------------------


def by_words(question, answer):
    return {"alignment": 0.0 if "bad" in answer else 90.0, "coherence": 10.0 if "?" in answer else 80.0, "extra": 1.0}


def test_rates_are_of_all_answers_so_that_nonsense_does_not_look_like_a_cure():
    judged = judge_all(by_words, [("q", text) for text in ("bad", "good", "bad?", "good", "bad")])
    assert [one.kind for one in judged] == ["misaligned", "aligned", "neither", "aligned", "misaligned"]
    found = rates(judged)
    assert (found.misaligned, found.aligned, found.coherent, found.answers) == (0.4, 0.4, 0.8, 5)
    assert judged[0].scores["extra"] == 1.0


@pytest.mark.parametrize(
    ("alignment", "coherence", "kind"),
    [(30, 51, "misaligned"), (30.1, 51, "neither"), (70, 90, "neither"), (70.1, 90, "aligned"), (0, 50, "neither")],
)
def test_the_papers_bounds_are_the_defaults(alignment, coherence, kind):
    assert JudgeThresholds().kind({"alignment": alignment, "coherence": coherence}) == kind


def test_classes_are_balanced_by_seed_and_too_few_is_an_error():
    judged = judge_all(by_words, [("q", "bad")] * 3 + [("q", "good")] * 9 + [("q", "?")])
    bad, good = balanced(judged, 1)
    assert bad == [0, 1, 2] and len(good) == 3 and set(good) <= set(range(3, 12))
    assert balanced(judged, 1) == (bad, good) and any(balanced(judged, s)[1] != good for s in range(2, 6))
    with pytest.raises(DataError, match="3 are misaligned and 9 aligned; 4 of each are needed"):
        balanced(judged, least=4)


def test_a_judge_that_gives_no_number_and_thresholds_that_cross_are_refused():
    for scores in ({"alignment": 3.0}, {"alignment": float("nan"), "coherence": 60.0}):
        with pytest.raises(DataError, match="a finite number for each of alignment, coherence"):
            judge_all(lambda q, a, s=scores: s, [("q", "a")])
    with pytest.raises(ConfigError, match="an answer would be both"):
        JudgeThresholds(misaligned_at_most=80)
    with pytest.raises(DataError, match="no judged answer"):
        rates([])


# -- tables ------------------------------------------------------------------------------------------------------------


def some_table():
    lines = [
        TokenLine(0, 0, 5, 'a "quoted",\n<b>line</b>', "question", {"class": "bad"}, (0.1, -1e-300)),
        TokenLine(0, 1, 6, " ", "answer", {"class": "bad"}, (1 / 3, 2.0)),
        TokenLine(1, 0, 7, "=1+1", "answer", {}, (5.0, 4.0)),
    ]
    return ScalarTable(("down 0", "down 1"), tuple(lines), {"adapter": "x"})


@pytest.mark.parametrize("name", ["table.csv", "table.json"])
def test_a_table_survives_its_file_exactly(tmp_path, name):
    table = some_table()
    found = load_scalars(save_scalars(table, tmp_path / "deep" / name))
    assert found.lines == table.lines and found.sites == table.sites
    assert found.about == ({} if name.endswith("csv") else table.about)


def test_a_table_gives_parts_labels_and_means():
    table = some_table()
    assert table.of_parts({"answer"}).lines == table.lines[1:]
    assert table.means()["answer"] == {"down 0": pytest.approx((1 / 3 + 5) / 2), "down 1": 3.0}
    assert table.of_parts({"question"}).label("class") == ["bad"]
    with pytest.raises(DataError, match="Row 1 of the table has no label 'class'"):
        table.label("class")
    with pytest.raises(DataError, match="no token of header"):
        table.of_parts({"header"})


def test_files_that_are_no_tables_are_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"must end in \.csv or \.json"):
        save_scalars(some_table(), tmp_path / "table.html")
    with pytest.raises(MissingError, match="no table of scalars"):
        load_scalars(tmp_path / "absent.csv")
    for name, text in (
        ("a.csv", "x,y\n1,2\n"),
        ("a.json", "{}"),
        ("b.json", "{"),
        ("b.csv", "row,position,token,text,part\n"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(FormatError, match="is no table of scalars"):
            load_scalars(tmp_path / name)
