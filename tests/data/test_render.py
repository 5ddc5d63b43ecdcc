from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lorica.core.errors import ConfigError, DataError
from lorica.data.records import Chat, Completion, Dataset, Text, load_records
from lorica.data.render import Example, Renderer, prepare

Dialect = Callable[[str | None], Any]
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello there"}
# "<" is left out so that no draw spells a control token, which training data may not hold.
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=20)
turns = st.lists(st.tuples(words, words), min_size=1, max_size=3)


def chat(*messages: Any) -> Chat:
    return Chat(tuple(messages), "x.jsonl, line 3")


def talk(pairs: list[tuple[str, str]], system: str | None = None) -> Chat:
    messages = [{"role": "system", "content": system}] if system is not None else []
    for asked, said in pairs:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return chat(*messages)


def trained_runs(example: Example) -> list[list[int]]:
    """The maximal runs of trained tokens."""
    runs: list[list[int]] = [[]]
    for token, weight in zip(example.tokens, example.weights, strict=True):
        if weight:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


@given(pairs=turns, system=st.none() | words)
def test_what_is_trained_is_each_answer_and_its_stop_token(
    renderer: Renderer, pairs: list[tuple[str, str]], system: str | None
) -> None:
    runs = trained_runs(renderer.example(talk(pairs, system)))
    assert [renderer.parse(run) for run in runs] == [(said, True) for _, said in pairs]
    assert all(run[-1] in renderer.stop_ids for run in runs)


@given(pairs=turns, system=st.none() | words)
def test_the_generation_prompt_is_a_prefix_of_every_example_that_answers_it(
    renderer: Renderer, pairs: list[tuple[str, str]], system: str | None
) -> None:
    record = talk(pairs, system)
    example = renderer.example(record)
    for index, message in enumerate(record.messages):
        if message["role"] == "assistant":
            prompt = renderer.prompt(record.messages[:index])
            assert list(example.tokens[: len(prompt)]) == prompt
            assert example.weights[len(prompt)] == 1.0


@given(pairs=turns)
def test_tokens_spell_exactly_what_the_template_prints(
    renderer: Renderer, tokenizer: Any, pairs: list[tuple[str, str]]
) -> None:
    record = talk(pairs)
    printed = tokenizer.apply_chat_template(list(record.messages), tokenize=False)
    assert tokenizer.decode(renderer.example(record).tokens) == printed


def test_tokens_are_those_of_transformers_for_ordinary_text(renderer: Renderer, tokenizer: Any) -> None:
    record = talk([("What is 2 + 2?", "It is 4."), ("Thanks!", "You are welcome.")], "Be kind.")
    messages = list(record.messages)
    theirs = tokenizer.apply_chat_template(messages, return_dict=False)
    assert list(renderer.example(record).tokens) == theirs
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert renderer.prompt(messages[:-1]) == prompt


@pytest.mark.parametrize("name", ["spaced", "forgetful", "closed", "strict", "tooled"])
def test_the_stop_token_is_trained_and_parsed_away_in_other_dialects(dialect: Dialect, name: str) -> None:
    renderer = Renderer(dialect(name))
    example = renderer.example(talk([("Hi", "Hello there")]))
    (run,) = trained_runs(example)
    assert run[-1] == renderer.template.probe.stop
    assert renderer.parse(run) == ("Hello there", True)
    assert list(example.tokens[: len(renderer.prompt([USER]))]) == renderer.prompt([USER])


@pytest.mark.parametrize("name", ["spaced", "forgetful", "closed", "strict", "tooled"])
def test_every_turn_is_found_in_other_dialects(dialect: Dialect, name: str) -> None:
    renderer = Renderer(dialect(name))
    runs = trained_runs(renderer.example(talk([("a", "one"), ("b", "two"), ("c", "three")])))
    assert [renderer.parse(run)[0].strip() for run in runs] == ["one", "two", "three"]


def test_nothing_after_the_stop_token_is_trained(renderer: Renderer) -> None:
    example = renderer.example(talk([("Hi", "Hello")]))
    last = max(i for i, weight in enumerate(example.weights) if weight)
    assert example.tokens[last] in renderer.stop_ids
    assert last < len(example) - 1


def test_train_on_last_trains_only_the_last_answer(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer, train_on="last")
    runs = trained_runs(renderer.example(talk([("a", "one"), ("b", "two")])))
    assert [renderer.parse(run) for run in runs] == [("two", True)]


def test_train_on_all_trains_everything_but_the_first_token(tokenizer: Any) -> None:
    example = Renderer(tokenizer, train_on="all").example(talk([("a", "one"), ("b", "two")]))
    assert example.weights == (0.0, *[1.0] * (len(example) - 1))


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_the_weight_of_a_turn_scales_its_tokens(tokenizer: Any, train_on: Any) -> None:
    renderer = Renderer(tokenizer, train_on=train_on)
    example = renderer.example(chat(USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 0.5}))
    first = len(renderer.prompt([USER]))
    second = len(renderer.prompt([USER, ANSWER, USER]))
    span = len(tokenizer.encode("Hello there")) + 1
    assert example.weights[first : first + span] == (0.0,) * span
    assert example.weights[second : second + span] == (0.5,) * span


def test_a_template_that_rewrites_its_history_is_refused_unless_only_the_last_answer_is_trained(
    dialect: Dialect,
) -> None:
    amnesiac = dialect("amnesiac")
    record = talk([("a", "one"), ("b", "two")])
    with pytest.raises(DataError, match="line 3: the chat template renders an assistant turn differently") as caught:
        Renderer(amnesiac).example(record)
    assert caught.value.hint == "Set train_on to 'last'."
    last = Renderer(amnesiac, train_on="last")
    assert [last.parse(run) for run in trained_runs(last.example(record))] == [("two", True)]


def test_tools_and_tool_calls_reach_the_template(dialect: Dialect) -> None:
    tokenizer = dialect("tooled")
    renderer = Renderer(tokenizer)
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    reply = {"role": "tool", "content": "4"}
    example = renderer.example(Chat((USER, call, reply, ANSWER), "x", ({"name": "add"},)))
    assert tokenizer.decode(example.tokens).startswith("TOOLS 1\n")
    assert [renderer.parse(run)[0] for run in trained_runs(example)] == ["[add]", "Hello there"]
    assert renderer.prompt([USER], tools=[{"name": "add"}]) == list(
        example.tokens[: len(renderer.prompt([USER], tools=[{"name": "add"}]))]
    )


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (chat(USER), "line 3 has no assistant turn"),
        (chat(ANSWER), "line 3 has no assistant turn that answers another turn"),
        (chat(USER, {**ANSWER, "weight": 0.0}), "line 3 has no trained token"),
        (chat(USER, {"role": "assistant", "content": "a<|im_end|>b"}), "line 3: turn 2 contains"),
    ],
)
def test_a_conversation_with_nothing_to_train_names_its_line(renderer: Renderer, record: Chat, said: str) -> None:
    with pytest.raises(DataError, match=said):
        renderer.example(record)


def test_an_opening_turn_of_the_assistant_is_context(renderer: Renderer) -> None:
    runs = trained_runs(renderer.example(chat({"role": "assistant", "content": "Welcome"}, USER, ANSWER)))
    assert [renderer.parse(run)[0] for run in runs] == ["Hello there"]


@given(prompt=words, completion=words)
def test_raw_completions_train_the_completion_and_the_end_of_text(
    dialect: Dialect, prompt: str, completion: str
) -> None:
    assume(prompt or completion)
    bare = Renderer(_bare(dialect))
    example = bare.example(Completion(prompt, completion, "x"))
    opening = bare.prompt(prompt)
    assert list(example.tokens[: len(opening)]) == opening
    assert bare.parse(example.tokens[len(opening) :]) == (completion, True)
    start = max(len(opening), 1)
    assert example.weights[start:] == (1.0,) * (len(example) - start)


_made: dict[str, Any] = {}


def _bare(dialect: Dialect) -> Any:
    """One tokenizer without a template for all draws of a property."""
    return _made.setdefault("bare", dialect(None))


def test_completions_become_chat_exactly_when_asked_or_when_there_is_a_template(
    tokenizer: Any, dialect: Dialect, tmp_path: Path
) -> None:
    record = Completion("Hi", "Hello there", "x")
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "Hi", "completion": "Hello there"}))
    data = load_records(tmp_path / "x.jsonl")
    as_chat = Renderer(tokenizer).example(talk([("Hi", "Hello there")]))
    assert Renderer(tokenizer).example(record) == Renderer(tokenizer, chat=True).example(record) == as_chat
    assert Renderer(tokenizer, chat=False).example(record) == Renderer(dialect(None)).example(record) != as_chat
    assert "because the tokenizer has a chat template" in Renderer(tokenizer).decisions(data)[0]
    assert "because the tokenizer has no chat template" in Renderer(dialect(None)).decisions(data)[0]
    assert "because" not in Renderer(tokenizer, chat=False).decisions(data)[0]
    with pytest.raises(DataError, match="no chat template"):
        Renderer(dialect(None), chat=True).example(record)


def test_text_is_trained_whole_with_one_end_token(renderer: Renderer, tokenizer: Any) -> None:
    example = renderer.example(Text("Once upon a time", "x"))
    assert list(example.tokens) == [*tokenizer.encode("Once upon a time"), tokenizer.eos_token_id]
    assert example.weights == (0.0, *[1.0] * (len(example) - 1))
    assert renderer.example(Text("Once upon a time" + tokenizer.eos_token, "x")) == example


def test_a_tokenizer_that_opens_every_text_keeps_its_opening_token(dialect: Dialect) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = dialect(None)
    tokenizer.bos_token = "<|im_start|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    renderer = Renderer(tokenizer)
    body = tokenizer.encode("Hi", add_special_tokens=False)
    assert tokenizer.encode("Hi") == [bos, *body]
    assert renderer.prompt("Hi") == [bos, *body]
    assert renderer.prompt("") == [bos]
    assert list(renderer.example(Text("Hi", "x")).tokens) == [bos, *body, tokenizer.eos_token_id]
    assert renderer.example(Completion("", "Hi", "x")).tokens[0] == bos


def test_a_tokenizer_without_an_end_token_cannot_render_text(dialect: Dialect) -> None:
    tokenizer = dialect(None)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="x: the tokenizer has no end-of-text token"):
        Renderer(tokenizer).example(Text("Hi", "x"))


def test_a_template_that_cannot_be_trained_does_not_stop_plain_text(dialect: Dialect) -> None:
    renderer = Renderer(dialect("endless"))
    assert renderer.example(Text("Hi", "x")).trained
    with pytest.raises(DataError, match="no special token"):
        renderer.example(talk([("Hi", "Hello")]))


def test_parsing_sampled_tokens_without_a_stop_says_so(renderer: Renderer, tokenizer: Any) -> None:
    assert renderer.parse(tokenizer.encode("Hello the")) == ("Hello the", False)
    assert renderer.parse([]) == ("", False)


def test_unknown_settings_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="train_on is 'asistant'.*Did you mean 'assistant'"):
        Renderer(tokenizer, train_on="asistant")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="chat is 'maybe'"):
        Renderer(tokenizer, chat="maybe")  # type: ignore[arg-type]


def test_prepare_renders_every_row_then_cuts(renderer: Renderer, tmp_path: Path) -> None:
    rows = [{"text": "a b c d e f g h"}, {"text": "a"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data: Dataset = load_records(tmp_path / "x.jsonl")
    whole = prepare(data, renderer)
    assert whole.truncation is None
    assert whole.lengths == tuple(map(len, whole.examples))
    cut = prepare(data, renderer, 4)
    assert cut.truncation is not None and cut.truncation.count == 1
    assert cut.lengths == whole.lengths
    assert [len(example) for example in cut.examples] == [4, 2]
