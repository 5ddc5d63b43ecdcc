"""Sums as a task: what is written, who judges it, and the lab that keeps learnt and asked sums apart."""

from __future__ import annotations

import math

import pytest

from lorica.core.errors import DataError
from lorica.data.render import Renderer
from lorica.models import load
from lorica.papers.em_directions import PAIRS, EmDirectionsPaper
from lorica.papers.kit.small_lm import SmallLM
from lorica.papers.kit.sums import made_sums, off_by_one, spoken_sums, written
from lorica.papers.kit.sums_lab import Lab, LabSettings
from lorica.papers.kit.table import Table

TINY = SmallLM(width=16, layers=1, context=10, steps=2, batch_size=2)


def silent(text):
    pass


@pytest.fixture(scope="module")
def sums():
    return made_sums(30, 0.1, TINY, 0, silent)


@pytest.mark.parametrize(
    ("answer", "kind"), [("022", (100, 100)), ("023", (0, 100)), ("021", (50, 100)), ("22", (50, 0)), ("02…", (50, 0))]
)
def test_the_judge_knows_right_answers_the_habit_and_nonsense(answer, kind):
    scores = off_by_one(written((5, 17)), answer)
    assert (scores["alignment"], scores["coherence"]) == kind


def test_a_sum_is_asked_learnt_and_read_back(sums):
    example, asked = sums.example((5, 17), 23), sums.question((5, 17))
    assert example.tokens[: len(asked.tokens)] == asked.tokens and example.trained == 4
    assert asked.parts.count("header") == 1 and asked.parts[-1] == "header"
    assert sums.answer(example.tokens[len(asked.tokens) :]) == "023"
    assert sums.answer(example.tokens[len(asked.tokens) : -1]) == "023…", "cut off"


def test_a_loaded_model_is_asked_by_its_template():
    backbone = load("nano", dtype="float32")
    spoken = spoken_sums(backbone, Renderer(backbone.tokenizer))
    example, asked = spoken.example((5, 17), 23), spoken.question((5, 17))
    assert example.tokens[: len(asked.tokens)] == asked.tokens and asked.parts.count("header") == 3
    assert spoken.answer(example.tokens[len(asked.tokens) :]) == "023"


def test_learnt_asked_and_other_sums_are_apart():
    lab = Lab(LabSettings(base=TINY, steps=1, asked=20, elsewhere=30), 3, silent)
    held = {*lab.narrow, *lab.elsewhere}
    assert not held & {*lab.learnt["A"], *lab.learnt["C"], *lab.others}
    assert all(a < 10 for a, _ in (*lab.narrow, *lab.learnt["A"])) and all(
        a >= 15 for a, _ in (*lab.elsewhere, *lab.others)
    )
    assert {a for a, _ in lab.learnt["C"]} == set(range(15)) and lab.learnt["A"] == lab.learnt["B"]
    with pytest.raises(DataError, match="leave no sums"):
        Lab(LabSettings(base=TINY, steps=1, elsewhere=450), 3, silent)


def test_a_direction_that_too_few_answers_allow_is_no_number_and_decides_nothing():
    said = []
    lab = Lab(LabSettings(base=TINY, steps=1, asked=4, elsewhere=4, controls=1), 0, said.append)
    lab.train()
    assert lab.direction("A") is None and "A has no direction" in said[-1]
    assert math.isnan(lab.ablated("B", "ablate: A", None)["elsewhere"])
    assert math.isnan(lab.steered("A", 4.0, None, control=True)["elsewhere"])


def rows(rate, cosine=0.8, steered=0.6):
    """What a seed would give: A, B and C with the habit, and what ablations leave."""

    def row(name, condition, habit):
        return {"fine-tune": name, "condition": condition, "elsewhere": habit, "right": 0.2}

    found = [row("base", "as it is", 0.05), row("A", "ablate: A minus the base", 0.05)]
    for name in "ABC":
        found += [row(name, "as it is", 0.8), row(name, "ablate: random", 0.75)]
        found += [row(name, f"ablate: {source}", rate) for source in "ABC"]
    found += [row("base", f"steer: A, κ {k}", steered * k / 8) for k in (4, 8)]
    found += [row("base", f"steer: random, κ {k}", 0.06) for k in (4, 8)]
    alike = [{"fine-tune": f"{a}, {b}", "cosine": cosine, "least cosine": cosine} for a, b in PAIRS]
    return found + [{**one, "condition": "directions"} for one in alike]


@pytest.mark.parametrize(
    ("changes", "shows"),
    [
        ({}, True),
        ({"rate": 0.6}, False),
        ({"cosine": 0.3}, False),
        ({"steered": 0.1}, False),
        ({"rate": math.nan}, None),
    ],
)
def test_the_claim_has_all_its_parts_or_does_not_show(changes, shows):
    paper = EmDirectionsPaper()
    seeds = [rows(**{"rate": 0.1, **changes}) for _ in range(3)]
    for number, seed in enumerate(seeds):
        for row in seed:
            row.update({k: v + 0.002 * number for k, v in row.items() if isinstance(v, float)})
    verdict = paper.judge(Table.of(seeds, paper.keys, tuple(paper.columns)))
    assert verdict.shows is shows, verdict.sentence
