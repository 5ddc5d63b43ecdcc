"""The `openai` package against a real server: models, completions, conversations, streams and refusals."""

from __future__ import annotations

import json
import os
import signal
import time

import httpx
import openai
import pytest

from lorica.store import keys
from tests.server.conftest import adam, datum

pytestmark = pytest.mark.slow

STORY = "Once upon a time there was a little girl"
TURN = [{"role": "user", "content": "Write a short sentence about a cat."}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def adapters(server):
    """Paths of two adapters, `red` and `blue`, that were trained to differ."""
    service = server.client()
    paths = {}
    for name, tokens in (("red", [5, 6, 7, 8]), ("blue", [90, 80, 70, 60])):
        run = service.create_lora_training_client("nano", rank=4, seed=1).result()
        for _ in range(3):
            forward = run.forward_backward([datum(tokens * 4)], "cross_entropy")
            stepped = run.optim_step(adam(1e-2))
            forward.result()
            stepped.result()
        paths[name] = run.save_weights_for_sampler(name).result().path
    service.close("success").result(30)
    return paths


def refusal(call, **fields):
    with pytest.raises(openai.APIStatusError) as caught:
        call(**fields)
    return caught.value


def test_models_are_listed_with_the_callers_adapters_by_path_and_name(client, adapters):
    models = {model.id: model for model in client.models.list()}
    assert {"nano", "red", "blue", *adapters.values()} <= set(models)
    assert models["red"].parent == "nano" and models["red"].root == adapters["red"]
    assert models["nano"].parent is None and models["nano"].max_model_len == 2048
    assert client.models.retrieve("nano").id == "nano"
    assert client.models.retrieve(adapters["red"]).id == adapters["red"]


def test_another_tenants_adapter_is_as_missing_as_one_that_never_was(server, client, adapters):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.new_key("stranger"), max_retries=0) as stranger:
        assert [model.id for model in stranger.models.list()] == ["nano"]
        for model in (adapters["red"], "red", "tinker://no/sampler_weights/red", "tinker://x", "nan"):
            error = refusal(stranger.completions.create, model=model, prompt="x")
            assert error.status_code == 404 and error.code == "model_not_found" and error.param == "model"
            assert repr(model) in error.message
        assert "Did you mean 'nano'" in error.message
        server.rest().publish_checkpoint_from_tinker_path(adapters["red"]).result()
        assert stranger.completions.create(model=adapters["red"], prompt="x", max_tokens=1).choices
        server.rest().unpublish_checkpoint_from_tinker_path(adapters["red"]).result()


def test_an_adapter_answers_by_its_path_and_its_name_and_as_part_of_a_stack(client, adapters):
    def scores(model):
        told = client.completions.create(model=model, prompt=STORY, max_tokens=0, echo=True, logprobs=0)
        return told.choices[0].logprobs.token_logprobs[1:]

    base, red, blue = scores("nano"), scores("red"), scores("blue")
    assert scores(adapters["red"]) == red
    assert red != base and blue != base and red != blue
    stacked = scores("red+blue")
    assert stacked not in (red, blue, base)
    assert scores(f"{adapters['red']}+{adapters['blue']}") == stacked


def test_two_adapters_of_one_name_must_be_told_apart_by_path(server, client):
    service = server.client()
    paths = []
    for _ in range(2):
        run = service.create_lora_training_client("nano", rank=1, seed=1).result()
        paths.append(run.save_weights_for_sampler("twin").result().path)
    service.close("success").result(30)
    error = refusal(client.completions.create, model="twin", prompt="x")
    assert error.status_code == 400 and all(path in error.message for path in paths)
    assert {"twin"}.isdisjoint(model.id for model in client.models.list())


def test_a_stream_says_what_the_whole_answer_says(client):
    fields = {"model": "nano", "prompt": STORY, "max_tokens": 24, "seed": 5, "n": 2, "stop": ["\n\n"]}
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert "".join(one.text for one in own) == choice.text
        assert [one.finish_reason for one in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == choice.finish_reason
        assert len(own) > 3


def test_a_streamed_completion_may_begin_with_its_prompt_and_tell_log_probabilities(client):
    fields = {"model": "nano", "prompt": STORY, "max_tokens": 6, "seed": 5, "echo": True, "logprobs": 1}
    whole = client.completions.create(**fields).choices[0]
    chunks = [chunk.choices[0] for chunk in client.completions.create(**fields, stream=True)]
    assert "".join(one.text for one in chunks) == whole.text and whole.text.startswith(STORY)
    assert [t for one in chunks for t in one.logprobs.tokens] == whole.logprobs.tokens
    assert [t for one in chunks for t in one.logprobs.text_offset] == whole.logprobs.text_offset
    plain = {**fields, "echo": False, "logprobs": 0}
    told = [chunk.choices[0] for chunk in client.completions.create(**plain, stream=True)]
    assert len(told) > 3
    assert sum(len(one.logprobs.tokens) for one in told) == 6


def test_a_conversation_streams_as_clients_read_it(client):
    fields = {"model": "nano", "messages": TURN, "temperature": 0, "max_completion_tokens": 30}
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    with client.chat.completions.stream(model="nano", messages=TURN, temperature=0, max_completion_tokens=30) as stream:
        assert stream.get_final_completion().choices[0].message.content == text


def test_a_conversation_without_a_limit_may_fill_the_context(client):
    told = client.chat.completions.create(model="nano", messages=TURN, temperature=0, stop="\n", n=2, seed=1)
    assert len(told.choices) == 2
    assert told.choices[0].message.content == told.choices[1].message.content
    assert "\n" not in told.choices[0].message.content


def test_events_have_the_form_that_clients_split_them_by(server):
    body = {"model": "nano", "prompt": "Hi", "max_tokens": 3, "stream": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers={"Authorization": f"Bearer {server.key}"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [event for event in answer.text.split("\n\n") if event]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[0].removeprefix("data: "))["object"] == "text_completion"


@pytest.mark.parametrize(
    ("fields", "status", "param", "word"),
    [
        ({"max_token": 3}, 400, "max_token", "Did you mean 'max_tokens'"),
        (
            {"stream": True, "stream_options": {"includ_usage": True}},
            400,
            "stream_options.includ_usage",
            "include_usage",
        ),
        ({"best_of": 3}, 400, "best_of", "not supported"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"prompt": {"a": 1}}, 400, "prompt", "list of texts or of tokens"),
        ({"prompt": [99999999]}, 400, None, "99999999"),
        ({"prompt": [99999999], "stream": True}, 400, None, "99999999"),
        ({"max_tokens": 5000}, 400, "max_tokens", "context of 2048"),
        ({"n": 5000}, 400, "n", "at most 1024"),
        ({"model": "tinker://x/sampler_weights/y"}, 404, "model", "no model"),
    ],
)
def test_refusals_have_openais_shape(client, fields, status, param, word):
    error = refusal(client.post, path="/completions", cast_to=object, body={"model": "nano", "prompt": "x", **fields})
    assert (error.status_code, error.param) == (status, param)
    assert word in error.message
    assert error.type == "invalid_request_error"


def test_a_body_that_is_no_json_and_a_key_that_is_none_are_refused_in_openais_shape(server):
    url, key = f"{server.url}/v1/chat/completions", {"Authorization": f"Bearer {server.key}"}
    answer = httpx.post(url, content=b"{", headers={**key, "content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "json"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="tml-nobody", max_retries=0) as nobody:
        error = refusal(nobody.models.list)
    assert error.status_code == 401 and error.type == "authentication_error"


def test_a_client_that_leaves_a_stream_lets_its_samples_go(server, client):
    stream = client.completions.create(model="nano", prompt=STORY, max_tokens=1900, stream=True, stop=["\x00"])
    for _ in range(3):
        next(iter(stream))
    stream.close()
    ended = time.monotonic() + 20
    while server.server.limiter.samples("default") and time.monotonic() < ended:
        time.sleep(0.05)
    assert server.server.limiter.samples("default") == 0
    assert time.monotonic() < ended


def test_a_client_that_does_not_wait_for_an_answer_lets_its_samples_go(server, client):
    with pytest.raises(openai.APITimeoutError):
        # greedy: a drawn story may be over by then
        asked = {"max_tokens": 1900, "temperature": 0, "stop": ["\x00"]}
        client.completions.create(model="nano", prompt=STORY, timeout=0.5, **asked)
    ended = time.monotonic() + 20
    while server.server.limiter.samples("default") and time.monotonic() < ended:
        time.sleep(0.05)
    assert server.server.limiter.samples("default") == 0


def test_quotas_are_told_in_a_way_that_clients_wait_by(server):
    key = server.new_key("poor")
    quotas = keys.Quotas(tokens_per_minute=20, concurrent_samples=1)
    server.server.database.submit(lambda c: keys.set_quotas(c, "poor", quotas)).result()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as poor:
        error = refusal(poor.completions.create, model="nano", prompt="x", max_tokens=2, n=2)
        assert error.status_code == 400 and "at most 1" in error.message
        poor.completions.create(model="nano", prompt="x", max_tokens=18)
        error = refusal(poor.completions.create, model="nano", prompt="x", max_tokens=18)
    assert error.status_code == 429 and error.type == "rate_limit_error"
    assert int(error.response.headers["retry-after-ms"]) > 0
    assert server.server.limiter.samples("poor") == 0


def test_the_openapi_document_has_the_bodies(server):
    document = httpx.get(f"{server.url}/openapi.json").json()
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = document["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"]
    assert {"prompt", "logprobs", "echo", "top_k"} <= set(fields) and "best_of" not in fields


@pytest.mark.slow
def test_a_stream_goes_on_when_the_engine_is_killed(server, client):
    fields = {"model": "nano", "prompt": STORY, "max_tokens": 200, "seed": 9, "stop": ["\x00"]}
    whole = client.completions.create(**fields).choices[0].text
    stream = client.completions.create(**fields, stream=True)
    said = [next(stream).choices[0].text]
    os.kill(server.server.backbones.find("nano").pid, signal.SIGKILL)
    said += [chunk.choices[0].text for chunk in stream]
    assert "".join(said) == whole
