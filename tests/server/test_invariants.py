"""The eleven numeric invariants of the protocol, seen through the real SDK. Steps are nearly plain descent."""

from __future__ import annotations

import numpy as np
import pytest
from tinker import types

from tests.server.conftest import SGD, InThread, adam, datum

A = [datum(range(10, 26)), datum(range(40, 52))]
B = [datum(range(60, 80))]
LR = 0.02


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """In float32, where small moves can be seen."""
    made = InThread(tmp_path_factory.mktemp("server"), dtype="float32")
    yield made
    made.stop()


@pytest.fixture
def make(service):
    def make(seed=7, rank=8):
        return service.create_lora_training_client("nano", rank=rank, seed=seed).result()

    return make


def logprobs(run, data):
    outputs = run.forward(data, "cross_entropy").result().loss_fn_outputs
    return np.concatenate([np.array(o["logprobs"].data) for o in outputs])


def moved(run, data, *calls):
    """How far one step after `calls` moves the log-probabilities."""
    before = logprobs(run, data)
    for given in calls:
        run.forward_backward(given, "cross_entropy").result()
    run.optim_step(adam(LR, **SGD)).result()
    return logprobs(run, data) - before


def scaled(data, factor):
    return [
        datum(
            d.model_input.to_ints(),
            weights=[factor] * d.model_input.length,
            targets=list(d.loss_fn_inputs["target_tokens"].data),
        )
        for d in data
    ]


def warm(run):
    """A LoRA's B is zero at first; one step makes both factors move."""
    run.forward_backward(A, "cross_entropy").result()
    run.optim_step(adam(LR, **SGD)).result()


def test_1_the_loss_is_the_weighted_sum_with_signed_fractions(make):
    weights = [0.5, -1.25, 0.0, 2.0] * 4
    data = [datum(range(10, 26), weights=weights)]
    result = make().forward_backward(data, "cross_entropy").result()
    values = np.array(result.loss_fn_outputs[0]["logprobs"].data)
    assert result.metrics["loss:sum"] == pytest.approx(-(np.array(weights) * values).sum(), rel=1e-4)


def test_2_a_weight_of_half_moves_half_as_far(make):
    one, half = moved(make(), A, A), moved(make(), A, scaled(A, 0.5))
    assert np.linalg.norm(one) / np.linalg.norm(half) == pytest.approx(2, rel=0.05)


def test_3_a_negative_weight_moves_the_other_way(make):
    one, other = moved(make(), A, A), moved(make(), A, scaled(A, -1.0))
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) < -0.9


def test_4_forward_leaves_gradients_alone(make):
    run = make()
    before = logprobs(run, A)
    run.optim_step(adam(LR, **SGD)).result()
    assert np.array_equal(logprobs(run, A), before)


def test_5_two_calls_add_up_to_one(make):
    assert np.allclose(moved(make(), A, A, B), moved(make(), A, [*A, *B]), atol=1e-5)


def test_6_a_step_clears_the_gradient(make):
    run = make()
    moved(run, A, A)
    before = logprobs(run, A)
    run.optim_step(adam(LR, **SGD)).result()
    assert np.array_equal(logprobs(run, A), before)


def test_7_a_fresh_adapter_is_the_base(make, service):
    base = service.create_sampling_client(base_model="nano").result()
    tokens = A[0].model_input.to_ints()
    scored = base.compute_logprobs(types.ModelInput.from_ints(tokens)).result()[1:]
    assert np.allclose(logprobs(make(), A)[: len(tokens) - 1], scored, atol=1e-4)


def test_8_trainer_and_sampler_agree(make):
    run = make()
    moved(run, A, A)
    sampler = run.save_weights_and_get_sampling_client().result()
    tokens = A[0].model_input.to_ints()
    scored = sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result()[1:]
    assert np.allclose(logprobs(run, A)[: len(tokens) - 1], scored, atol=1e-4)


def test_9_a_sampler_does_not_follow_the_training(make):
    run = make()
    sampler = run.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(A[0].model_input.to_ints())
    before = sampler.compute_logprobs(prompt).result()
    moved(run, A, A)
    assert sampler.compute_logprobs(prompt).result() == before


def test_10_sampled_log_probabilities_are_those_of_a_second_look(make):
    run = make()
    moved(run, A, A)
    sampler = run.save_weights_and_get_sampling_client().result()
    prompt = [10, 11, 12]
    drawn = sampler.sample(types.ModelInput.from_ints(prompt), 1, types.SamplingParams(max_tokens=8, stop=[])).result()
    sequence = drawn.sequences[0]
    again = sampler.compute_logprobs(types.ModelInput.from_ints([*prompt, *sequence.tokens])).result()
    assert np.allclose(again[len(prompt) :], sequence.logprobs, atol=1e-4)


def test_11_training_one_run_does_not_move_another(make):
    first, second = make(1), make(2)
    before = logprobs(first, A)
    moved(second, B, A, B)
    assert np.array_equal(logprobs(first, A), before)
