"""What was seen to fail in a public multi-tenant server, each as a test of this one."""

from __future__ import annotations

import json

import httpx
import numpy as np
import pytest
import tinker
import torch
from tinker import types

import lorica
from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.host import Host
from tests.server.conftest import SGD, InThread, adam, datum, step

pytestmark = pytest.mark.slow
DATA = [datum(range(10, 27)), datum(range(30, 41))]
OTHER = [datum(range(50, 90))]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """As operators run it: tenants share batches, and fewer runs are resident than there are."""
    made = InThread(tmp_path_factory.mktemp("peers"), long_poll_seconds=5, dtype="float32", engine={"resident": 3})
    yield made
    made.stop()


def new(service, **fields):
    return service.create_lora_training_client("nano", **{"rank": 4, "seed": 1, **fields}).result()


def logprobs(run, data=DATA):
    outputs = run.forward(data, "cross_entropy").result().loss_fn_outputs
    return np.concatenate([np.asarray(out["logprobs"].data) for out in outputs])


def folder(server, path, at):
    """A checkpoint's files, through the signed URLs that it gives."""
    run, kind, name = path.removeprefix("tinker://").split("/")
    url = f"{server.url}/api/v1/training_runs/{run}/checkpoints/{kind}/{name}/external_weights_urls"
    urls = httpx.get(url, headers={"X-API-Key": server.key}).json()["urls"]
    for file, link in urls.items():
        (at / file).write_bytes(httpx.get(link).content)
    return at


def test_one_tenants_weight_decay_does_not_change_anothers_weights(server, service):
    quiet, decaying = new(service), new(server.client(server.new_key("decaying")))
    step(quiet, DATA)
    before = logprobs(quiet)
    for _ in range(3):
        step(decaying, OTHER, lr=1e-2, weight_decay=10.0)
    assert np.array_equal(logprobs(quiet), before)


def test_sampling_an_old_snapshot_does_not_touch_what_is_trained(service):
    run, twin = new(service), new(service)
    step(run, DATA)
    step(twin, DATA)
    old = run.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(range(10, 20))
    at_first = old.compute_logprobs(prompt).result()
    step(run, DATA)
    step(twin, DATA)
    assert old.compute_logprobs(prompt).result() == at_first
    assert np.array_equal(logprobs(run), logprobs(twin))


@pytest.mark.parametrize("token", [-1, 10**6, 2**31 - 1])
def test_one_bad_token_hurts_its_sender_alone(server, service, token):
    good, bad = new(service), new(server.client(server.new_key("bad")))
    failing = bad.forward_backward([datum([5, token, 7])], "cross_entropy")
    fine = good.forward_backward(DATA, "cross_entropy")
    assert np.isfinite(fine.result().metrics["loss:sum"])
    with pytest.raises(tinker.RequestFailedError, match=f"token id {token}"):
        failing.result()
    assert step(bad, DATA) > 0 and step(good, DATA) > 0


def test_a_bad_request_does_not_fail_those_it_would_be_batched_with(server, service):
    clients = [new(server.client(server.new_key(f"n{i}"))) for i in range(3)]
    alone = [run.forward(DATA, "cross_entropy").result().metrics["loss:sum"] for run in clients]
    futures = [run.forward_backward(DATA, "cross_entropy") for run in clients]
    failing = new(service).forward_backward([datum([5, 6], weights=[1.0, 0.0], targets=[10**6, 1])], "cross_entropy")
    with pytest.raises(tinker.RequestFailedError):
        failing.result()
    assert [f.result().metrics["loss:sum"] for f in futures] == pytest.approx(alone, rel=1e-6)


def test_losses_and_gradients_are_sums(service):
    run = new(service)
    one = run.forward([DATA[0]], "cross_entropy").result().metrics["loss:sum"]
    assert run.forward([DATA[0]] * 4, "cross_entropy").result().metrics["loss:sum"] == pytest.approx(4 * one, rel=1e-6)
    run.forward_backward([DATA[0]], "cross_entropy").result()
    single = run.optim_step(adam(0.0)).result().metrics["grad_norm:mean"]
    run.forward_backward([DATA[0]] * 4, "cross_entropy").result()
    assert run.optim_step(adam(0.0)).result().metrics["grad_norm:mean"] == pytest.approx(4 * single, rel=1e-4)


def test_a_negative_weight_is_the_opposite_step_and_no_more(service):
    forward, backward = new(service), new(service)
    before = logprobs(forward)
    sequence = range(10, 27)
    step(forward, [datum(sequence)], lr=0.3, **SGD)
    step(backward, [datum(sequence, weights=[-1.0] * len(sequence))], lr=0.3, **SGD)
    up, down = logprobs(forward) - before, logprobs(backward) - before
    assert np.dot(up, down) / (np.linalg.norm(up) * np.linalg.norm(down)) < -0.9
    assert 0.5 < np.linalg.norm(up) / np.linalg.norm(down) < 2


def test_a_clipped_gradient_has_the_norm_that_was_asked_for(service):
    run, clipped = new(service), new(service)
    norms = []
    for one, clip, lr in ((run, 0.0, 1e-2), (clipped, 0.5, 0.1)):  # both moves stand out from rounding
        before = logprobs(one)
        one.forward_backward(DATA, "cross_entropy")
        norm = one.optim_step(adam(lr, grad_clip_norm=clip, **SGD)).result().metrics["grad_norm:mean"]
        norms.append((norm, np.linalg.norm(logprobs(one) - before) / lr))
    assert norms[0][0] == pytest.approx(norms[1][0], rel=1e-6)
    assert norms[1][1] == pytest.approx(norms[0][1] * 0.5 / norms[0][0], rel=0.05)


def test_a_negative_norm_to_clip_to_is_refused(service):
    run = new(service)
    run.forward_backward(DATA, "cross_entropy").result()
    with pytest.raises(tinker.RequestFailedError, match="grad_clip_norm is -1.0"):
        run.optim_step(adam(1e-3, grad_clip_norm=-1.0)).result()


def test_the_seed_chooses_the_initial_values(server, service, tmp_path):
    files = []
    for index, seed in enumerate((3, 3, 4)):
        at = tmp_path / str(index)
        at.mkdir()
        path = new(service, seed=seed).save_weights_for_sampler("init").result().path
        files.append(next(folder(server, path, at).glob("*.safetensors")).read_bytes())
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize(
    ("flags", "modules"),
    [
        ({"train_mlp": False, "train_unembed": False}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"train_attn": False, "train_unembed": False}, {"gate_proj", "up_proj", "down_proj"}),
        ({"train_attn": False, "train_mlp": False}, {"lm_head"}),
    ],
)
def test_the_flags_choose_the_modules(server, service, tmp_path, flags, modules):
    path = new(service, **flags).save_weights_for_sampler("flags").result().path
    config = json.loads((folder(server, path, tmp_path) / "adapter_config.json").read_text())
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == modules


def test_peft_loads_an_exported_adapter_whole(server, service, tmp_path):
    peft = pytest.importorskip("peft")
    run = new(service, train_unembed=False)
    step(run, DATA, lr=1e-2)
    folder(server, run.save_weights_for_sampler("peft").result().path, tmp_path)
    backbone = lorica.load("nano", dtype="float32")
    model = peft.PeftModel.from_pretrained(backbone.module, tmp_path)
    status = peft.PeftModel.load_adapter(model, tmp_path, adapter_name="again")
    assert not status.unexpected_keys and not [key for key in status.missing_keys if "lora_" in key]
    ids = torch.tensor([list(range(10, 27))])
    with torch.no_grad():
        found = model(input_ids=ids).logits.log_softmax(-1)[0]
    wanted = found[torch.arange(16), ids[0, 1:]].numpy()
    np.testing.assert_allclose(logprobs(run, [DATA[0]])[:16], wanted, atol=1e-4)


def test_nothing_is_served_without_a_key(server):
    open_paths = {"/health", "/ready", "/openapi.json", "/metrics", "/", "/api/v1/healthz"}
    schema = httpx.get(server.url + "/openapi.json").json()
    assert len(schema["paths"]) > 30
    for path, methods in schema["paths"].items():
        for method in methods:
            if path in open_paths or path.startswith(("/files/", "/static/")):  # signed, public
                continue
            url = server.url + path.replace("{", "").replace("}", "")
            answer = httpx.request(method.upper(), url, json={} if method != "get" else None)
            assert answer.status_code == 401, f"{method} {path}: {answer.status_code} {answer.text[:200]}"


def test_saving_a_name_twice_is_an_error_and_no_hang(service):
    run = new(service)
    run.save_state("twice").result()
    with pytest.raises(tinker.RequestFailedError, match="twice"):
        run.save_state("twice").result(timeout=20)
    assert step(run, DATA) > 0


def test_an_unknown_base_model_is_refused_with_what_is_served(service):
    with pytest.raises(tinker.TinkerError, match="nano"):
        service.create_lora_training_client("nanoo", rank=4).result()
    with pytest.raises(tinker.TinkerError, match="nano"):
        service.create_sampling_client(base_model="meta-llama/Llama-3.1-8B").result()


def test_more_runs_than_are_resident_all_go_on(service):
    """A client that died holds no place: what it trained steps aside for those who work."""
    runs = [new(service, seed=seed) for seed in range(6)]
    losses = [[step(run, DATA) for run in runs] for _ in range(3)]
    assert all(
        later < earlier for first, last in [(losses[0], losses[2])] for earlier, later in zip(first, last, strict=True)
    )
    twin = new(service, seed=5)
    assert [step(twin, DATA) for _ in range(3)] == pytest.approx([row[5] for row in losses], rel=1e-5)


def test_a_result_that_is_no_number_reaches_its_sender_and_nobody_else(server, service):
    wild, calm = new(server.client(server.new_key("wild"))), new(service)
    step(wild, DATA, lr=1e38)
    answer = wild.forward(DATA, "cross_entropy").result()
    assert not np.isfinite(answer.metrics["loss:sum"]) or abs(answer.metrics["loss:sum"]) > 1e3
    alone = calm.forward(DATA, "cross_entropy").result().metrics["loss:sum"]
    futures = [run.forward_backward(DATA, "cross_entropy") for run in (wild, calm, wild)]
    assert futures[1].result().metrics["loss:sum"] == pytest.approx(alone, rel=1e-6)
    for future in (futures[0], futures[2]):
        future.result()
    assert step(calm, DATA) > 0


def test_the_service_gives_what_the_library_gives(service):
    run = new(service)
    engine = Engine(Host(lorica.load("nano", dtype="float32")))
    (result,) = engine.forward([Item(Example.whole(range(10, 27)), None)])
    np.testing.assert_allclose(logprobs(run, [DATA[0]])[:16], result.logprobs, atol=1e-5)
