"""What a stream keeps and gives back: prefixes, keys and values, memory; and what one failing pass costs."""

from __future__ import annotations

import pytest
import torch

from lorica.engine.requests import Finished
from lorica.engine.sample import generate
from lorica.engine.stream import Stream
from lorica.sampling.params import SamplingParams
from tests.engine.streaming import FAMILIES, alone, build, finish, mixture, request, same


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
    before = batch._step
    assert len(batch._rows) == 4 and batch.live == 3
    follower = request(host, 4, "lora", max_tokens=9, seed=7)
    stream.add(follower)
    stream.turn()
    assert batch._step is before and batch.live == 4
    found, _ = finish(stream)
    same(found[4], alone(host, follower))
    same(found[1], alone(host, request(host, 1, "dora", max_tokens=30, seed=1)))
