"""Requests that enter and leave at any step, with mixed adapters and settings, each as if it were alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lorica.core.errors import DataError, FormatError, RouteError
from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.requests import Failed, Finished, StreamRequest, Token
from lorica.engine.sample import generate
from lorica.engine.stream import Stream
from lorica.methods.lora import LoRA
from lorica.sampling.params import SamplingParams
from tests.engine.test_sample import SPECS, prompts, served

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


def test_an_adapter_that_leaves_the_host_fails_its_requests_alone():
    host = build()
    stream = Stream(host, slots=8)
    stream.add(request(host, 0, "lora", max_tokens=9))
    stream.add(request(host, 1, ("wide", "dora"), max_tokens=9))
    stream.turn()
    host.delete("dora")
    found, _ = finish(stream)
    assert isinstance(found[1], RouteError)
    same(found[0], alone(host, request(host, 0, "lora", max_tokens=9)))


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", ["lora", "soft", "prefix", None])
def test_a_prompt_that_goes_on_from_an_earlier_one_reads_what_is_new_alone(family, spec):
    host = build(family)
    stream = Stream(host, slots=4, kv_budget=1000)
    first = [(11 * i) % 120 + 3 for i in range(25)]
    stream.add(request(host, 0, spec, first, max_tokens=8))
    reply = finish(stream)[0][0].samples[0].tokens
    again = request(host, 1, spec, [*first, *reply, 7, 8, 9], max_tokens=8, num_samples=2)
    other = request(host, 2, "ia3", [*first, *reply, 7, 8, 9], max_tokens=8)
    stream.add(again)
    stream.add(other)
    found, _ = finish(stream)
    assert found[1].cached == 25 + 7, "the last sampled token was not fed"
    assert found[2].cached == 0
    same(found[1], alone(host, again), 1e-4)
    same(found[2], alone(host, other))
    repeated = request(host, 3, spec, first, max_tokens=8)
    stream.add(repeated)
    result = finish(stream)[0][3]
    assert result.cached == 24 and result.samples[0].tokens[:8] == reply


def test_what_is_kept_of_prompts_makes_room_and_is_never_an_older_adapters():
    host = build()
    stream = Stream(host, slots=4, kv_budget=200)
    first = [(11 * i) % 120 + 3 for i in range(30)]
    stream.add(request(host, 0, "lora", first, max_tokens=4))
    finish(stream)
    host.adapter("lora").flat.mul_(1.5)
    changed = request(host, 1, "lora", first, max_tokens=4)
    stream.add(changed)
    result = finish(stream)[0][1]
    assert result.cached == 0
    same(result, alone(host, changed))
    assert stream.budget.kept > 0
    stream.add(request(host, 2, "lora", [3] * 20, max_tokens=181))
    while not stream.idle:
        stream.turn()
        assert stream.positions <= 200


def test_memory_is_used_again():
    host = build()
    stream = Stream(host, slots=4, kv_budget=400, prefixes=0)
    places = set()
    for key in range(12):
        stream.add(request(host, key, "lora", [5] * (3 + key % 4), max_tokens=12))
        for _ in range(3):
            stream.turn()
        (lane,) = next(iter(stream._batches.values())).cache.lanes.values()
        places.add(next(iter(lane._layers.values()))[0].data_ptr())
    assert len(places) <= 3 and 0 < stream.positions <= 400 and stream.bytes > 0


def test_long_and_short_rows_lie_apart_and_the_budget_holds(monkeypatch):
    monkeypatch.setattr("lorica.engine.kv_cache.SHORT", 16)
    monkeypatch.setattr("lorica.engine.kv_cache.GROWTH", 4)
    host = build()
    coming, stream, found = mixture(host, seed=5), Stream(host, slots=12, kv_budget=600), {}
    for _, asked in coming:
        stream.add(asked)
    lanes = 0
    while not stream.idle:
        found |= {e.key: e.result for e in stream.turn(200) if isinstance(e, Finished)}
        lanes = max([lanes, *(len(b.cache._lanes()) for b in stream._batches.values() if b.live)])
        assert stream.positions <= 600
    assert lanes > 1
    for _, asked in coming:
        same(found[asked.key], alone(host, asked))


def test_a_backbone_that_cannot_step_streams_too():
    from tests.engine.test_abilities import recurrent, resident

    host = resident(recurrent("running"))
    wanted = [
        generate(host, [(row, owner)], SamplingParams(max_tokens=5))[0]
        for row, owner in (([5, 9, 20], "a"), ([4], None))
    ]
    stream = Stream(host, slots=2, kv_budget=10)
    stream.add(request(host, 0, "a", [5, 9, 20], max_tokens=5, temperature=0.0, num_samples=3))
    stream.turn()
    stream.add(request(host, 1, None, [4], max_tokens=5, temperature=0.0))
    found, _ = finish(stream)
    assert [s.tokens for s in found[0].samples] == [wanted[0].tokens] * 3
    assert found[1].samples[0].tokens == wanted[1].tokens


def test_no_logits_exist_of_more_than_a_few_positions(monkeypatch):
    monkeypatch.setattr("lorica.engine.prompts.CHUNK_BYTES", 8 * 128 * 10)
    host, seen = build(), []
    host.backbone.head.register_forward_hook(lambda module, args, output: seen.append(output.numel() // 128))
    stream = Stream(host, slots=4)
    stream.add(request(host, 0, None, [3] * 100, max_tokens=1, num_samples=100, prompt_logprobs=True))
    assert len(finish(stream)[0][0].samples) == 100
    assert max(seen) <= 32


def test_the_model_is_as_before_after_a_turn():
    host = build()
    host.activate("dora")
    before = {name: module.__dict__.get("forward") for name, module in host.model.named_modules()}
    stream = Stream(host)
    stream.add(request(host, 0, "lora"))
    stream.turn()
    assert {name: module.__dict__.get("forward") for name, module in host.model.named_modules()} == before
    assert host.active == ("dora",)
    assert torch.is_grad_enabled()


def test_a_prompt_whose_pass_fails_fails_alone_and_a_failing_step_ends_those_in_it():
    host = build()
    broken = []

    def strange(module, args, kwargs):
        ids = kwargs["input_ids"]
        if (99 in ids and ids.shape[1] > 1) or (broken and ids.shape[1] == 1):
            raise RuntimeError("Something foreign broke.")

    stream = Stream(host, slots=8, kv_budget=400, prefixes=0)
    hook = host.backbone.trunk.register_forward_pre_hook(strange, with_kwargs=True)
    stream.add(request(host, "well", "lora", temperature=0.0, max_tokens=2))
    stream.add(request(host, "bad", "dora", [5, 99, 5], num_samples=3))
    stream.add(request(host, "too", None, temperature=0.0, max_tokens=2))
    found, _ = finish(stream)
    assert isinstance(found["bad"], RuntimeError)
    assert stream.budget.reserved == 0
    stream.add(request(host, "caught", "lora", max_tokens=9, num_samples=2))
    stream.turn()
    broken.append(True)
    assert isinstance(finish(stream)[0]["caught"], RuntimeError)
    broken.clear()
    stream.add(request(host, "later", "wide", max_tokens=9))
    found |= finish(stream)[0]
    hook.remove()
    same(found["later"], alone(host, request(host, "later", "wide", max_tokens=9)))
    assert stream.budget.reserved == 0 and host.executor.memo is None


def test_no_prompt_is_read_in_a_turn_that_has_no_tokens_for_it():
    host = build()
    stream = Stream(host)
    stream.add(request(host, 0))
    assert stream.turn(0) == [] and stream.waiting == 1
    assert stream.turn(1) and stream.waiting == 0, "a longer prompt than that runs alone"


def test_a_row_that_takes_the_seat_of_another_of_its_adapter_leaves_the_linear_sites_as_they_are():
    host = build()
    stream = Stream(host, slots=4)
    for key, spec in enumerate(["lora", "dora", "ia3", None]):
        stream.add(request(host, key, spec, max_tokens=30 if key else 4, seed=key))
    for _ in range(3):
        stream.turn()
    (batch,) = stream._batches.values()
    before = batch._forwards
    assert len(batch._rows) == 4 and batch.live == 3
    follower = request(host, 4, "lora", max_tokens=9, seed=7)
    stream.add(follower)
    stream.turn()
    assert batch._forwards is before and batch.live == 4
    found, _ = finish(stream)
    same(found[4], alone(host, follower))
    same(found[1], alone(host, request(host, 1, "dora", max_tokens=30, seed=1)))
