from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorica.core.errors import DataError
from lorica.data.reading import parse_rows
from lorica.data.records import ACCEPTED, Chat, Completion, Dataset, Text, load_records, recognise, to_record

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind"}
GOOD: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "alpaca": {"instruction": "Hi", "output": "Hello"},
    "prompt_completion": {"prompt": "Hi", "completion": "Hello"},
    "text": {"text": "Hi"},
}


def load(tmp_path: Path, *rows: Any) -> Dataset:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return load_records(path)


@pytest.mark.parametrize("name", GOOD)
def test_each_shape_is_recognised_and_says_why(tmp_path: Path, name: str) -> None:
    data = load(tmp_path, GOOD[name], GOOD[name])
    assert data.shape.name == name
    assert data.shape.reason.startswith("all 2 rows have '")
    assert len(data) == 2
    assert data.records[1].where.endswith("rows.jsonl, line 2")


@pytest.mark.parametrize("name", ["messages", "sharegpt", "alpaca"])
def test_the_conversational_shapes_become_the_same_messages(name: str) -> None:
    record = to_record(GOOD[name], recognise([GOOD[name]], "x"), "x")
    assert isinstance(record, Chat)
    assert list(record.messages) == [USER, ANSWER]


def test_the_other_shapes_keep_their_texts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert load(tmp_path, GOOD["prompt_completion"]).records == (Completion("Hi", "Hello", f"{path}, line 1"),)
    assert load(tmp_path, GOOD["text"]).records == (Text("Hi", f"{path}, line 1"),)


def test_the_shape_of_every_sample_in_the_error_message_is_what_it_says() -> None:
    for name, sample in ACCEPTED.items():
        row = json.loads(sample[: sample.rindex("}") + 1])
        assert recognise([row], "x").name == name


def test_alpaca_input_follows_the_instruction_after_a_blank_line(tmp_path: Path) -> None:
    row = {"instruction": "Translate", "input": "chien", "output": "dog", "system": "Be terse"}
    (record,) = load(tmp_path, row).records
    assert isinstance(record, Chat)
    assert [message["content"] for message in record.messages] == ["Be terse", "Translate\n\nchien", "dog"]


def test_sharegpt_speakers_become_roles_and_the_system_column_comes_first(tmp_path: Path) -> None:
    turns = [{"from": who, "value": who} for who in ("human", "gpt", "observation", "chatgpt")]
    (record,) = load(tmp_path, {"conversations": turns, "system": "S"}).records
    assert isinstance(record, Chat)
    assert [message["role"] for message in record.messages] == ["system", "user", "assistant", "tool", "assistant"]


def test_conversations_may_also_say_role_and_content(tmp_path: Path) -> None:
    (record,) = load(tmp_path, {"conversations": [USER, ANSWER]}).records
    assert isinstance(record, Chat)
    assert list(record.messages) == [USER, ANSWER]


def test_tool_turns_tool_calls_and_tools_pass_through(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    reply = {"role": "tool", "content": "3", "tool_call_id": "a"}
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given in (tools, json.dumps(tools)):
        (record,) = load(tmp_path, {"messages": [USER, call, reply, ANSWER], "tools": given}).records
        assert isinstance(record, Chat)
        assert record.messages[1] == {**call, "content": ""}
        assert record.messages[2] == reply
        assert record.tools == tuple(tools)


def test_text_parts_of_a_content_are_joined(tmp_path: Path) -> None:
    turn = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    (record,) = load(tmp_path, {"messages": [turn, ANSWER]}).records
    assert isinstance(record, Chat)
    assert record.messages[0]["content"] == "ab"


def test_a_row_that_fits_two_shapes_takes_the_first_and_the_rest_is_named_as_unused(tmp_path: Path) -> None:
    data = load(tmp_path, {**GOOD["text"], **GOOD["messages"], "id": 7})
    assert data.shape.name == "messages"
    assert data.ignored == ("text", "id")


def test_plain_text_files_say_that_paragraphs_are_rows(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("One\n\nTwo\n")
    data = load_records(tmp_path / "x.txt")
    assert [record.text for record in data.records if isinstance(record, Text)] == ["One", "Two"]
    assert "one per paragraph" in data.shape.reason


def test_parquet_nulls_count_as_absent_fields(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, {**ANSWER, "name": "Bo"}], "tools": None}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    first, second = load_records(path).records
    assert isinstance(first, Chat) and isinstance(second, Chat)
    assert list(first.messages) == [USER, ANSWER]
    assert second.messages[1]["name"] == "Bo"


def test_the_fingerprint_changes_with_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD["text"]).fingerprint != load(tmp_path, GOOD["alpaca"]).fingerprint


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"question": "?", "answer": "!"},
            "line 2 lacks 'messages' \\(it holds 'question', 'answer'\\), while .*line 1",
        ),
        ({}, "line 2 lacks 'messages' \\(it holds nothing\\)"),
        (GOOD["alpaca"], "line 2 has the shape 'alpaca', while .*line 1 has the shape 'messages'"),
        ({"messages": None}, "line 2 lacks 'messages'"),
        ({"messages": "Hi"}, "line 2: 'messages' must be a list of turns, but it is a text"),
        ({"messages": {"role": "user"}}, "line 2: 'messages' must be a list of turns, but it is an object"),
        ({"messages": []}, "line 2: 'messages' is empty"),
        ({"messages": ["Hi"]}, "line 2: turn 1 of 'messages' must be an object, but it is a text"),
        ({"messages": [USER, {"content": "x"}]}, "line 2: turn 2 has no 'role'"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "role 'asistant'; .* Did you mean 'assistant'"),
        ({"messages": [{"role": 3, "content": "x"}]}, "line 2: turn 1 has the role 3"),
        ({"messages": [USER, {"role": "assistant"}]}, "line 2: turn 2 has no 'content'"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "line 2: turn 1: 'content' must be a text, but it is a number",
        ),
        (
            {"messages": [{"role": "user", "content": {}}]},
            "line 2: turn 1: 'content' must be a text, but it is an object",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "line 2: turn 1: .* part that is not text",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, r"line 2: turn 1: .*surrogate pair \(\\ud800\)"),
        ({"messages": [USER, {**ANSWER, "weight": -1}]}, "line 2: turn 2: 'weight' must be a number from 0 up"),
        ({"messages": [USER, {**ANSWER, "weight": "1"}]}, "line 2: turn 2: 'weight' must be a number from 0 up"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, "line 2: turn 1 is the user's and has the weight 1"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "line 2: 'tools' is a text that is not JSON"),
        ({"messages": [USER, ANSWER], "tools": {"a": 1}}, "line 2: 'tools' must be a list of objects"),
    ],
)
def test_a_malformed_row_of_messages_names_its_line(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        load(tmp_path, GOOD["messages"], row)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        (
            "sharegpt",
            {"conversations": [{"from": "humn", "value": "x"}]},
            "line 2: turn 1 is from 'humn'.*mean 'human'",
        ),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "line 2: turn 1 has no 'value'"),
        ("sharegpt", {"conversations": [{"from": "human", "value": 1}]}, "line 2: turn 1: 'value' must be a text"),
        ("sharegpt", {"conversations": [{}]}, "line 2: turn 1 has no 'role'"),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "x"}], "system": 1},
            "line 2: 'system' must be a text",
        ),
        ("alpaca", {"instruction": 1, "output": "x"}, "line 2: 'instruction' must be a text, but it is a number"),
        ("alpaca", {"instruction": "x", "output": ["y"]}, "line 2: 'output' must be a text, but it is a list"),
        ("alpaca", {"instruction": " ", "output": "x"}, "line 2: 'instruction' is empty"),
        ("alpaca", {"instruction": "x"}, "line 2 lacks 'output'"),
        ("prompt_completion", {"prompt": "x"}, "line 2 lacks 'completion'"),
        ("prompt_completion", {"prompt": "", "completion": ""}, "line 2: 'prompt' is empty"),
        (
            "prompt_completion",
            {"prompt": True, "completion": ""},
            "line 2: 'prompt' must be a text, but it is true or false",
        ),
        ("text", {"text": ""}, "line 2: 'text' is empty"),
        ("text", {"text": 1.5}, "line 2: 'text' must be a text, but it is a number"),
    ],
)
def test_a_malformed_row_of_any_other_shape_names_its_line(
    tmp_path: Path, name: str, row: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        load(tmp_path, GOOD[name], row)


def test_an_unknown_first_row_lists_every_accepted_shape(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1 holds 'question', which is none of the accepted shapes") as caught:
        load(tmp_path, {"question": "?"})
    assert all(sample in str(caught.value.hint) for sample in ACCEPTED.values())


def test_plain_lists_of_rows_are_recognised_and_no_rows_are_refused() -> None:
    assert recognise([GOOD["text"]], "memory").name == "text"
    with pytest.raises(DataError, match="memory, row 2 has the shape 'alpaca'"):
        recognise([GOOD["text"], GOOD["alpaca"]], "memory")
    with pytest.raises(DataError, match="memory holds no rows"):
        recognise([], "memory")


def test_items_of_an_array_are_named_by_their_number() -> None:
    rows = parse_rows(json.dumps([GOOD["text"], GOOD["alpaca"]]).encode(), "x.json")
    with pytest.raises(DataError, match="x.json, item 2 has the shape 'alpaca', while x.json, item 1"):
        recognise(rows, "x.json")
