"""Bodies that nobody would send on purpose: never a crash, a hang or a 500, and the server goes on."""

from __future__ import annotations

import random

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tinker.proto import tinker_public_pb2 as proto

from tests.server.conftest import datum, step

pytestmark = pytest.mark.slow

DATA = [datum(range(10, 20))]


@pytest.fixture(scope="module")
def run(server):
    client = server.client()
    yield client.create_lora_training_client("nano", rank=4, seed=1).result()
    client.close("success").result(30)


def body(run_id, seq):
    request = proto.ForwardBackwardRequest(model_id=run_id, seq_id=seq, loss_fn="cross_entropy")
    own = request.data.add()
    own.model_input.add().encoded_text.tokens = bytes(40)
    target = own.loss_fn_inputs["target_tokens"]
    target.dense, target.dtype = bytes(80), proto.DTYPE_INT64
    target.shape.append(10)
    return request.SerializeToString()


def post(server, path, content, kind="application/x-protobuf"):
    headers = {"X-API-Key": server.key, "Content-Type": kind}
    return httpx.post(server.url + path, content=content, headers=headers, timeout=30)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), cuts=st.integers(0, 12))
def test_damaged_protobuf_is_accepted_to_fail_or_refused_and_never_an_error_of_the_server(server, run, seed, cuts):
    rng = random.Random(seed)
    content = bytearray(body("f" * 32 + ":train:0", rng.randrange(2**31)))
    for _ in range(cuts):
        content[rng.randrange(len(content))] = rng.randrange(256)
    if rng.random() < 0.5:
        del content[rng.randrange(len(content)) :]
    assert post(server, "/api/v1/forward_backward", bytes(content)).status_code < 500


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=300))
def test_noise_is_no_error_of_the_server(server, run, content):
    for path in ("/api/v1/forward_backward", "/api/v1/asample", "/api/v1/optim_step", "/v1/completions"):
        for kind in ("application/x-protobuf", "application/json"):
            assert post(server, path, content, kind).status_code < 500


def test_the_run_that_was_there_goes_on(run):
    assert step(run, DATA) > 0


@pytest.mark.slow
def test_every_route_keeps_to_its_schema_whatever_is_sent(server):
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    key = server.new_key("schema")

    for operation in schema.get_all_operations():
        found = operation.ok()
        if found.path.endswith("/auth/apikey/me") and found.method == "delete":
            continue  # nothing could be asked after it

        @settings(
            max_examples=8,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        @given(case=found.as_strategy())
        def one(case):
            answer = case.call(headers={"X-API-Key": key}, timeout=40)
            assert answer.status_code < 500 or answer.json()["code"] == "unsupported", (
                f"{case.method} {case.path}: {answer.status_code} {answer.text[:300]}"
            )

        one()
