"""Tenants do not see each other: what is another's looks exactly like what is not there."""

from __future__ import annotations

import json

import httpx
import pytest
import tinker
from tinker import types

from tests.server.conftest import datum, step

pytestmark = pytest.mark.slow

DATA = [datum(range(10, 20))]


@pytest.fixture(scope="module")
def other(server):
    return server.new_key("other")


@pytest.fixture
def theirs(service):
    """A run, a checkpoint and a sampler of the first tenant."""
    run = service.create_lora_training_client("nano", rank=4).result()
    step(run, DATA)
    path = run.save_state("mine").result().path
    sampler = run.save_weights_and_get_sampling_client().result()
    return run, path, sampler._sampling_session_id


def asked(server, key, method, path, **fields):
    answer = httpx.request(method, server.url + path, headers={"X-API-Key": key}, timeout=30, **fields)
    return answer.status_code, answer.text


def test_a_key_is_needed_and_must_be_right(server):
    for headers in ({}, {"X-API-Key": "tml-nonsense"}, {"X-API-Key": server.key + "0"}):
        answer = httpx.get(server.url + "/api/v1/get_server_capabilities", headers=headers)
        assert answer.status_code == 401 and answer.json()["code"] == "unauthorized"
    bearer = {"Authorization": f"Bearer {server.key}"}
    assert httpx.get(server.url + "/api/v1/get_server_capabilities", headers=bearer).status_code == 200
    assert httpx.get(server.url + "/health").status_code == 200


def test_anothers_things_look_like_missing_ones(server, other, theirs):
    run, path, _sampler = theirs
    absent = "f" * 32 + ":train:0"
    pairs = [
        ("GET", f"/api/v1/training_runs/{run.model_id}", {}),
        ("GET", f"/api/v1/training_runs/{run.model_id}/checkpoints", {}),
        ("DELETE", f"/api/v1/training_runs/{run.model_id}/checkpoints/weights/mine", {}),
        ("PUT", f"/api/v1/training_runs/{run.model_id}/checkpoints/weights/mine/ttl", {"json": {"ttl_seconds": 3600}}),
        ("POST", f"/api/v1/training_runs/{run.model_id}/checkpoints/weights/mine/publish", {}),
        ("GET", f"/api/v1/training_runs/{run.model_id}/checkpoints/weights/mine/external_weights_urls", {}),
        ("POST", "/api/v1/get_info", {"json": {"model_id": run.model_id}}),
        ("POST", "/api/v1/weights_info", {"json": {"tinker_path": path}}),
        ("POST", "/api/v1/retrieve_future", {"json": {"request_id": f"{run.model_id}:req:1"}}),
    ]
    for method, url, fields in pairs:
        seen = asked(server, other, method, url, **fields)
        hidden = json.loads(json.dumps(fields).replace(run.model_id, absent))
        missing = asked(server, other, method, url.replace(run.model_id, absent), **hidden)
        assert seen[0] == missing[0] == 404
        assert seen[1].replace(run.model_id, absent) == missing[1]


def test_anothers_run_cannot_be_trained_sampled_or_continued(server, other, theirs):
    run, path, sampler = theirs
    client = server.client(other)
    with pytest.raises(tinker.NotFoundError):
        client.create_training_client_from_state(path).result()
    with pytest.raises(tinker.NotFoundError):
        client.create_sampling_client(model_path=path).result()
    body = {
        "sampling_session_id": sampler,
        "seq_id": 0,
        "prompt": {"chunks": [{"tokens": [1], "type": "encoded_text"}]},
        "sampling_params": {"max_tokens": 1},
    }
    assert asked(server, other, "POST", "/api/v1/asample", json=body)[0] == 404
    status, text = asked(
        server, other, "POST", "/api/v1/optim_step", json={"model_id": run.model_id, "seq_id": 5, "adam_params": {}}
    )
    assert status == 200 and "refused" in text, "a training call fails its future, for a missing run too"
    assert step(run, DATA) > 0


def test_a_list_shows_the_tenants_own(server, other, theirs):
    assert server.rest(other).list_training_runs().result().training_runs == []
    assert server.rest(other).list_user_checkpoints().result().checkpoints == []


def test_a_revoked_key_closes(server):
    from lorica.store import keys

    key = server.new_key("leaver")
    assert asked(server, key, "GET", "/api/v1/sessions")[0] == 200
    assert asked(server, key, "DELETE", "/api/v1/auth/apikey/me")[0] == 204
    assert asked(server, key, "GET", "/api/v1/sessions")[0] == 401
    assert any(k.revoked for k in server.server.database.read(lambda c: keys.list_keys(c, "leaver")))


def test_too_many_samples_at_once_are_told_to_wait(server):
    from lorica.store import keys
    from lorica.store.keys import Quotas

    key = server.new_key("greedy")
    server.server.database.submit(lambda c: keys.set_quotas(c, "greedy", Quotas(concurrent_samples=2))).result()
    client = server.client(key)
    sampler = client.create_sampling_client(base_model="nano").result()
    params = types.SamplingParams(max_tokens=8, stop=[])
    futures = [sampler.sample(types.ModelInput.from_ints([1, 2]), 1, params) for _ in range(4)]
    assert all(len(f.result().sequences) == 1 for f in futures), "the SDK sends again what was too much"
    with pytest.raises(tinker.APIStatusError):
        sampler.sample(types.ModelInput.from_ints([1, 2]), 3, params).result()


def test_a_tenant_with_all_its_runs_waits_until_a_session_ends(server):
    from lorica.store import keys
    from lorica.store.keys import Quotas

    key = server.new_key("many")
    server.server.database.submit(lambda c: keys.set_quotas(c, "many", Quotas(resident_adapters=1))).result()
    first, second = server.client(key), server.client(key)
    first.create_lora_training_client("nano", rank=4).result()
    waiting = second.create_lora_training_client("nano", rank=4)
    first.close("success").result(30)
    assert step(waiting.result(), DATA) > 0
    second.close("success").result(30)


def test_a_rank_above_the_limit_fails_the_run_and_nothing_else(server, service):
    with pytest.raises(tinker.RequestFailedError, match="limit"):
        service.create_lora_training_client("nano", rank=4096).result()


def test_a_body_above_the_limit_is_refused_however_it_comes(server):
    most = server.settings.limits.body_bytes
    with httpx.Client(base_url=server.url, timeout=30) as web:
        whole = web.post("/api/v1/asample", content=bytes(most + 1), headers={"X-API-Key": server.key})
        assert whole.status_code == 413

        def parts():
            for _ in range(most // 2**20 + 2):
                yield b" " * 2**20

        answer = web.post("/api/v1/optim_step", content=parts(), headers={"X-API-Key": server.key})
        assert answer.status_code == 413 and answer.json()["code"] == "too_large"
