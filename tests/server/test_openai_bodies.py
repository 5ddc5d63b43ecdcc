"""What a request of the OpenAI protocol may say, and what it is told otherwise."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from lorica.server.openai.bodies import CHAT, COMPLETION, ChatRequest, CompletionRequest

TURN = [{"role": "user", "content": "x"}]


def completion(**fields):
    return CompletionRequest(**{"model": "nano", "prompt": "x", **fields})


def chat(**fields):
    return ChatRequest(**{"model": "nano", "messages": TURN, **fields})


def refused(make, **fields):
    with pytest.raises(ValidationError) as caught:
        make(**fields)
    first = caught.value.errors()[0]
    assert first["type"] == "unsupported", first
    return first["ctx"]["param"], first["ctx"]["sentence"]


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("Hi", ["Hi"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ("", [""]),
        ([], []),
    ],
)
def test_a_prompt_may_be_text_tokens_or_a_list_of_them(prompt, wanted):
    assert completion(prompt=prompt).prompts == wanted


@pytest.mark.parametrize("prompt", [[1, "a"], [["a"]], [1.5], {"a": 1}, [-1], [[2**31]], None])
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValidationError):
        completion(prompt=prompt)


ASKED = {
    "best_of": 4,
    "suffix": "end",
    "presence_penalty": 0.5,
    "frequency_penalty": -1,
    "logit_bias": {"5": 10},
    "tools": [{"type": "function"}],
    "tool_choice": "required",
    "parallel_tool_calls": "yes",
    "functions": [{}],
    "function_call": {"name": "f"},
    "response_format": {"type": "json_object"},
    "modalities": ["text", "audio"],
    "audio": {"voice": "x"},
    "prediction": {"type": "content"},
    "web_search_options": {"x": 1},
    "reasoning_effort": "high",
    "verbosity": "low",
    "store": True,
    "metadata": {"a": "b"},
    "service_tier": "flex",
}


@pytest.mark.parametrize(
    ("make", "name"), [(completion, name) for name in COMPLETION] + [(chat, name) for name in CHAT]
)
def test_what_is_not_supported_is_refused_by_a_sentence_and_its_neutral_values_are_not(make, name):
    neutral, sentence = (COMPLETION if make is completion else CHAT)[name]
    for value in (None, *neutral):
        make(**{name: value})
    assert refused(make, **{name: ASKED[name]}) == (name, sentence)


def test_true_is_not_the_number_one():
    assert refused(completion, best_of=True)[0] == "best_of"
    assert refused(completion, presence_penalty=False)[0] == "presence_penalty"


def test_at_most_sixteen_stop_strings_and_none_of_them_empty():
    assert completion(stop="a").stops == ["a"]
    assert completion(stop=None).stops == completion(stop=[]).stops == []
    assert completion(stop=["a", "b", "c", "d"]).stops == ["a", "b", "c", "d"]
    for stop in ("", ["a", ""], ["a"] * 17, [1]):
        with pytest.raises(ValidationError):
            completion(stop=stop)


def test_settings_that_contradict_each_other_are_refused():
    assert refused(chat, top_logprobs=2)[0] == "top_logprobs"
    assert refused(chat, max_tokens=2, max_completion_tokens=3)[0] == "max_tokens"
    assert refused(completion, stream_options={"include_usage": True})[0] == "stream_options"
    assert refused(completion, top_k=0)[0] == "top_k"
    assert chat(max_tokens=2, max_completion_tokens=2, n=None).n == 1


@pytest.mark.parametrize("field", [{"temperature": float("nan")}, {"temperature": -1}, {"top_p": 0}, {"n": 0}])
def test_numbers_out_of_range_are_refused(field):
    with pytest.raises(ValidationError):
        completion(**field)
