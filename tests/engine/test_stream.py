"""Requests that enter and leave at any step, with mixed adapters and settings, each as if it were alone."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from lorica.core.errors import DataError, FormatError, RouteError
from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.requests import Failed, Finished
from lorica.engine.sample import generate
from lorica.engine.stream import Stream
from lorica.methods.lora import LoRA
from lorica.sampling.params import SamplingParams
from tests.engine.streaming import FAMILIES, alone, build, finish, mixture, request, same
from tests.engine.test_sample import prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_alone_is_the_same_among_others_that_come_and_go(family):
    host = build(family)
    coming = mixture(host, seed=3)
    stream, found, turn = Stream(host, slots=6, kv_budget=400), {}, 0
    while coming or not stream.idle:
        while coming and coming[0][0] <= turn:
            stream.add(coming.pop(0)[1])
        for event in stream.turn(24):
            if isinstance(event, Finished):
                found[event.key] = event.result
            assert not isinstance(event, Failed)
        assert stream.live <= 6 and stream.positions <= 400
        turn += 1
    for _, asked in mixture(host, seed=3):
        same(found[asked.key], alone(host, asked))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
@pytest.mark.parametrize("seed", range(6))
def test_a_request_alone_is_the_same_among_others_in_any_schedule(family, seed):
    host = build(family)
    rng, coming = random.Random(seed), mixture(host, seed, 30)
    slots, budget = rng.choice([1, 3, 16]), rng.choice([120, 300, None])
    stream, found, turn = Stream(host, slots=slots, kv_budget=budget), {}, 0
    while coming or not stream.idle:
        while coming and coming[0][0] <= turn:
            stream.add(coming.pop(0)[1])
        for event in stream.turn(rng.choice([1, 16, 200])):
            if isinstance(event, Finished):
                found[event.key] = event.result
        assert stream.live <= slots and (budget is None or stream.positions <= budget)
        turn += 1
    for _, asked in mixture(host, seed, 30):
        same(found[asked.key], alone(host, asked))


def test_the_rows_of_a_request_are_the_draws_of_its_seed():
    host = build()
    prompt = prompts(3)[2]
    asked = request(host, "k", "dora", prompt, num_samples=7, seed=11)
    rows = generate(host, [(prompt, "dora")] * 7, SamplingParams(max_tokens=6, temperature=1.0, seed=11))
    for slots in (64, 3, 1):
        stream = Stream(host, slots=slots)
        stream.add(asked)
        found, tokens = finish(stream)
        assert [s.tokens for s in found["k"].samples] == [row.tokens for row in rows]
        for index, sample in enumerate(found["k"].samples):
            assert tokens["k", index] == list(zip(sample.tokens, sample.logprobs, strict=True))


def test_the_rows_of_a_request_share_the_reading_of_its_prompt():
    host, widths = build(), []
    stream = Stream(host, slots=8)
    stream.add(request(host, 0, "lora", prompts(3)[2], num_samples=8))
    host.backbone.trunk.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    finish(stream)
    assert widths[0] == (1, len(prompts(3)[2]))
    assert all(tokens == 1 for _, tokens in widths[1:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", ["lora", "soft", "prefix", ("prefix", "lora"), None])
def test_prompt_log_probabilities_are_those_of_the_engines_forward(family, spec, monkeypatch):
    monkeypatch.setattr("lorica.engine.prompts.CHUNK_BYTES", 1)  # eight positions at a time
    host = build(family)
    prompt = [(7 * i) % 120 + 3 for i in range(30)]
    stream = Stream(host, slots=1, kv_budget=8)
    stream.add(request(host, 0, spec, prompt, max_tokens=0, prompt_logprobs=True, topk_prompt=3, num_samples=2))
    stream.add(request(host, 1, "ia3", [3, 4], max_tokens=0, prompt_logprobs=True))
    result = finish(stream)[0][0]
    wanted = Engine(host).forward([Item(Example.whole(tuple(prompt)), spec)])[0].logprobs
    assert result.samples == () and np.isnan(result.prompt_logprobs[0])
    assert result.prompt_logprobs.dtype == np.float32 and len(result.prompt_logprobs) == 30
    assert result.prompt_logprobs[1:] == pytest.approx(np.array(wanted), abs=1e-4)
    assert result.topk_prompt.ids[0].tolist() == [0, 0, 0]
    assert result.topk_prompt.logprobs[0].tolist() == [-99999.0] * 3
    for place, token in enumerate(prompt[1:], 1):
        row = result.topk_prompt.logprobs[place]
        assert sorted(row, reverse=True) == row.tolist()
        for k in np.flatnonzero(result.topk_prompt.ids[place] == token):
            assert row[k] == pytest.approx(result.prompt_logprobs[place], abs=1e-6)


def test_what_needs_no_row_passes_what_waits_for_one():
    host = build()
    stream = Stream(host, slots=1)
    stream.add(request(host, "long", max_tokens=50))
    stream.turn()
    stream.add(request(host, "waits", max_tokens=2))
    stream.add(request(host, "scores", max_tokens=0, prompt_logprobs=True))
    stream.add(request(host, "one token", max_tokens=1, num_samples=40))
    events = stream.turn()
    assert {e.key for e in events if isinstance(e, Finished)} == {"scores", "one token"}
    assert stream.waiting == 1 and stream.live == 1


def test_the_k_likeliest_of_a_sampled_token_and_places_beyond_the_vocabulary():
    host = build()
    result = alone(host, request(host, 0, "lora", temperature=0.0, topk_sample=200, max_tokens=4))
    topk = result.samples[0].topk
    assert topk.ids.shape == topk.logprobs.shape == (4, 200)
    assert topk.ids[:, 0].tolist() == list(result.samples[0].tokens)
    assert topk.logprobs[:, 0].tolist() == pytest.approx(result.samples[0].logprobs)
    assert (topk.ids[:, 128:] == 0).all() and (topk.logprobs[:, 128:] == -99999.0).all()
    assert np.exp(topk.logprobs[:, :128]).sum(1) == pytest.approx(np.ones(4), abs=1e-5)


def test_a_stop_sequence_ends_a_sample_where_its_last_token_comes():
    host = build()
    whole = alone(host, request(host, 0, "lora", max_tokens=12, seed=4)).samples[0].tokens
    for start, length in ((0, 2), (3, 3), (5, 1)):
        run = whole[start : start + length]
        end = next(i for i in range(len(whole)) if whole[: i + 1][-length:] == run) + 1
        never = (*run[:-1], (run[-1] + 1) % 128, 1, 1)
        cut = alone(host, request(host, 0, "lora", max_tokens=12, seed=4, stop_sequences=(never, run))).samples[0]
        assert cut.tokens == whole[:end] and cut.stopped


def test_a_cancelled_request_makes_room_and_says_nothing_more():
    host = build()
    stream = Stream(host, slots=2, kv_budget=120)
    stream.add(request(host, "a", "lora", max_tokens=50, num_samples=5))
    stream.add(request(host, "b", "dora", max_tokens=4))
    stream.turn()
    assert (stream.live, stream.waiting) == (2, 1)
    assert stream.cancel("a") and not stream.cancel("a")
    assert stream.live == 0
    found, tokens = finish(stream)
    assert set(found) == {"b"} and {key for key, _ in tokens} == {"b"}
    same(found["b"], alone(host, request(host, "b", "dora", max_tokens=4)))
    stream.add(request(host, "a", max_tokens=2))
    stream.cancel("a")
    assert stream.idle and stream.turn() == []


def test_what_can_never_fit_is_refused_and_what_does_not_fit_now_waits():
    host = build()
    stream = Stream(host, slots=8, kv_budget=64)
    with pytest.raises(DataError, match="300 positions, but the cache of this server has room for 64") as e:
        stream.add(request(host, 0, None, [3] * 50, max_tokens=251))
    assert e.value.hint == "Shorten the prompt, or set max_tokens to at most 15."
    with pytest.raises(DataError, match="this model has 512"):
        stream.add(request(host, 0, None, [3] * 513, max_tokens=0))
    with pytest.raises(DataError, match="already"):
        stream.add(request(host, 1))
        stream.add(request(host, 1))
    stream.add(request(host, 2, max_tokens=58))
    stream.add(request(host, 3, max_tokens=5))
    live = []
    while not stream.idle:
        stream.turn()
        live.append(stream.live)
        assert stream.positions <= 64
    assert max(live) == 1, "the first two do not fit together, and nobody overtakes"


@pytest.mark.parametrize("asked", [{"prompt": []}, {"num_samples": 0}, {"topk_sample": -1}, {"prompt": [128]}])
def test_requests_that_make_no_sense_are_refused(asked):
    host = build()
    with pytest.raises(DataError):
        Stream(host).add(request(host, 0, **asked))


def test_a_row_that_is_no_number_fails_its_own_request_alone():
    host = build()
    sick = host.add("sick", LoRA(rank=4), seed=9)
    sick.flat.fill_(float("nan"))
    stream = Stream(host, slots=8, kv_budget=400)
    stream.add(request(host, "well", "lora", max_tokens=20, seed=1))
    stream.turn()
    stream.add(request(host, "sick", "sick", num_samples=3, max_tokens=9))
    stream.add(request(host, "scored", "sick", max_tokens=0, prompt_logprobs=True))
    stream.add(request(host, "beside", "dora", max_tokens=20, seed=2))
    found, _ = finish(stream)
    for key in ("sick", "scored"):
        assert isinstance(found[key], FormatError) and "'sick'" in str(found[key])
    same(found["well"], alone(host, request(host, "well", "lora", max_tokens=20, seed=1)))
    same(found["beside"], alone(host, request(host, "beside", "dora", max_tokens=20, seed=2)))


def test_what_a_sick_row_left_in_the_cache_is_not_seen_by_the_next_one_there():
    host = build()
    stream = Stream(host, slots=2, kv_budget=100)
    stream.add(request(host, "first", None, [9] * 20, max_tokens=30))
    stream.add(request(host, "long", "lora", max_tokens=45, seed=1))
    stream.turn()
    for lane in next(iter(stream._batches.values())).cache.lanes.values():
        for pair in lane._layers.values():
            for part in pair:
                part[: part.shape[0] // lane.places] = float("nan")  # of the row of "first"
    found = {e.key: e.error for e in stream.turn() if isinstance(e, Failed)}
    assert set(found) == {"first"}
    stream.add(request(host, "next", "dora", max_tokens=9, seed=1))
    found, _ = finish(stream)
    same(found["next"], alone(host, request(host, "next", "dora", max_tokens=9, seed=1)))


def test_a_request_that_asks_for_its_end_alone_has_one_event():
    host = build()
    stream, events = Stream(host), []
    stream.add(request(host, "loud", "lora", max_tokens=4))
    stream.add(replace(request(host, "quiet", "lora", max_tokens=4), tells=False))
    while not stream.idle:
        events += stream.turn()
    assert [type(event).__name__ for event in events if event.key == "loud"] == ["Token"] * 4 + ["Finished"]
    (end,) = [event for event in events if event.key == "quiet"]
    same(end.result, alone(host, request(host, "quiet", "lora", max_tokens=4)))


def test_an_adapter_that_leaves_the_host_fails_its_requests_alone():
    host = build()
    stream = Stream(host, slots=8)
    for key in range(5):  # many enough for the batch to stay as it is
        stream.add(request(host, key, "lora", max_tokens=9, seed=key))
    stream.add(request(host, 5, ("wide", "dora"), max_tokens=9))
    stream.turn()
    host.delete("dora")
    found, _ = finish(stream)
    assert isinstance(found[5], RouteError)
    for key in range(5):
        same(found[key], alone(host, request(host, key, "lora", max_tokens=9, seed=key)))


def test_other_adapters_train_between_turns_and_nothing_of_a_turn_stays_on():
    host = build()
    asked = [request(host, 0, "dora", max_tokens=12), request(host, 1, None, max_tokens=12, seed=3)]
    wanted = [alone(host, one) for one in asked]
    stream, engine, found = Stream(host, slots=4), Engine(host), {}
    for one in asked:
        stream.add(one)
    host.train()
    while not stream.idle:
        found |= {e.key: e.result for e in stream.turn() if isinstance(e, Finished)}
        assert host.executor.memo is None and host.attention_hub().cache is None and host.model.training
        engine.forward_backward([Item(Example.whole((3, 4, 5, 6)), "vera")])
        host.adapter("vera").flat.sub_(0.1 * host.adapter("vera").grad)
        host.adapter("vera").zero_grad()
    for key in (0, 1):
        same(found[key], wanted[key])


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_alone_in_its_passes_a_requests_numbers_are_bitwise_its_own(family):
    host = build(family)
    coming = mixture(host, seed=8, count=12)
    stream, found = Stream(host, slots=4, kv_budget=300, together=False), {}
    for _, asked in coming:
        stream.add(asked)
        found |= {e.key: e.result for e in stream.turn(9) if isinstance(e, Finished)}
    finish(stream, found=found)
    for _, asked in coming:
        single = Stream(host, slots=4, kv_budget=300, together=False)
        single.add(asked)
        wanted = finish(single)[0][asked.key]
        assert found[asked.key].samples == wanted.samples
        if wanted.prompt_logprobs is not None:
            assert np.array_equal(found[asked.key].prompt_logprobs, wanted.prompt_logprobs, equal_nan=True)
    assert not stream._batches
