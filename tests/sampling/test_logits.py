"""From logits to tokens: truncation, draws and their log-probabilities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorica.core.errors import ConfigError
from lorica.sampling.logits import Draws, draws, pick, truncate
from lorica.sampling.params import SamplingParams


def scores(seed, rows=3, tokens=11):
    return torch.randn(rows, tokens, generator=torch.Generator().manual_seed(seed)) * 2


@given(seed=st.integers(0, 10_000), k=st.integers(1, 15))
def test_top_k_keeps_the_k_likeliest(seed, k):
    logits = scores(seed)
    kept = truncate(logits, SamplingParams(top_k=k)).isfinite()
    assert kept.sum(-1).tolist() == [min(k, 11)] * 3
    assert torch.equal(kept, torch.zeros_like(kept).scatter(-1, logits.topk(min(k, 11), -1).indices, True))


@given(seed=st.integers(0, 10_000), p=st.floats(0.01, 0.999))
def test_top_p_keeps_the_fewest_tokens_that_reach_p(seed, p):
    logits = scores(seed).double()
    kept = truncate(logits, SamplingParams(top_p=p)).isfinite()
    probabilities = logits.softmax(-1)
    for row, mask in zip(probabilities, kept, strict=True):
        mass = float(row[mask].sum())
        assert mass >= p - 1e-9
        assert mass - float(row[mask].min()) < p + 1e-9
        assert not (~mask).any() or float(row[mask].min()) >= float(row[~mask].max())


@given(seed=st.integers(0, 10_000))
def test_log_probabilities_are_the_models_own_whatever_the_temperature(seed):
    logits = scores(seed)
    for params in (SamplingParams(), SamplingParams(temperature=0.7, top_k=4)):
        chosen, logprob = pick(logits, params, draws(3, params))
        assert torch.equal(logprob, logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0])


def test_greedy_takes_the_likeliest_and_a_tiny_top_p_does_too():
    logits = scores(4)
    for params in (
        SamplingParams(),
        SamplingParams(temperature=1.0, top_p=1e-9),
        SamplingParams(temperature=3.0, top_k=1),
    ):
        assert torch.equal(pick(logits, params, draws(3, params))[0], logits.argmax(-1))


def test_draws_follow_the_distribution():
    logits = scores(2, rows=1, tokens=5)
    params = SamplingParams(temperature=1.5)
    rngs = draws(1, params)
    chosen = torch.stack([pick(logits, params, rngs)[0][0] for _ in range(4000)])
    share = torch.bincount(chosen, minlength=5) / 4000
    # five standard deviations of a share at p = 1/2
    assert float((share - (logits / 1.5).softmax(-1)[0]).abs().max()) < 5 * 0.5 / 4000**0.5


def test_a_token_outside_the_truncation_is_never_drawn():
    logits = scores(3, rows=1)
    params = SamplingParams(temperature=5.0, top_k=3)
    allowed, rngs = set(logits.topk(3, -1).indices[0].tolist()), draws(1, params)
    assert {int(pick(logits, params, rngs)[0]) for _ in range(200)} == allowed


def test_a_rows_draws_depend_on_its_seed_and_place_alone():
    def numbers(rngs):
        return [rng() for rng in rngs]

    four, two = numbers(draws(4, SamplingParams(seed=7))), numbers(draws(2, SamplingParams(seed=7)))
    assert four[:2] == two
    assert len(set(four)) == 4
    assert numbers(draws(1, SamplingParams(), seed=7)) == four[:1]
    assert numbers(draws(1, SamplingParams(seed=2**70))) != numbers(draws(1, SamplingParams()))


def test_numbers_made_a_block_at_a_time_are_those_of_the_generator_one_by_one():
    own, generator = Draws(torch.Generator().manual_seed(5)), torch.Generator().manual_seed(5)
    count = 2 * Draws.BLOCK + 1
    assert [own() for _ in range(count)] == [torch.rand((), generator=generator).item() for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_logits_of_any_dtype_are_accepted(dtype):
    params = SamplingParams(temperature=1.0, top_p=0.9)
    chosen, logprob = pick(scores(1).to(dtype), params, draws(3, params))
    assert chosen.shape == logprob.shape == (3,)


SETTINGS = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6, top_k=3),
    SamplingParams(temperature=2.0, top_p=0.4),
    SamplingParams(temperature=1.3, top_k=5, top_p=0.8, seed=4),
    SamplingParams(temperature=1.0, top_k=1),
]


@given(seed=st.integers(0, 10_000), order=st.permutations(range(len(SETTINGS))))
def test_rows_with_settings_of_their_own_are_what_each_is_alone(seed, order):
    logits, params = scores(seed, rows=len(order)), [SETTINGS[i] for i in order]
    chosen, logprobs = pick(logits, params, [draws(1, own)[0] for own in params])
    for row, own in enumerate(params):
        alone, logprob = pick(logits[row : row + 1], own, draws(1, own))
        assert (int(chosen[row]), float(logprobs[row])) == (int(alone[0]), pytest.approx(float(logprob[0]), abs=1e-6))
        torch.testing.assert_close(truncate(logits, params)[row], truncate(logits[row : row + 1], own)[0])


def test_a_temperature_of_next_to_nothing_is_greedy():
    logits = scores(5)
    for temperature in (1e-30, 1e-45, 1e-300):
        params = SamplingParams(temperature=temperature, top_p=0.5, top_k=4)
        assert torch.equal(pick(logits, params, draws(3, params))[0], logits.argmax(-1))


def test_row_i_of_a_call_that_begins_later_draws_as_row_i_of_the_whole():
    whole, late = draws(5, SamplingParams(seed=3)), draws(2, SamplingParams(seed=3), first=3)
    assert [[r() for _ in range(3)] for r in whole[3:]] == [[r() for _ in range(3)] for r in late]


def test_what_ends_a_sample():
    params = SamplingParams(stop_ids=(4,), stop_sequences=((1, 2, 3), (7,)))
    assert [params.stops(list(tokens)) for tokens in ((4,), (1, 2, 3), (2, 3), (9, 7), (1, 2, 3, 5))] == [
        *(True, True, False, True, False),
    ]
    with pytest.raises(ConfigError, match="empty sequence"):
        SamplingParams(stop_sequences=((),))
    with pytest.raises(ConfigError, match="temperature"):
        SamplingParams(temperature=float("inf"))
