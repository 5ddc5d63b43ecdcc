"""Which tokens are question, header and answer: of conversations, completions and prompts with sampled answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.core.errors import DataError
from lorica.data.records import Chat, Completion, Text
from lorica.data.render import Renderer
from lorica.data.token_parts import ask, parted

words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=20)


def chat(*said):
    roles = ("user", "assistant")
    return Chat(tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(said)), "x.jsonl, line 3")


def text_of(renderer, row, *parts):
    return renderer.tokenizer.decode([t for t, part in zip(row.tokens, row.parts, strict=True) if part in parts])


@given(said=st.lists(words, min_size=2, max_size=6).filter(lambda s: len(s) % 2 == 0))
def test_the_parts_of_a_chat_are_its_turns_and_the_header_is_the_generation_prompt(renderer, said):
    record = chat(*said)
    row, example = parted(renderer, record), renderer.example(record)
    assert row.tokens == example.tokens
    assert [part == "answer" for part in row.parts] == [weight > 0 for weight in example.weights]
    assert text_of(renderer, row, "header") == "<|im_start|>assistant\n" * (len(said) // 2)
    assert text_of(renderer, row, "rest") == "\n"
    asked = ask(renderer, record.messages[:1])
    assert row.tokens[: len(asked.tokens)] == asked.tokens and row.parts[: len(asked.tokens)] == asked.parts


def test_whether_the_header_counts_as_answer_is_for_the_caller_to_say(renderer):
    row = parted(renderer, chat("Hi", "Hello"))
    both, words_alone = (row.mask("answer", header_in_answer=flag) for flag in (True, False))
    header = row.parts.count("header")
    assert header == 3 and sum(both) == sum(words_alone) + header
    assert sum(row.mask("all", header_in_answer=False)) == len(row.tokens)
    asked = row.mask("question", header_in_answer=True)
    assert sum(asked) == row.parts.count("question") and not any(a and b for a, b in zip(asked, both, strict=True))


def test_a_sampled_answer_stands_behind_its_prompt(renderer):
    record = chat("Hi", "Hello")
    row = parted(renderer, record)
    asked = ask(renderer, record.messages[:1])
    sampled = row.tokens[len(asked.tokens) : -1]
    found = asked.answered(sampled)
    assert (*found.tokens, row.tokens[-1]) == row.tokens and (*found.parts, "rest") == row.parts


def test_a_turn_without_weight_is_an_answer_all_the_same(renderer):
    record = Chat(
        tuple({"role": r, "content": "x", **w} for r, w in (("user", {}), ("assistant", {"weight": 0}),
                                                             ("user", {}), ("assistant", {}))), "here"
    )  # fmt: skip
    assert text_of(renderer, parted(renderer, record), "answer") == "x<|im_end|>" * 2


def test_completions_as_chat_and_as_raw_text(tokenizer):
    record = Completion("2+2=", "4", "here")
    as_chat = parted(Renderer(tokenizer), record)
    assert set(as_chat.parts) == {"question", "header", "answer", "rest"}
    raw = parted(Renderer(tokenizer, chat=False), record)
    assert set(raw.parts) == {"question", "answer"}
    assert tokenizer.decode([t for t, p in zip(raw.tokens, raw.parts, strict=True) if p == "question"]) == "2+2="
    asked = ask(Renderer(tokenizer), "2+2=")
    assert set(asked.parts) == {"question"} and raw.tokens[: len(asked.tokens)] == asked.tokens


def test_running_text_has_no_answer(renderer):
    row = parted(renderer, Text("Once upon a time", "here"))
    assert all(row.mask("all", header_in_answer=True))
    for which in ("answer", "question"):
        with pytest.raises(DataError, match=f"here has no tokens of '{which}'; running text"):
            row.mask(which, header_in_answer=True)


@pytest.mark.parametrize(("name", "header"), [("spaced", ""), ("closed", "<|im_start|>assistant\n")])
def test_templates_without_a_header_and_with_a_closing_token_of_their_own(dialect, name, header):
    renderer = Renderer(dialect(name))
    row = parted(renderer, chat("Hi", "Hello"))
    assert text_of(renderer, row, "header") == header
    assert "Hello" in text_of(renderer, row, "answer") and "Hi" in text_of(renderer, row, "question")
