"""Traps of the protocol, each a deviation that breaks the real SDK, or one that it must survive."""

from __future__ import annotations

import json
import threading
import time

import httpx
import numpy as np
import pytest
import tinker
from tinker import types
from tinker.proto import request_conv, response_conv

from tests.server.conftest import adam, datum, step

pytestmark = pytest.mark.slow

DATA = [datum(range(10, 20))]


@pytest.fixture
def run(service):
    return service.create_lora_training_client("nano", rank=4, seed=1).result()


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, headers={"X-API-Key": server.key}, timeout=60) as client:
        yield client


def fb(run_id, seq, data=DATA, loss="cross_entropy", **config):
    made = types.ForwardBackwardRequest(
        forward_backward_input=types.ForwardBackwardInput(data=data, loss_fn=loss, loss_fn_config=config or None),
        model_id=run_id,
        seq_id=seq,
    )
    return request_conv.forward_backward_request_to_proto(made).SerializeToString()


def post_fb(http, body, **headers):
    headers = {"Content-Type": "application/x-protobuf", **headers}
    return http.post("/api/v1/forward_backward", content=body, headers=headers)


def result(http, request_id):
    while True:
        got = http.post("/api/v1/retrieve_future", json={"request_id": request_id, "allow_metadata_only": True})
        assert got.status_code == 200, got.text
        if "json" in got.headers["content-type"] and got.json().get("type") == "try_again":
            continue
        return got


def test_results_of_training_and_sampling_are_protobuf(http, run):
    answer = post_fb(http, fb(run.model_id, 1)).json()
    got = result(http, answer["request_id"])
    assert got.headers["content-type"] == "application/x-protobuf"
    read = response_conv.deserialize_forward_backward_output(got.content)
    assert "loss:sum" in read.metrics and all(key.count(":") == 1 for key in read.metrics)


def test_a_request_that_is_sent_twice_runs_once(http, run):
    first, second = post_fb(http, fb(run.model_id, 1)).json(), post_fb(http, fb(run.model_id, 1)).json()
    assert first == second
    result(http, first["request_id"])
    assert post_fb(http, fb(run.model_id, 1)).json() == first
    single = http.post("/api/v1/optim_step", json={"model_id": run.model_id, "seq_id": 2, "adam_params": {}}).json()
    norm = result(http, single["request_id"]).json()["metrics"]["grad_norm:mean"]
    other = _fresh_norm(http, run)
    assert norm == pytest.approx(other, rel=1e-6)


def _fresh_norm(http, run):
    """The norm after one request, on a run with the same seed."""
    made = http.post(
        "/api/v1/create_model",
        json={
            "session_id": run.model_id.split(":")[0],
            "model_seq_id": 77,
            "base_model": "nano",
            "lora_config": {"rank": 4, "seed": 1},
        },
    ).json()
    result(http, made["request_id"])
    post_fb(http, fb(made["model_id"], 1))
    stepped = http.post("/api/v1/optim_step", json={"model_id": made["model_id"], "seq_id": 2, "adam_params": {}})
    return result(http, stepped.json()["request_id"]).json()["metrics"]["grad_norm:mean"]


def test_chunks_that_arrive_with_the_first_one_last_run_in_their_order(http, run):
    rates = {2: 1e-2, 3: 0.0}
    later = [
        http.post(
            "/api/v1/optim_step",
            json={"model_id": run.model_id, "seq_id": n, "adam_params": {"learning_rate": rates[n]}},
        ).json()["request_id"]
        for n in (3, 2)
    ]
    pending = http.post("/api/v1/retrieve_future", json={"request_id": later[0]}).json()
    assert pending["type"] == "try_again" and "request 1" in pending["queue_state_reason"]
    first = post_fb(http, fb(run.model_id, 1)).json()["request_id"]
    assert result(http, first).status_code == 200
    third, second = (result(http, name).json()["metrics"]["grad_norm:mean"] for name in later)
    assert second > 0 and third == 0


def test_a_wait_is_one_long_poll(http, run, server):
    begun = time.monotonic()
    early = http.post("/api/v1/optim_step", json={"model_id": run.model_id, "seq_id": 2, "adam_params": {}}).json()
    pending = http.post("/api/v1/retrieve_future", json={"request_id": early["request_id"]}).json()
    assert pending["type"] == "try_again" and time.monotonic() - begun > server.settings.long_poll_seconds - 1
    waiter: list[float] = []

    def wait():
        result(http, early["request_id"])
        waiter.append(time.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    sent = time.monotonic()
    post_fb(http, fb(run.model_id, 1))
    thread.join(30)
    assert waiter[0] - sent < 4, "the waiter is woken by the result, not by the end of its poll"


def test_a_wrong_request_fails_its_future_and_the_run_goes_on(run):
    with pytest.raises(tinker.RequestFailedError, match="weights"):
        bad = types.Datum(
            model_input=types.ModelInput.from_ints([1, 2]),
            loss_fn_inputs={"target_tokens": [1, 2], "weights": [1.0, 1.0, 1.0]},
        )
        run.forward_backward([bad], "cross_entropy").result()
    assert step(run, DATA) > 0


def test_an_unpublished_loss_names_its_alternatives(run):
    with pytest.raises(tinker.RequestFailedError, match="importance_sampling"):
        run.forward_backward(DATA, "stable_reinforce").result()


def test_a_token_outside_the_vocabulary_hurts_only_its_sender(run, service):
    other = service.create_lora_training_client("nano", rank=4).result()
    bad = run.forward_backward([datum([5, 10**6])], "cross_entropy")
    good = other.forward_backward(DATA, "cross_entropy")
    with pytest.raises(tinker.RequestFailedError, match="1000000|vocabulary"):
        bad.result()
    assert np.isfinite(good.result().metrics["loss:sum"]) and step(run, DATA) > 0


def test_a_nan_reaches_the_client_as_a_number(run):
    step(run, DATA, lr=1e38)
    answer = run.forward_backward(DATA, "cross_entropy").result()
    assert "loss:sum" in answer.metrics
    run.optim_step(adam()).result()


def test_a_name_that_is_taken_fails_at_once_and_overwrite_replaces_it(run):
    first = run.save_state("c").result()
    begun = time.monotonic()
    with pytest.raises(tinker.RequestFailedError, match="exists already"):
        run.save_state("c").result()
    assert time.monotonic() - begun < 5
    assert run.save_state("c", overwrite=True).result().path == first.path
    assert step(run, DATA) > 0


def test_of_two_saves_of_one_name_in_flight_the_first_has_it(run):
    pairs = [[run.save_state(f"same-{i}") for _ in range(2)] for i in range(8)]
    for first, second in pairs:
        assert first.result().path
        with pytest.raises(tinker.RequestFailedError, match="exists already"):
            second.result()


def test_of_saves_in_flight_that_overwrite_one_name_the_last_stays(run, service):
    """As what a step changed tells: the newest weights are in the checkpoint."""
    for i in range(8):
        run.forward_backward(DATA, "cross_entropy").result()
        before = run.save_state(f"latest-{i}", overwrite=True)
        run.optim_step(types.AdamParams(learning_rate=1e-2))
        after = run.save_state(f"latest-{i}", overwrite=True)
        assert before.result().path == after.result().path
        again = service.create_training_client_from_state(after.result().path).result()
        given, wanted = (c.forward(DATA, "cross_entropy").result().loss_fn_outputs for c in (again, run))
        for one, other in zip(given, wanted, strict=True):
            assert one["logprobs"].data == pytest.approx(other["logprobs"].data, abs=1e-5)


def test_samples_carry_an_id_for_each_sequence(service):
    sampler = service.create_sampling_client(base_model="nano").result()
    params = types.SamplingParams(max_tokens=2)
    got = sampler.sample(types.ModelInput.from_ints([1, 2]), 3, params).result()
    assert len({s.sequence_id for s in got.sequences}) == 3


def test_what_sampling_does_not_support_is_said_and_not_ignored(service):
    sampler = service.create_sampling_client(base_model="nano").result()
    prompt = types.ModelInput.from_ints([1, 2, 3])
    with pytest.raises(tinker.RequestFailedError, match="prompt_alt_tokens_k"):
        sampler.sample(prompt, 1, types.SamplingParams(max_tokens=1), prompt_alt_tokens_k=2).result()
    got = sampler.sample(
        prompt, 1, types.SamplingParams(max_tokens=1), include_prompt_logprobs=True, prompt_logprobs_last_n=1
    ).result()
    assert got.prompt_logprobs[:2] == [None, None] and got.prompt_logprobs[2] < 0


def test_training_calls_get_no_refusal_by_status(http, run):
    for body in (fb("no-such-run", 1), fb(run.model_id, 0), fb(run.model_id, 1, [])):
        answer = post_fb(http, body)
        assert answer.status_code == 200
        told = result(http, answer.json()["request_id"]).json()
        assert told["category"] == "user" and told["error"]
    late = http.post("/api/v1/optim_step", json={"model_id": run.model_id, "seq_id": 2, "adam_params": {"x": 1}})
    assert "adam_params.x" in result(http, late.json()["request_id"]).json()["error"]
    after = http.post("/api/v1/optim_step", json={"model_id": run.model_id, "seq_id": 3, "adam_params": {}})
    assert "metrics" in result(http, after.json()["request_id"]).json(), "a refused place in the order is over"


def test_bytes_that_are_no_protobuf_are_a_bad_request(http):
    answer = post_fb(http, b"\xff\xff\xff")
    assert answer.status_code == 400 and answer.json()["code"] == "data"


def test_a_zstd_body_is_read(http, run):
    import zstandard

    body = zstandard.ZstdCompressor().compress(fb(run.model_id, 1))
    answer = post_fb(http, body, **{"Content-Encoding": "zstd"})
    assert answer.status_code == 200 and result(http, answer.json()["request_id"]).content


EARLIER = {"proto_write_fwdbwd": True, "fwd_via_fwdbwd": True}
"""Flags of SDKs before 0.25, without which they would send training calls in a form of their own."""


def test_flags_are_defaults_and_telemetry_is_accepted(http):
    assert http.post("/api/v1/client/config", json={"sdk_version": "0.38.0"}).json() == EARLIER
    assert http.post("/api/v1/telemetry", json={"events": []}).json() == {"status": "accepted"}


def test_a_finished_sessions_heartbeat_is_gone(http):
    session = http.post("/api/v1/create_session", json={"tags": [], "user_metadata": {}, "sdk_version": "x"}).json()
    name = session["session_id"]
    assert http.post("/api/v1/session_heartbeat", json={"session_id": name}).status_code == 200
    done = http.post(f"/api/v1/sessions/{name}/finish", json={"reason": {"type": "success"}, "detail": None})
    assert done.status_code == 204
    assert http.post("/api/v1/session_heartbeat", json={"session_id": name}).status_code == 410


def test_an_unknown_sample_is_gone_so_that_the_sdk_sends_it_again(http):
    answer = http.post("/api/v1/retrieve_future", json={"request_id": "x:sample:0:req:5"})
    assert answer.status_code == 410
    assert http.post("/api/v1/retrieve_future", json={"request_id": "x:train:0:req:5"}).status_code == 404


def test_a_large_result_announces_its_size_once(http, run, monkeypatch):
    from lorica.server.routes import futures

    monkeypatch.setattr(futures, "INLINE", 10)
    answer = post_fb(http, fb(run.model_id, 1)).json()
    told = result(http, answer["request_id"]).json()
    assert told["status"] == "complete_metadata" and told["response_payload_size"] > 10
    whole = http.post("/api/v1/retrieve_future", json={"request_id": answer["request_id"]})
    assert len(whole.content) == told["response_payload_size"]


def test_unsupported_parts_say_so(http):
    for path in ("/api/v1/create_custom_loss", "/api/v1/auth/token"):
        answer = http.post(path, json={})
        assert answer.status_code == 501 and answer.json()["code"] == "unsupported"
        assert answer.headers["x-should-retry"] == "false"


def test_the_document_of_the_api_lists_its_routes_without_pages_from_elsewhere(http):
    document = http.get("/openapi.json").json()
    assert "/api/v1/asample" in document["paths"]
    assert http.get("/redoc").status_code == 404 == http.get("/docs/oauth2-redirect").status_code
    assert json.dumps(document)
