"""The verdict on intruder dimensions follows from counts and from what scaling takes away."""

from __future__ import annotations

import pytest

from lorica.papers.intruders import FACTOR, IntrudersPaper, competitors
from lorica.papers.kit.table import Table


def table(counts, kept_gain, kept_forgetting):
    """Two seeds: LoRA with these counts, and these shares left after scaling; full fine-tuning with no intruder."""
    seeds = []
    for count in counts:
        rows = []
        for key, number in (({"method": "full"}, 0), ({"method": "lora", "rank": 1}, count)):
            rows.append(
                {**key, "lr": 1e-2, "validation loss": 2.0, "intruders": number, "gained": 3.0, "forgotten": 1.0}
            )
            for factor, gain, lost in ((1.0, 1.0, 1.0), (FACTOR, kept_gain, kept_forgetting)):
                rows.append({**key, "scaled by": factor, "gained": 3.0 * gain, "forgotten": lost})
        seeds.append(rows)
    paper = IntrudersPaper()
    return paper, Table.of(seeds, paper.keys, list(paper.columns))


@pytest.mark.parametrize(
    ("counts", "gain", "forgetting", "shows"),
    [
        ((40, 44), 0.95, 0.6, True),
        ((40, 44), 0.6, 0.95, False),
        ((0, 0), 0.95, 0.6, None),
        ((40, 44), 1.0, 1.0, None),
    ],
)
def test_both_parts_of_the_claim_must_hold(counts, gain, forgetting, shows):
    paper, found = table(counts, gain, forgetting)
    verdict = paper.judge(found)
    assert verdict.shows is shows
    assert f"{1 - forgetting:.1%}" in verdict.sentence and f"{1 - gain:.1%}" in verdict.sentence
    assert len(paper.plots(found)) == 3


def test_the_rate_falls_with_the_root_of_the_rank():
    entries = competitors(IntrudersPaper.small)
    found = {(entry.key.get("rank"), entry.key["lr"]) for entry in entries if entry.key["method"] == "lora"}
    assert found == {(1, 2.4e-2), (1, 4.8e-2), (8, 8.5e-3), (8, 1.7e-2), (64, 3e-3), (64, 6e-3)}
