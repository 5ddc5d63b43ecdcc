from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lorica.core.errors import DataError
from lorica.data.everyday import SPLITS, everyday_path, resolve
from lorica.data.records import load_records
from lorica.data.render import Renderer
from scripts.everyday.__main__ import content, read, stale
from scripts.everyday.grammar import Dice, expand, parse, variants, with_shared
from scripts.everyday.rows import Row, faults, make
from scripts.everyday.schema import CALLS, problems, table
from scripts.everyday.wording import SHARED, WORDING

ROWS = {"train": 3200, "test": 320, "handwritten": 160}
TOKENS = 75


@pytest.fixture(scope="module")
def everyday() -> dict[str, list[Row]]:
    return {split: read(everyday_path(split)) for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_every_shipped_split_loads_by_name_and_renders(renderer: Renderer, split: str) -> None:
    data = load_records(f"everyday:{split}")
    assert data.path == str(everyday_path(split))
    assert data.shape.name == "messages"
    assert all(renderer.example(record).trained for record in data.records[:50])


def test_the_bare_name_is_the_training_split_and_paths_stay_paths() -> None:
    assert resolve("everyday") == everyday_path("train")
    assert resolve("data/x.jsonl") == Path("data/x.jsonl")


def test_an_unknown_split_names_its_nearest_neighbour() -> None:
    with pytest.raises(DataError, match="no split 'tran'.*Did you mean 'train'"):
        load_records("everyday:tran")


def test_the_generator_makes_the_shipped_files_byte_for_byte_and_finds_no_fault_in_the_handwritten_one() -> None:
    assert stale() == []


def test_a_changed_row_and_a_missing_file_are_found(tmp_path: Path, everyday: dict[str, list[Row]]) -> None:
    for split, rows in everyday.items():
        (tmp_path / f"{split}.jsonl").write_bytes(content(rows[1:] if split == "test" else rows))
    twice = [Row("play some jazz", '{"call": "music", "genre": "jazz", "loud": true}'), everyday["train"][0]]
    (tmp_path / "handwritten.jsonl").write_bytes(content(twice))
    assert stale(tmp_path) == [
        "test.jsonl differs from what the generator makes; run `python -m scripts.everyday`",
        "handwritten.jsonl:1: music has no slot loud",
        "handwritten.jsonl:2: the request is there already",
    ]
    (tmp_path / "train.jsonl").unlink()
    assert stale(tmp_path) == ["train.jsonl is missing"]


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_canonical_and_copies_its_words_from_the_request(
    everyday: dict[str, list[Row]], split: str
) -> None:
    assert {r.request: faults(r.request, r.answer) for r in everyday[split] if faults(r.request, r.answer)} == {}


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_has_its_size_and_holds_every_call_equally_often(everyday: dict[str, list[Row]], split: str) -> None:
    counts = Counter(json.loads(row.answer)["call"] for row in everyday[split])
    assert sum(counts.values()) == ROWS[split]
    assert set(counts) == set(CALLS)
    assert len(set(counts.values())) == 1


def test_at_least_150_rows_are_written_by_hand(everyday: dict[str, list[Row]]) -> None:
    assert len(everyday["handwritten"]) >= 150


def test_no_request_is_there_twice_in_one_split_or_in_two(everyday: dict[str, list[Row]]) -> None:
    counts = Counter(row.key for rows in everyday.values() for row in rows)
    assert [key for key, count in counts.items() if count > 1] == []


def test_a_generated_test_request_is_not_in_training_even_without_its_filler(everyday: dict[str, list[Row]]) -> None:
    assert Row("Hey, can you call mum, please?", "").core == "call mum"
    cores = {row.core for row in everyday["train"]}
    assert [row.request for row in everyday["test"] if row.core in cores] == []


def test_a_value_said_in_the_generated_test_rows_is_said_in_training(everyday: dict[str, list[Row]]) -> None:
    closed = ("who", "genre", "city", "room", "day", "state", "colour", "from", "to")
    values = {
        split: {(key, value) for row in everyday[split] for key, value in json.loads(row.answer).items()}
        for split in SPLITS
    }
    assert not {(k, v) for k, v in values["test"] - values["train"] if k in closed}
    assert len({v for k, v in values["handwritten"] - values["train"] if k in ("who", "genre", "city")}) >= 20


def test_every_slot_of_every_call_is_filled_in_training(everyday: dict[str, list[Row]]) -> None:
    filled: dict[str, set[str]] = {name: set() for name in CALLS}
    for row in everyday["train"]:
        answer = json.loads(row.answer)
        filled[answer.pop("call")] |= set(answer)
    assert filled == {name: {slot.key for slot in call.slots} for name, call in CALLS.items()}


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_short(everyday: dict[str, list[Row]], tokenizer: Any, split: str) -> None:
    texts = [row.request + row.answer for row in everyday[split]]
    assert max(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]) + 8 <= TOKENS


def test_every_template_can_be_read_and_each_call_has_at_least_ten() -> None:
    assert set(WORDING) == set(CALLS)
    assert all(len(set(templates)) >= 10 for templates in WORDING.values())
    for template in (t for templates in WORDING.values() for t in templates):
        assert variants(parse(with_shared(template.lstrip(".?"), SHARED))) >= 1


def test_a_template_becomes_each_of_its_wordings_and_nothing_else() -> None:
    part, dice = parse("[please ](call|ring) {who}"), Dice(1)
    made = {expand(part, str.upper, dice) for _ in range(200)}
    assert made == {"please call WHO", "please ring WHO", "call WHO", "ring WHO"}
    assert len(made) == variants(part)


def test_the_same_seed_makes_the_same_rows_and_another_seed_makes_others() -> None:
    first, again, other = (make(seed, 3) for seed in (1, 1, 2))
    assert first == again
    assert not {row.key for row in first} & {row.key for row in other}


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        ("wake up", "it is not JSON"),
        ('{"call": "fly"}', "it names no known call"),
        ('{"call": "alarm", "day": "daily"}', "time is missing"),
        ('{"call": "alarm", "time": "7:15"}', "time is '7:15', not `HH:MM`, 24 hours"),
        ('{"call": "alarm", "day": "daily", "time": "07:15"}', "its keys are out of order"),
        ('{"call":"alarm","time":"07:15"}', "its spacing is another"),
        ('{"call": "timer"}', "none of hours, minutes, seconds is there"),
        ('{"call": "timer", "minutes": true}', "minutes is True"),
        ('{"call": "convert", "amount": 3.0, "from": "km", "to": "miles"}', "amount is 3.0"),
        ('{"call": "phone", "who": "sam?"}', "who is 'sam?'"),
        ('{"call": "phone", "who": "Sam"}', "who is 'Sam'"),
        ('{"call": "lights", "room": "cellar", "state": "on"}', "room is 'cellar'"),
    ],
)
def test_an_answer_that_is_not_canonical_is_said_to_be_wrong(answer: str, wrong: str) -> None:
    (found,) = problems(answer)
    assert wrong in found


def test_the_readme_beside_the_data_has_the_calls_and_sizes() -> None:
    readme = everyday_path("train").with_name("README.md").read_text(encoding="utf-8")
    assert table() in readme
    for split, rows in ROWS.items():
        assert f"| `{split}` | {rows} |" in readme
