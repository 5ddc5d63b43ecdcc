"""Skills are trained side by side as if alone, once in a process, and left as they are by what is made of them."""

from __future__ import annotations

import json

import pytest
import torch

from lorica.client.local import Service
from lorica.core.errors import MissingError
from lorica.data.example import Example
from lorica.methods import make_method
from lorica.papers.kit.arena import OPTIMIZER
from lorica.papers.kit.skills import SkillSettings, side_by_side, t0_skills
from lorica.papers.lorahub import WAYS, LoraHubPaper
from lorica.papers.lorahub import Settings as LoraHubSettings
from tests.tiny import tiny

TASKS = {"up": [Example.whole([5, 6, 7, 8]), Example.whole([7, 8, 9])], "down": [Example.whole([40, 39, 38, 37])]}


def silent(text):
    pass


def trained(tasks):
    service = Service(tiny("llama", dtype=torch.float64))  # Adam makes float32's rounding as large as 1e-6
    method, optimizer = make_method("lora", rank=2), OPTIMIZER.replace(lr=1e-2)
    return side_by_side(service, tasks, method, optimizer, steps=4, batch_size=2, seed=3)


def test_skills_start_from_one_a_and_each_sees_its_own_task_alone():
    adapters, losses = trained(TASKS)
    assert list(adapters) == list(losses) == ["up", "down"]
    assert not torch.equal(adapters["up"].flat, adapters["down"].flat)
    other, _ = trained({"up": TASKS["up"], "down": [Example.whole([1, 2, 3])]})
    assert torch.allclose(adapters["up"].flat, other["up"].flat, atol=1e-6)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of shared data with three templates of a few short rows, and one task."""
    for name in ("one", "two", "three"):
        rows = [{"prompt": f"{name} {n} ?", "completion": f"{n}"} for n in range(12)]
        path = tmp_path / "t0_templates" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "bbh").mkdir()
    rows = [{"input": f"is {n} even?", "target": "yes" if n % 2 == 0 else "no"} for n in range(12)]
    (tmp_path / "bbh" / "even.json").write_text(json.dumps({"examples": rows}), encoding="utf-8")
    monkeypatch.setenv("LORICA_PAPERS_DATA", str(tmp_path))


def test_equal_settings_and_seeds_are_trained_once_whichever_paper_asks(data):
    plain = SkillSettings(skills=("one", "two"), steps=1, held_out=4, rank=2)
    first = t0_skills(plain, 0, silent)
    assert list(first.adapters) == ["one", "two"] and len(first.parts["one"]["test"]) == 4
    inherits = LoraHubSettings(**plain.model_dump(), targets=("even",))
    assert t0_skills(inherits, 0, silent) is first
    assert t0_skills(plain, 1, silent) is not first
    with first.tidy():
        first.service.host.add("made", make_method("lora", rank=2))
    assert list(first.service.host.adapters) == ["one", "two"]
    with pytest.raises(MissingError, match="no data set 'four'"):
        t0_skills(plain.replace(skills=("four",)), 0, silent)


def test_lorahubs_experiment_has_every_row_and_a_verdict(data):
    pytest.importorskip("nevergrad", reason="nevergrad is not installed: pip install 'lorica[compose]'")
    from lorica.papers.kit.table import Table

    settings = LoraHubSettings(
        skills=("one", "two"), targets=("even",), steps=1, held_out=4, rank=2, budget=3, exact=2, ties=(1.0,)
    )
    paper = LoraHubPaper()
    rows = paper.run(settings, 0, silent)
    table = Table.of([rows, rows], paper.keys, tuple(paper.columns))
    assert [line.key["way"] for line in table.where(target="even")] == list(WAYS)
    assert "with LoraHub's weights" in paper.judge(table).sentence and len(paper.plots(table)) == 2
