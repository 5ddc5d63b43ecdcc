from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.data.example import Example
from lorica.data.records import Chat, load_records
from lorica.data.render import Renderer
from lorica.data.show import colour_tokens, explain

ANSI = re.compile(r"\x1b\[\d*m")
printable = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="<⟦⟧"), min_size=1, max_size=20)


def example_of(renderer: Renderer, asked: str, said: str) -> Example:
    messages = ({"role": "user", "content": asked}, {"role": "assistant", "content": said})
    return renderer.example(Chat(messages, "x"))


@given(asked=printable, said=printable)
def test_brackets_hold_exactly_the_answer_and_its_stop_token(renderer: Renderer, asked: str, said: str) -> None:
    shown = colour_tokens(example_of(renderer, asked, said), renderer.tokenizer, colour=False)
    assert re.findall("⟦(.*?)⟧", shown, re.S) == [f"{said}<|im_end|>"]
    assert asked in shown[: shown.index("⟦")]


@given(asked=printable, said=printable)
def test_colours_add_nothing_but_colour(renderer: Renderer, asked: str, said: str) -> None:
    example = example_of(renderer, asked, said)
    coloured = colour_tokens(example, renderer.tokenizer, colour=True)
    plain = colour_tokens(example, renderer.tokenizer, colour=False)
    assert ANSI.sub("", coloured) == plain.replace("⟦", "").replace("⟧", "")
    green = "".join(re.findall(r"\x1b\[(?:32|92)m(.*?)\x1b\[0m", coloured, re.S))
    assert green == f"{said}<|im_end|>"


def test_no_color_in_the_environment_wins(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    shown = colour_tokens(example_of(renderer, "Hi", "Hello"), renderer.tokenizer, colour=True)
    assert "\x1b" not in shown and "⟦Hello<|im_end|>⟧" in shown


@pytest.mark.parametrize("colour", [True, False])
def test_control_characters_of_the_data_do_not_reach_the_terminal(renderer: Renderer, colour: bool) -> None:
    shown = colour_tokens(example_of(renderer, "\x1b[2J\x07", "\r\u202e"), renderer.tokenizer, colour=colour)
    bare = ANSI.sub("", shown)
    assert "\\x1b" in bare and "\\x07" in bare and "\\r" in bare and "\\u202e" in bare
    assert bare.replace("\n", "").isprintable()


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_the_explanation_counts_what_the_run_will_see(renderer: Renderer, tmp_path: Path) -> None:
    rows = [{"instruction": "Say it", "output": "yes " * n, "source": "me"} for n in (1, 2, 3, 40)]
    data = load_records(write(tmp_path / "x.jsonl", rows))
    found = explain(data, renderer, max_length=30)
    whole = [renderer.example(record) for record in data.records]
    assert found.truncation is not None and found.truncation.rows == (3,)
    assert found.rows == 4
    assert found.tokens == sum(min(len(row), 30) for row in whole)
    assert found.trained_tokens == sum(sum(1 for w in row.weights[:30] if w) for row in whole)
    assert found.trained_share == found.trained_tokens / found.tokens
    assert found.lengths["shortest"] == len(whole[0]) and found.lengths["longest"] == len(whole[3])
    assert found.lengths["median"] == len(whole[1])


def test_the_explanation_prints_the_decision_and_the_first_row(renderer: Renderer, tmp_path: Path) -> None:
    rows = [{"instruction": "Say it", "output": "yes", "source": "me"}]
    text = str(explain(load_records(write(tmp_path / "x.jsonl", rows)), renderer, max_length=64))
    assert "alpaca, because the one row has 'instruction' and 'output'." in text
    assert "Every assistant turn is trained, including the stop token <|im_end|>." in text
    assert "Columns that are not used: source." in text
    assert "No row is longer than 64 tokens; nothing is truncated." in text
    assert text.endswith("First row:\n<|im_start|>user\nSay it<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n")


def test_the_explanation_is_plain_json(renderer: Renderer, tmp_path: Path) -> None:
    data = load_records(write(tmp_path / "x.jsonl", [{"text": "One two three"}]))
    found = explain(data, renderer, max_length=3)
    again = json.loads(json.dumps(found.to_dict()))
    assert again["truncation"]["tokens_lost"] == found.truncation.tokens_lost if found.truncation else False
    assert again["shape"] == "text" and again["rows"] == 1
    assert "truncated" not in str(explain(data, renderer))
