"""Every registered method on a real server, asked for with the stock SDK: it trains, is saved, shown, sampled, and goes
on bit for bit after its engine was killed.
"""

from __future__ import annotations

import json
import os
import signal

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

from lorica.methods import all_methods
from lorica.models import tiny
from tests.server.conftest import InThread, adam, datum, step

pytestmark = pytest.mark.slow
DATA = [datum(range(10, 27)), datum(range(30, 41))]
PROMPT = types.ModelInput.from_ints(list(range(10, 18)))
STEPS = 3
SETTINGS = {
    "adalora": {"rank": 4, "steps": 6, "keep": 0.5},
    "delta": {"targets": "q_proj"},
    "glora": {"rank": 2, "supernet": True},
    "intrinsic": {"dimension": 200},
    "lora_fused": {"rank": 2, "targets": "c_attn"},
    "lora_pro": {"rank": 2},
    "miss": {"rank": 8},
    "prefix": {"tokens": 4},
    "prompt": {"tokens": 4},
    "singlora": {"rank": 2, "ramp": 3},
    "vera": {"rank": 16},
}
"""Metadata of a method beside its name; others have a rank of 2 or no settings."""
FUSED = ("bias", "lora_fused")
"""Methods that have no site in nano, whose weights are apart and have no bias."""
LR = {"lora_pro": 1e-4, "delta": 1e-4, "bias": 1e-4, "longlora": 1e-3}
HOOKED = [name for name, cls in all_methods().items() if cls.has_step_hooks()]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    tiny("gpt2").module.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory, gpt2):
    made = InThread(
        tmp_path_factory.mktemp("every"),
        models=("nano", gpt2),
        deterministic=True,
        long_poll_seconds=5,
        engine={"resident": 4},  # fewer than there are, so that runs come from files in between
        snapshots={"every_requests": 5},
    )
    yield made
    made.stop()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A server whose backbone is quantised so coarsely that it can be seen."""
    made = InThread(
        tmp_path_factory.mktemp("packed"), quantize="nf2,double=false", deterministic=True, long_poll_seconds=5
    )
    yield made
    made.stop()


def metadata(name):
    """As the SDK sends it: texts."""
    wanted = SETTINGS.get(name, {"rank": 2} if "rank" in all_methods()[name].model_fields else {})
    return {"method": name, **{key: v if isinstance(v, str) else json.dumps(v) for key, v in wanted.items()}}


def made(service, name, gpt2):
    model, told = (gpt2 if name in FUSED else "nano"), metadata(name)
    rank = int(told.get("rank", 32))
    return service.create_lora_training_client(model, rank=rank, seed=1, user_metadata=told).result()


def train(run, name, steps=STEPS):
    return [step(run, DATA, lr=LR.get(name, 1e-2), weight_decay=0.01, grad_clip_norm=10.0) for _ in range(steps)]


def logprobs(run):
    outputs = run.forward([datum(range(10, 18))], "cross_entropy").result().loss_fn_outputs
    return np.asarray(outputs[0]["logprobs"].data)[:-1]


def asked(server, path, **body):
    headers = {"X-API-Key": server.key}
    answer = httpx.post(f"{server.url}/api/v1/{path}", json=body, headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("name", list(all_methods()))
def test_it_trains_is_saved_continued_and_sampled(name, service, server, gpt2):
    run = made(service, name, gpt2)
    losses = train(run, name)
    assert np.isfinite(losses).all() and losses[2] < losses[0]
    path = run.save_state("here").result().path
    again = service.create_training_client_from_state_with_optimizer(path).result()
    assert train(again, name) == train(run, name), "the checkpoint has all that the method keeps between steps"
    sampler = run.save_weights_and_get_sampling_client().result()
    wanted = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])
    assert [len(s.tokens) for s in sampler.sample(PROMPT, 2, wanted).result().sequences] == [4, 4]
    found = sampler.compute_logprobs(PROMPT).result()[1:]
    np.testing.assert_allclose(found, logprobs(run), atol=2e-2, err_msg="what is sampled from is what was trained")


@pytest.mark.parametrize("name", list(all_methods()))
def test_it_is_shown_with_its_settings(name, service, server, gpt2):
    run = made(service, name, gpt2)
    path = run.save_state("shown").result().path
    told = metadata(name)
    settings = {key: json.loads(v) for key, v in told.items() if key in all_methods()[name].model_fields}
    shown = httpx.get(f"{server.url}/api/v1/training_runs/{run.model_id}", headers={"X-API-Key": server.key}).json()
    for where in (
        asked(server, "get_info", model_id=run.model_id),
        asked(server, "weights_info", tinker_path=path),
        shown,
    ):
        assert where["method"] == name
        assert set(where["method_config"]) == set(all_methods()[name].model_fields)
        assert {key: where["method_config"][key] for key in settings} == settings
        assert where["lora_rank"] == where["method_config"].get("rank")
        assert where["targets"] is not None and where["trainable_parameters"] > 0


def test_a_killed_engine_changes_no_bit_of_any_method(service, server, gpt2):
    """Some runs are replayed from the beginning and some from a snapshot between."""
    names = [name for name in all_methods() if name not in FUSED]
    calm, killed = ([made(service, name, gpt2) for name in names] for _ in range(2))
    before = [
        [train(run, name, 2 + i % 2) for i, (run, name) in enumerate(zip(runs, names, strict=True))]
        for runs in (calm, killed)
    ]
    assert before[0] == before[1]
    after = [train(run, name) for run, name in zip(calm, names, strict=True)]
    waiting = [run.forward_backward(DATA, "cross_entropy") for run in killed]  # its gradient must be there again too
    for future in waiting:
        future.result()
    os.kill(server.server.backbones.find("nano").pid, signal.SIGKILL)
    for run, name in zip(killed, names, strict=True):
        run.optim_step(adam(LR.get(name, 1e-2), weight_decay=0.01, grad_clip_norm=10.0)).result()
    rest = [train(run, name, STEPS - 1) for run, name in zip(killed, names, strict=True)]
    assert dict(zip(names, rest, strict=True)) == {name: losses[1:] for name, losses in zip(names, after, strict=True)}


def test_adalora_without_its_number_of_steps_is_told_at_the_first_step_and_loses_nothing(service, server):
    run = service.create_lora_training_client("nano", rank=4, seed=1, user_metadata={"method": "adalora"}).result()
    run.forward_backward(DATA, "cross_entropy").result()
    sentence = r"AdaLoRA shares its budget out over the whole run, and nobody said .*Set the method's `steps`\."
    norms = []
    for clip in (0.1, 0.0):
        with pytest.raises(tinker.RequestFailedError, match=sentence):
            run.optim_step(adam(1e-2, grad_clip_norm=clip)).result()
        norms.append(run.forward(DATA, "cross_entropy").result().metrics["loss:sum"])
    assert norms[0] == norms[1]
    path = run.save_state("kept").result().path
    again = service.create_training_client_from_state_with_optimizer(path).result()
    assert again.forward(DATA, "cross_entropy").result().metrics["loss:sum"] == norms[0]


def test_loftq_restores_what_a_served_base_lost_trains_and_survives_its_engine(service, packed):
    full = logprobs(service.create_lora_training_client("nano", rank=16, seed=1).result())
    tenant = packed.client()

    def make(**settings):
        return tenant.create_lora_training_client("nano", rank=16, seed=1, user_metadata=settings).result()

    plain, calm, killed = make(method="lora"), make(method="loftq"), make(method="loftq")
    gaps = [np.abs(logprobs(run) - full).mean() for run in (plain, calm)]
    assert gaps[1] < 0.8 * gaps[0]
    assert train(calm, "loftq", 2) == train(killed, "loftq", 2)
    after = train(calm, "loftq")
    os.kill(packed.server.backbones.find("nano").pid, signal.SIGKILL)
    assert train(killed, "loftq") == after
    assert np.isfinite(after).all() and after[2] < after[0]
    path = killed.save_state("here").result().path
    again = tenant.create_training_client_from_state_with_optimizer(path).result()
    assert train(again, "loftq") == train(calm, "loftq")
    for settings in ({"iterations": "2"}, {"config": '{"start": "principal"}'}):
        with pytest.raises(tinker.TinkerError, match="chooses the codes of site"):
            make(method="loftq", **settings)
