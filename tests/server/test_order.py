"""Requests that never come, a journal that is damaged, a store that is read again: what a run makes of them."""

from __future__ import annotations

import sqlite3
import time

import httpx
import pytest
from tinker import types

from tests.server.conftest import InThread, adam, datum, step
from tests.server.test_traps import fb, post_fb, result

pytestmark = pytest.mark.slow

DATA = [datum(range(10, 20))]


@pytest.fixture
def home(tmp_path):
    return tmp_path


def start(home, **settings):
    return InThread(home, deterministic=True, long_poll_seconds=3, **settings)


def http(server):
    return httpx.Client(base_url=server.url, headers={"X-API-Key": server.key}, timeout=60)


def test_a_place_that_stays_empty_fails_those_behind_it_and_the_run_goes_on(home):
    server = start(home, missing_seq_seconds=1.0)
    client = server.client()
    run = client.create_lora_training_client("nano", rank=4).result()
    with http(server) as web:
        begun = time.monotonic()
        answer = post_fb(web, fb(run.model_id, 3)).json()
        told = result(web, answer["request_id"]).json()
        assert "Request 1" in told["error"] and told["category"] == "user" and time.monotonic() - begun < 10
        late = result(web, post_fb(web, fb(run.model_id, 1)).json()["request_id"]).json()
        assert "never arrived" in late["error"]
        assert result(web, post_fb(web, fb(run.model_id, 4)).json()["request_id"]).content
    server.stop()


def test_a_server_that_starts_again_goes_on_where_it_was(home):
    server = start(home, snapshots={"every_requests": 3})
    key = server.key
    client = server.client()
    run = client.create_lora_training_client("nano", rank=4, seed=1).result()
    before = [step(run, DATA) for _ in range(5)]
    run.forward_backward(DATA, "cross_entropy").result()
    path = run.save_state("kept").result().path
    server.stop()

    server = start(home)
    server.key = key
    with http(server) as web:
        stepped = web.post("/api/v1/optim_step", json={"model_id": run.model_id, "seq_id": 13, "adam_params": {}})
        norm = result(web, stepped.json()["request_id"]).json()["metrics"]["grad_norm:mean"]
        assert norm > 0, "the gradient from before the restart is still there"
        assert result(web, f"{run.model_id}:req:9").content, "and so are the results"
    again = server.client().create_training_client_from_state(path).result()
    assert again.forward(DATA, "cross_entropy").result().metrics["loss:sum"] < before[-1]
    server.stop()


def test_a_damaged_record_is_reported_and_the_run_recovers_to_the_last_good_one(home):
    server = start(home)
    key, client = server.key, server.client()
    run = client.create_lora_training_client("nano", rank=4, seed=1).result()
    losses = [step(run, DATA) for _ in range(2)]
    server.call(_forget(server))  # as if it had been killed: no snapshot
    server.stop()
    with sqlite3.connect(home / "lorica.db") as database:
        body = database.execute("SELECT body FROM requests WHERE scope = ? AND seq = 3", (run.model_id,)).fetchone()[0]
        spoiled = body[:-1] + bytes([body[-1] ^ 1])
        database.execute("UPDATE requests SET body = ? WHERE scope = ? AND seq = 3", (spoiled, run.model_id))
    database.close()

    server = start(home)
    server.key = key
    with http(server) as web:
        answer = result(web, post_fb(web, fb(run.model_id, 5)).json()["request_id"])
        from tinker.proto import response_conv

        loss = response_conv.deserialize_forward_backward_output(answer.content).metrics["loss:sum"]
        assert loss == losses[1], "what came after the last good record is as if it had not been"
        shown = web.get(f"/api/v1/training_runs/{run.model_id}").json()
        assert shown["corrupted"] and "3" in shown["corruption"]
    server.stop()


async def _forget(server):
    for queue in server.server.dispatcher.queues():
        queue._since.requests = 0


def test_a_token_bucket_holds_training_back_without_refusing_it(home):
    server = start(home, limits={"tokens_per_minute": 600})
    client = server.client()
    run = client.create_lora_training_client("nano", rank=4).result()
    begun = time.monotonic()
    wide = [datum(range(10, 210))]
    futures = [run.forward_backward(wide, "cross_entropy") for _ in range(3)]
    futures.append(run.forward_backward([datum(range(10, 40))], "cross_entropy"))
    assert all(f.result().metrics["loss:sum"] for f in futures)
    assert time.monotonic() - begun > 2
    server.stop()


def test_an_adapter_from_elsewhere_is_uploaded_continued_stacked_and_sampled(home):
    server = start(home)
    client = server.client()
    run = client.create_lora_training_client("nano", rank=4, seed=4, train_unembed=False).result()
    step(run, DATA, lr=1e-2)
    path = run.save_weights_external("out").result().path
    rest = server.rest()
    urls = rest.get_external_weights_urls(path).result().urls
    with http(server) as web:
        for name, url in urls.items():
            content = httpx.get(url).content
            if name in ("adapter_config.json", "adapter_model.safetensors"):
                assert web.put(f"/api/v1/adapters/mine/files/{name}", content=content).status_code == 200
        assert web.put("/api/v1/adapters/mine/files/..%2Fx", content=b"x").status_code in (400, 404)
        answer = web.post("/api/v1/adapters/mine", json={"base_model": "nano"})
        assert answer.status_code == 200, answer.text
    uploaded = answer.json()["tinker_path"]
    continued = client.create_training_client_from_state(uploaded).result()
    trained = run.forward(DATA, "cross_entropy").result().metrics["loss:sum"]
    assert continued.forward(DATA, "cross_entropy").result().metrics["loss:sum"] == pytest.approx(trained, rel=1e-5)
    prompt = types.ModelInput.from_ints(list(range(10, 16)))
    one = client.create_sampling_client(model_path=uploaded).result().compute_logprobs(prompt).result()
    base = client.create_sampling_client(base_model="nano").result().compute_logprobs(prompt).result()
    stack = client.create_sampling_client(model_path=f"{uploaded},{path}").result().compute_logprobs(prompt).result()
    assert one != base and stack != one
    continued.optim_step(adam()).result()
    server.stop()
