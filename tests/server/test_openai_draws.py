"""Requests of the OpenAI protocol, answered by a real engine in this process."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import lorica
from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.link import EngineError
from lorica.server.errors import ApiError
from lorica.server.openai import jobs
from lorica.server.openai.answers import Chats, Completions
from lorica.server.openai.bodies import ChatRequest, CompletionRequest
from lorica.server.openai.draws import together
from lorica.server.openai.errors import RefusedError
from lorica.server.openai.models import Model
from lorica.server.settings import Limits
from tests.server.local_engine import LocalEngine

NANO = Path(lorica.__file__).parent / "models" / "nano"
STORY = "Once upon a time there was a little girl"


@pytest.fixture(scope="module")
def engine():
    backbone = lorica.load("nano", dtype="float32")
    local = LocalEngine(backbone)
    local.name = "nano"
    local.info = {"tokenizer": str(NANO), "context": 2048, "eos_ids": [2]}
    return local


def answer(engine, *, adapters=(), limits=None, chat=False, taking=False, **fields):
    """The answer of one request; with `taking`, the parts of a stream."""
    model = Model("nano", engine, list(adapters), 0)

    async def run():
        limits_ = limits or Limits()
        if chat:
            body = ChatRequest(model="nano", **fields)
            answers = Chats(await jobs.chat(body, model, "t", limits_))
        else:
            body = CompletionRequest(model="nano", **fields)
            answers = Completions(await jobs.completion(body, model, "t", limits_))
        job, parts = answers.job, []
        async for number, sample in together(job.draws):
            if taking:
                parts.append(job.draws[number].writers[sample].take())
        if taking:
            return parts
        writers = [writer for draw in job.draws for writer in draw.writers]
        return answers.whole([answers.choice(index, writer.take()) for index, writer in enumerate(writers)])

    return asyncio.run(run())


def forward(engine, tokens):
    """Log-probabilities of every token but the first."""
    (result,) = Engine(engine.host).forward([Item(Example.whole(tokens), None)])
    return result.logprobs.tolist()


def test_echo_without_new_tokens_scores_the_prompt_as_the_trainer_does(engine):
    told = answer(engine, prompt=STORY, echo=True, max_tokens=0, logprobs=2)
    (choice,) = told["choices"]
    scores = choice["logprobs"]
    tokens = jobs.text_of(str(NANO)).renderer.prompt(STORY)
    assert choice["text"] == STORY == "".join(scores["tokens"])
    assert choice["finish_reason"] == "length"
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    assert scores["token_logprobs"][1:] == pytest.approx(forward(engine, tokens), abs=1e-4)
    assert [STORY[b:].startswith(t) for b, t in zip(scores["text_offset"], scores["tokens"], strict=True)] == [
        True
    ] * len(tokens)
    assert all(2 <= len(top) <= 3 for top in scores["top_logprobs"][1:])
    assert told["usage"]["prompt_tokens"] == told["usage"]["total_tokens"] == len(tokens)


def test_echo_with_one_token_as_lm_evaluation_harness_asks(engine):
    tokens = jobs.text_of(str(NANO)).renderer.prompt(STORY)
    told = answer(engine, prompt=[tokens, tokens[:4]], echo=True, max_tokens=1, logprobs=1, temperature=0, seed=1234)
    for choice, prompt in zip(told["choices"], (tokens, tokens[:4]), strict=True):
        scores = choice["logprobs"]["token_logprobs"]
        assert len(scores) == len(prompt) + 1
        assert scores[1:-1] == pytest.approx(forward(engine, prompt), abs=1e-4)
        for one, top in zip(scores[1:], choice["logprobs"]["top_logprobs"][1:], strict=True):
            assert one <= max(top.values())
        assert scores[-1] == max(choice["logprobs"]["top_logprobs"][-1].values())
    assert [choice["index"] for choice in told["choices"]] == [0, 1]


def test_the_same_seed_gives_the_same_text_whether_streamed_or_not_and_however_many_prompts(engine):
    fields = {"max_tokens": 12, "seed": 7, "n": 2, "temperature": 1.0}
    told = answer(engine, prompt=STORY, **fields)
    again = answer(engine, prompt=["Hello", STORY], **fields)
    texts = [choice["text"] for choice in told["choices"]]
    assert texts[0] != texts[1]
    assert [choice["text"] for choice in again["choices"]][2:] == texts
    parts = answer(engine, prompt=STORY, stream=True, taking=True, **{**fields, "n": 1})
    assert "".join(part.text for part in parts) == texts[0]
    assert len(parts) > 5


def test_a_stop_string_cuts_the_text_and_cancels_the_engine(engine):
    free = answer(engine, prompt=STORY, max_tokens=40, seed=3, temperature=0)["choices"][0]["text"]
    stop = free[7:12]
    assert free.index(stop) == 7
    before = len(engine.cancelled)
    told = answer(engine, prompt=STORY, max_tokens=40, seed=3, temperature=0, stop=[stop, "§"])
    (choice,) = told["choices"]
    assert (choice["text"], choice["finish_reason"]) == (free[:7], "stop")
    assert told["usage"]["completion_tokens"] < 40
    assert len(engine.cancelled) == before + 1


def test_a_stop_string_with_log_probabilities_cuts_in_the_same_place(engine):
    free = answer(engine, prompt=STORY, max_tokens=20, seed=3, temperature=0)["choices"][0]["text"]
    stop = free[7:12]
    (choice,) = answer(engine, prompt=STORY, max_tokens=20, temperature=0, stop=stop, logprobs=2)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (free[:7], "stop")
    spelled = "".join(choice["logprobs"]["tokens"])
    assert stop in spelled and free.startswith(spelled)


def test_a_conversation_is_answered_until_its_stop_token(engine):
    turns = [{"role": "user", "content": "Write a short sentence about a cat."}]
    told = answer(
        engine, chat=True, messages=turns, temperature=0, logprobs=True, top_logprobs=2, max_completion_tokens=60
    )
    (choice,) = told["choices"]
    assert choice["message"]["role"] == "assistant"
    assert "<|im_end|>" not in choice["message"]["content"]
    content = choice["logprobs"]["content"]
    assert len(content) == told["usage"]["completion_tokens"]
    said = b"".join(bytes(one["bytes"]) for one in content).decode()
    assert said.removesuffix("<|im_end|>") == choice["message"]["content"]
    assert all(len(one["top_logprobs"]) == 2 for one in content)
    assert choice["finish_reason"] == ("stop" if said.endswith("<|im_end|>") else "length")


def test_an_engine_that_dies_is_asked_again_and_nothing_is_said_twice(engine):
    fields = {"prompt": STORY, "max_tokens": 12, "seed": 11, "stream": True, "taking": True}
    whole = "".join(part.text for part in answer(engine, **fields))
    engine.dies_after = engine.told + 5
    parts = answer(engine, **fields)
    assert "".join(part.text for part in parts) == whole
    assert sum(len(part.tokens) for part in parts) == 12
    assert engine.sent[-1].seed == engine.sent[-2].seed == 11


def test_what_cannot_be_done_is_refused_before_the_engine_is_asked(engine):
    before = len(engine.sent)
    for fields, word in (
        ({"prompt": []}, "empty list"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": [[]]}, "no tokens"),
        ({"prompt": "x", "max_tokens": 0}, "empty answer"),
        ({"prompt": "x", "max_tokens": 4000}, "context of 2048"),
        ({"prompt": "x", "n": 2000}, "at most 1024"),
        ({"prompt": "x", "logprobs": 2000}, "2000"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"chat": True, "messages": [{"role": "user", "content": "x", "weight": 1}]}, "weight"),
        ({"chat": True, "messages": [{"role": "usr", "content": "x"}]}, "'user'"),
        ({"chat": True, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not text"),
        ({"chat": True, "messages": [{"role": "assistant", "tool_calls": [{}]}]}, "tool_calls"),
    ):
        with (
            pytest.raises(ValueError, match=word)
            if word in ("surrogate", "'user'", "not text", "weight")
            else (pytest.raises(ApiError, match=word))
        ):
            answer(engine, **fields)
    assert len(engine.sent) == before


def test_a_context_that_is_too_long_has_openais_code(engine):
    with pytest.raises(RefusedError) as caught:
        answer(engine, prompt="x", max_tokens=4000)
    assert (caught.value.code, caught.value.param, caught.value.status) == (
        "context_length_exceeded",
        "max_tokens",
        400,
    )


def test_what_the_engine_refuses_is_the_clients_error(engine):
    with pytest.raises(EngineError, match="99999999"):
        answer(engine, prompt=[99999999])


def test_a_stop_token_by_name_ends_the_sample_in_the_engine(engine):
    answer(engine, prompt=STORY, max_tokens=2, stop="<|endoftext|>")
    assert engine.sent[-1].stop_ids == [0, 2]
