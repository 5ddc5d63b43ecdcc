"""What tests of the stream share: hosts, requests, and a request alone to compare with."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lorica.engine.requests import Finished, StreamRequest, Token
from lorica.engine.stream import Stream
from lorica.sampling.params import SamplingParams
from tests.engine.test_sample import SPECS, served

FAMILIES = ["qwen3", "gpt2", "gemma2"]


def build(family="qwen3", **overrides):
    """A host whose windows, where it has any, are shorter than the rows."""
    return served(family, **({"sliding_window": 8} if family == "gemma2" else {}), **overrides)


def request(host, key, spec=None, prompt=(4, 5, 6), **asked):
    fields = {name: asked.pop(name) for name in list(asked) if name in StreamRequest.__dataclass_fields__}
    params = SamplingParams(**{"max_tokens": 6, "temperature": 1.0, **asked})
    return StreamRequest(key, list(prompt), host.stacks([spec])[0], params, **fields)


def finish(stream, budget=64, found=None):
    """All results by key, and all tokens by (key, index), of turns until nothing is left."""
    found = {} if found is None else found
    tokens = {}
    for _ in range(2000):
        for event in stream.turn(budget):
            if isinstance(event, Token):
                tokens.setdefault((event.key, event.index), []).append((event.token, event.logprob))
            else:
                assert event.key not in found, "one last event for each request"
                found[event.key] = event.result if isinstance(event, Finished) else event.error
        if stream.idle:
            return found, tokens
    raise AssertionError("the stream does not come to an end")


def alone(host, asked):
    stream = Stream(host, slots=64)
    stream.add(asked)
    return finish(stream)[0][asked.key]


def same(found, wanted, tolerance=1e-5):
    assert [s.tokens for s in found.samples] == [s.tokens for s in wanted.samples]
    assert [s.stopped for s in found.samples] == [s.stopped for s in wanted.samples]
    for one, other in zip(found.samples, wanted.samples, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=tolerance)
        if other.topk is not None:
            assert np.array_equal(one.topk.ids, other.topk.ids)
            assert one.topk.logprobs == pytest.approx(other.topk.logprobs, abs=tolerance)
    for one, other in [(found.prompt_logprobs, wanted.prompt_logprobs)]:
        assert (one is None) == (other is None)
        if other is not None:
            np.testing.assert_allclose(one, other, atol=tolerance)


def mixture(host, seed, count=20):
    """Requests of every kind, and the turn at which each comes."""
    rng, rows = random.Random(seed), []
    for key in range(count):
        prompt = [rng.randrange(3, 128) for _ in range(rng.choice([1, 2, 5, 9, 17, 40]))]
        asked = request(
            host,
            key,
            rng.choice(SPECS),
            prompt,
            max_tokens=rng.choice([0, 1, 2, 5, 11, 30]),
            temperature=rng.choice([0.0, 0.7, 1.0, 1.6]),
            top_k=rng.choice([None, None, 3, 20]),
            top_p=rng.choice([1.0, 1.0, 0.9, 0.3]),
            seed=rng.randrange(1000),
            stop_ids=rng.choice([(), (), (5, 7, 9, 11, 13, 15, 17)]),
            num_samples=rng.choice([1, 1, 2, 5]),
            prompt_logprobs=rng.random() < 0.3,
            topk_prompt=rng.choice([0, 0, 3]),
            topk_sample=rng.choice([0, 0, 2]),
        )
        rows.append((rng.randrange(25), asked))
    return sorted(rows, key=lambda row: row[0])
