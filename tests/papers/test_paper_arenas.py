"""Adapters that race in one arena learn as if each were alone, from data that is split without overlap."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from lorica.core.errors import DataError, MissingError
from lorica.data.example import Example
from lorica.methods import make_method
from lorica.papers.kit import digits, text
from lorica.papers.kit.arena import OPTIMIZER, Entry, race, rates
from lorica.papers.kit.modules import MLP, ModuleArena
from lorica.papers.kit.task import TaskSettings, open_arena
from lorica.papers.kit.teacher import move, teacher_arena


def silent(text):
    pass


def small_arena(seed=0):
    return teacher_arena(width=12, depth=2, outputs=3, rank=2, seed=seed, batch_size=8, rows=32)


def test_a_joint_race_equals_races_one_by_one():
    methods = [
        make_method("lora", rank=2),
        make_method("delta"),
        make_method("dora", rank=2),
        make_method("vera", rank=4),
    ]
    entries = [Entry({"number": i}, method, OPTIMIZER.replace(lr=3e-3)) for i, method in enumerate(methods)]
    joint = race(small_arena(), entries, steps=5, seed=0, say=silent)
    for row, entry in zip(joint, entries, strict=True):
        (alone,) = race(small_arena(), [entry], steps=5, seed=0, say=silent)
        assert alone == pytest.approx(row, rel=1e-4)


def test_an_entry_that_diverges_hurts_no_other():
    entries = rates({}, make_method("lora", rank=2), [1e-3, 1e30])
    good, bad = race(small_arena(), entries, steps=6, seed=0, say=silent)
    (alone,) = race(small_arena(), entries[:1], steps=6, seed=0, say=silent)
    assert good == pytest.approx(alone, rel=1e-4) and not math.isfinite(bad["test loss"])


def test_watch_sees_every_step_before_its_update():
    seen = []
    race(small_arena(), rates({}, make_method("lora", rank=2), [1e-3, 1e-2]), steps=3, seed=0, say=silent,
         watch=lambda step, losses: seen.append((step, losses)))  # fmt: skip
    assert [step for step, _ in seen] == [0, 1, 2] and seen[0][1][0] == pytest.approx(seen[0][1][1])


def test_rows_say_what_is_trained_and_its_share_of_the_base():
    arena = small_arena()
    (row,) = race(arena, rates({"method": "lora"}, make_method("lora", rank=2), [1e-3]), steps=1, seed=0, say=silent)
    assert row["parameters"] == 2 * 2 * (12 + 12) and row["share"] == row["parameters"] / arena.base_parameters()
    assert row["method"] == "lora" and row["lr"] == 1e-3


def test_full_fine_tuning_reaches_a_teacher_of_full_rank_and_a_low_rank_does_not():
    arena = teacher_arena(width=8, depth=1, outputs=8, rank=None, seed=0, batch_size=64, rows=256)
    entries = rates({"m": "full"}, make_method("delta"), [3e-2])
    entries += rates({"m": "one"}, make_method("lora", rank=1), [3e-2])
    rows = race(arena, entries, steps=150, seed=0, say=silent)
    assert rows[0]["test loss"] < 0.2 * rows[1]["test loss"]


def test_a_move_has_the_rank_and_the_norm_that_were_asked_for():
    weight, rng = torch.randn(9, 7), torch.Generator().manual_seed(0)
    found = move(weight, 2, rng)
    assert torch.linalg.matrix_rank(found) == 2 and found.norm() == pytest.approx(float(weight.norm()), rel=1e-5)
    assert torch.linalg.matrix_rank(move(weight, None, rng)) == 7


def test_an_mlp_is_the_same_for_the_same_seed_and_leaves_torch_alone():
    before = torch.get_rng_state()
    first, second = (MLP(4, 6, 2, 3, seed=1).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], MLP(4, 6, 2, 3, seed=2).state_dict()["head.weight"])
    torch.manual_seed(0)
    assert torch.get_rng_state().shape == before.shape


def test_digits_are_split_without_overlap_and_classes_begin_at_zero():
    pytest.importorskip("sklearn")
    parts = digits.pictures((5, 6, 7, 8, 9), 0, train=100)
    assert len(parts["train"][0]) == 100 and set(parts["test"][1].tolist()) == {0, 1, 2, 3, 4}
    assert sum(len(x) for x, _ in parts.values()) == sum(
        len(x) for x, _ in digits.pictures((5, 6, 7, 8, 9), 1).values()
    )
    assert not torch.equal(parts["train"][0][:9], digits.pictures((5, 6, 7, 8, 9), 1)["train"][0][:9])
    with pytest.raises(DataError, match="pictures of these digits"):
        digits.pictures((5,), 0, train=5000)


def test_a_missing_scikit_learn_is_one_sentence(monkeypatch):
    import importlib

    def absent(name):
        raise ImportError(name)

    digits._pictures.cache_clear()
    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingError, match="scikit-learn is not installed") as caught:
        digits.pictures((1,), 0)
    assert "lorica[papers]" in caught.value.hint


def test_text_parts_share_no_row_and_too_few_rows_are_refused():
    rows = [Example.whole((i, i + 1)) for i in range(20)] + [Example.whole((0, 1))]
    parts = text.split(rows, {"train": None, "validation": 4, "test": 6}, 0, "x")
    assert [len(parts[p]) for p in ("train", "validation", "test")] == [10, 4, 6]
    assert len({row.tokens for part in parts.values() for row in part}) == 20
    assert text.split(rows, {"train": None, "validation": 4, "test": 6}, 0, "x") == parts
    with pytest.raises(DataError, match="'x' has 20 different rows.*ask for 21"):
        text.split(rows, {"train": 11, "validation": 4, "test": 6}, 0, "x")


def test_data_that_is_not_there_is_one_sentence_that_says_where_to_set_it(monkeypatch, tmp_path):
    monkeypatch.setenv(text.FOLDER, str(tmp_path / "nowhere"))
    with pytest.raises(MissingError, match="not at .*nowhere") as caught:
        text.read_task("gsm8k")
    assert text.FOLDER in caught.value.hint
    (tmp_path / "bbh").mkdir()
    (tmp_path / "bbh" / "navigate.json").write_text('{"examples": [{"input": "Go. ", "target": "No"}]}')
    monkeypatch.setenv(text.FOLDER, str(tmp_path))
    (row,) = text.read_task("bbh/navigate")
    assert (row.prompt, row.completion) == ("Go.", "No")
    with pytest.raises(MissingError, match="no data set 'navigat' .*Did you mean 'navigate'"):
        text.read_task("bbh/navigat")


def test_t0_rows_lose_their_end_marker_and_rows_without_an_answer(monkeypatch, tmp_path):
    (tmp_path / "t0_templates").mkdir()
    lines = '{"prompt": "a ", "completion": " b <|endoftext|>"}\n{"prompt": "c", "completion": " <|endoftext|>"}\n'
    (tmp_path / "t0_templates" / "x.jsonl").write_text(lines)
    monkeypatch.setenv(text.FOLDER, str(tmp_path))
    assert [(r.prompt, r.completion) for r in text.read_task("t0/x")] == [("a", "b")]


@pytest.mark.slow
def test_a_text_task_trains_methods_jointly_and_answers(tmp_path, monkeypatch):
    lines = "".join(f'{{"prompt": "Say {w}.", "completion": "{w}"}}\n' for w in "abcdefghijklmnopqrstuvwxyz")
    path = tmp_path / "rows.jsonl"
    path.write_text(lines)
    settings = TaskSettings(task=str(path), model="nano", held_out=4, batch_size=4, steps=3, exact=2)
    arena = open_arena(settings, 0)
    entries = [
        *rates({"number": 0}, make_method("lora", rank=2), [1e-3]),
        *rates({"number": 1}, make_method("ia3"), [1e-2]),
    ]
    rows = race(arena, entries, steps=3, seed=0, say=silent)
    assert all({"validation loss", "test loss", "exact match"} <= set(row) for row in rows)
    (alone,) = race(open_arena(settings, 0), entries[:1], steps=3, seed=0, say=silent)
    assert alone == pytest.approx(rows[0], rel=1e-3)


def test_values_and_classes_have_their_losses():
    module = torch.nn.Linear(3, 2, bias=False)
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    for targets, loss in ((y, "classes"), (torch.randn(5, 2), "values")):
        arena = ModuleArena(
            copy.deepcopy(module), {"train": (x, targets), "test": (x, targets)}, batch_size=5, loss=loss
        )
        arena.enter(rates({}, make_method("lora", rank=1), [1e-3]), 1, 0)
        (found,) = arena.score("test")
        want = (
            torch.nn.functional.cross_entropy(module(x), y)
            if loss == "classes"
            else ((module(x) - targets) ** 2).mean() / 2
        )
        assert found["test loss"] == pytest.approx(float(want.detach()), rel=1e-5)
        assert ("test accuracy" in found) == (loss == "classes")
