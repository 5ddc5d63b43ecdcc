"""The engine core: what is asked, what comes back, and that one tenant's request changes nobody else's numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorica.engine import commands
from lorica.engine.arrays import array
from tests.engine.service import ADAM, SPEC, RefusedError, Service, datum, logprobs, sample, train

BATCH = [datum(i, 5 + 3 * i) for i in range(4)]
OTHERS = [datum(10 + i, 6 + 2 * i) for i in range(4)]


def test_a_loop_of_training_steps_lowers_the_loss_and_clears_the_gradient() -> None:
    home = Service()
    home.open("a")
    losses = []
    for _ in range(4):
        losses.append(home.ask(train("a", *BATCH)).metrics["loss:sum"])
        stepped = home.ask(commands.Step(0, "a", ADAM))
        assert stepped.metrics["grad_norm:mean"] > 0 and stepped.metrics["lr:mean"] == ADAM.lr
        assert not home.grad("a").any()
    assert losses[-1] < losses[0] - 0.1


def test_opened_tells_method_config_and_targets_as_resolved() -> None:
    home = Service()
    spec = commands.RunSpec("dora", {"rank": 3}, {"include": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}})
    opened = home.ask(commands.Open(0, "a", spec))
    assert (opened.method, opened.rank, opened.sites, opened.config["alpha"]) == ("dora", 3, 4, 16.0)
    assert opened.targets["rank_pattern"] == {"q_proj": 2}
    assert opened.parameters == home.flat("a").numel()


def test_the_loss_is_the_weighted_sum_of_log_probabilities_with_signed_weights() -> None:
    home = Service()
    home.open("a")
    weights = np.array([1.0, -0.5, 0.25, 0.0, 2.0, -1.0, 0.5, 1.0], np.float32)
    given = datum(3)
    signed = commands.Datum(given.tokens, {**given.inputs, "weights": array(weights)})
    reply = home.ask(train("a", signed, backward=False))
    (own,) = logprobs(reply)
    assert reply.metrics["loss:sum"] == pytest.approx(-float((weights * own).sum()), rel=1e-5)


def test_forward_alone_changes_nothing() -> None:
    home = Service()
    home.open("a", spec=commands.RunSpec("lora", {"rank": 4, "dropout": 0.3}))
    home.ask(train("a", *BATCH))
    before, forwards = home.grad("a"), home.core.runs.get("a").live()[0].forwards
    home.ask(train("a", *OTHERS, backward=False))
    assert torch.equal(home.grad("a"), before)
    assert home.core.runs.get("a").live()[0].forwards == forwards


def test_chunks_accumulate_as_one_request_does() -> None:
    home = Service()
    home.open("a", "b")
    home.ask(train("a", *BATCH, *OTHERS))
    home.ask(train("b", *BATCH))
    home.ask(train("b", *OTHERS))
    torch.testing.assert_close(home.grad("a"), home.grad("b"), rtol=1e-4, atol=1e-5)


def test_commands_of_one_run_are_done_in_order_whatever_else_is_queued() -> None:
    home = Service()
    home.open("a", "b")
    for i in range(3):
        home.send(train("a", *BATCH))
        home.send(train("b", OTHERS[i]))
        home.send(commands.Step(0, "a", ADAM))
    ids = list(home.replies)
    home.run()
    assert sorted(home.replies) == list(range(1, ids[-1] + 10))
    other = Service()
    other.open("a")
    for _ in range(3):
        other.ask(train("a", *BATCH))
        other.ask(commands.Step(0, "a", ADAM))
    torch.testing.assert_close(home.flat("a"), other.flat("a"), rtol=1e-4, atol=1e-6)


# -- isolation -----------------------------------------------------------------------------------------------------


def with_nan() -> commands.Datum:
    given = datum(5)
    return commands.Datum(given.tokens, {**given.inputs, "weights": array(np.array([math.nan] * 8, np.float32))})


def with_token(token: int) -> commands.Datum:
    given = datum(5)
    return commands.Datum(array(np.array([5, token, 7, 8, 9, 10, 11, 12], np.int32)), given.inputs)


BAD: dict[str, tuple[Any, str, str]] = {
    "NaN weights": (train("bad", datum(1), with_nan()), "user", "Datum 1 has weights"),
    "vocabulary": (train("bad", with_token(5000)), "user", "token id 5000"),
    "negative": (train("bad", with_token(-1)), "user", "token id -1"),
    "too long": (train("bad", datum(1, 65)), "user", "at most 64 at once"),
    "longer than the context": (train("bad", datum(1, 600)), "user", "takes at most 512"),
    "nothing": (train("bad"), "user", "no data"),
    "unknown loss": (commands.Train(0, "bad", [datum(1)], "crossentropy"), "user", "Did you mean 'cross_entropy'"),
    "unknown run": (train("bda", datum(1)), "user", "no run 'bda'. Did you mean 'bad'"),
    "infinite rate": (commands.Step(0, "bad", commands.Adam(lr=math.inf)), "user", "lr is inf"),
    "unknown method": (commands.Open(0, "new", commands.RunSpec("lorra")), "user", "Did you mean 'lora'"),
    "absurd rank": (commands.Open(0, "new", commands.RunSpec("lora", {"rank": 10**9})), "user", "Rank 1000000000"),
    "open twice": (commands.Open(0, "bad", SPEC), "user", "open already"),
}


@pytest.mark.parametrize("bad", list(BAD))
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_wrong_request_is_refused_in_a_sentence_and_hurts_nobody(bad: str, deterministic: bool) -> None:
    command, category, words = BAD[bad]
    alone, home = (Service(deterministic=deterministic) for _ in range(2))
    alone.open("good")
    home.open("good", "bad")
    expected, sent = [], []
    for _ in range(2):
        expected += [alone.ask(train("good", *BATCH)), alone.ask(commands.Step(0, "good", ADAM))]
        sent += [home.send(train("good", *BATCH)), home.send(command), home.send(commands.Step(0, "good", ADAM))]
        home.run()
    failed = [home.replies[id] for id in (sent[1], sent[4])]
    for reply in failed:
        assert isinstance(reply, commands.Failed) and reply.category == category and words in reply.message, reply
    for own, id in zip(expected, [sent[0], sent[2], sent[3], sent[5]], strict=True):
        same(home.told(id), own, deterministic)
    close(home.flat("good"), alone.flat("good"), deterministic)
    home.ask(train("bad", *BATCH))  # whoever was refused goes on


def close(actual: torch.Tensor, expected: torch.Tensor, bitwise: bool) -> None:
    if bitwise:
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def same(actual: Any, expected: Any, bitwise: bool) -> None:
    assert actual.metrics == (expected.metrics if bitwise else pytest.approx(expected.metrics, rel=1e-5))
    if isinstance(actual, commands.Trained):
        for a, b in zip(logprobs(actual), logprobs(expected), strict=True):
            assert np.array_equal(a, b) if bitwise else np.allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora", "prompt", "prefix"])
def test_numbers_that_overflow_are_their_senders_alone(method: str, deterministic: bool) -> None:
    alone, home = (Service(deterministic=deterministic, token_budget=256) for _ in range(2))
    alone.open("good")
    home.open("good")
    home.open("mad", spec=commands.RunSpec(method))
    home.ask(train("mad", datum(1)))
    home.ask(commands.Step(0, "mad", commands.Adam(lr=1e38)))
    for _ in range(2):
        expected = alone.ask(train("good", *BATCH)), alone.ask(commands.Step(0, "good", ADAM))
        sent = [home.send(c) for c in (train("mad", *OTHERS), train("good", *BATCH))]
        home.run()
        sent += [home.send(commands.Step(0, run, a)) for run, a in (("mad", commands.Adam(lr=1e38)), ("good", ADAM))]
        home.run()
        mad, good, _, stepped = (home.told(id) for id in sent)
        assert not math.isfinite(mad.metrics["loss:sum"]) or abs(mad.metrics["loss:sum"]) > 1e3
        same(good, expected[0], deterministic)
        same(stepped, expected[1], deterministic)
    close(home.flat("good"), alone.flat("good"), deterministic)


def test_a_request_that_breaks_in_its_second_slice_leaves_the_gradient_as_it_was() -> None:
    home = Service(token_budget=32)
    home.open("a", "b", spec=commands.RunSpec("lora", {"rank": 4, "dropout": 0.2}))
    home.ask(train("a", *BATCH))
    before, forwards = home.grad("a"), home.core.runs.get("a").live()[0].forwards
    calls: list[int] = []

    def break_off(*_: object) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("out of memory")

    layer = home.core.host.backbone.module_of("model.layers.1.self_attn.q_proj")
    handle = layer.register_forward_pre_hook(break_off)
    with pytest.raises(RefusedError, match="The engine failed with RuntimeError: out of memory") as caught:
        home.ask(train("a", *[datum(i, 20) for i in range(3)]))
    handle.remove()
    assert caught.value.reply.category == "server" and len(calls) >= 2
    assert torch.equal(home.grad("a"), before)
    assert home.core.runs.get("a").live()[0].forwards == forwards
    assert home.ask(train("a", *BATCH)).metrics


def test_in_a_batch_that_raises_only_the_bad_request_fails() -> None:
    alone, home = Service(token_budget=512), Service(token_budget=1024)
    alone.open("good")
    home.open("good")
    home.open("long", spec=commands.RunSpec("prompt", {"tokens": 30}))
    expected = alone.ask(train("good", *BATCH))
    calls = home.core.engine.forward_backward

    def refuse(items: Any) -> Any:
        if any(len(item.example) > 400 for item in items):
            raise MemoryError("too much")
        return calls(items)

    home.core.engine.forward_backward = refuse  # type: ignore[method-assign]
    ids = [home.send(train("good", *BATCH)), home.send(train("long", datum(1, 500)))]
    home.run()
    same(home.told(ids[0]), expected, False)
    assert isinstance(home.replies[ids[1]], commands.Failed)
    assert home.core.stats()["recomputed"] == 1
    close(home.grad("good"), alone.grad("good"), False)
    assert not home.grad("long").any()


def test_anothers_weight_decay_changes_nobody() -> None:
    home = Service()
    home.open("a", "b")
    home.ask(train("a", *BATCH))
    before = home.flat("b")
    home.ask(commands.Step(0, "a", commands.Adam(lr=0.1, weight_decay=0.5)))
    assert torch.equal(home.flat("b"), before)


def test_company_changes_results_within_rounding_and_not_at_all_when_deterministic() -> None:
    for deterministic in (False, True):
        alone, home = (Service(deterministic=deterministic, token_budget=256) for _ in range(2))
        spec = commands.RunSpec("lora", {"rank": 4, "dropout": 0.2}, seed=3)
        alone.open("a", spec=spec)
        home.open("a", spec=spec)
        home.open("b", "c", spec=commands.RunSpec("dora", {"rank": 2}))
        for _ in range(3):
            expected = alone.ask(train("a", *BATCH))
            ids = [home.send(train(run, *OTHERS)) for run in "bc"] + [home.send(train("a", *BATCH))]
            home.run()
            same(home.told(ids[-1]), expected, deterministic)
            for service in (alone, home):
                service.ask(commands.Step(0, "a", ADAM))
        close(home.flat("a"), alone.flat("a"), deterministic)
        rounds = home.core.stats()["rounds"] - 3  # without those of Open
        assert rounds == 3 * 4 if deterministic else rounds < 3 * 4


# -- sampling ------------------------------------------------------------------------------------------------------


def test_a_saved_adapter_is_sampled_while_its_run_trains_on(tmp_path: Path) -> None:
    home = Service(folder=tmp_path)
    home.open("a")
    home.ask(train("a", *BATCH))
    home.ask(commands.Step(0, "a", commands.Adam(lr=0.3)))
    saved = home.ask(commands.Save(0, "a", "s1", state=False))
    assert saved.size > 0 and saved.info["rank"] == 4
    first = home.ask(sample("s1", max_tokens=6, num_samples=2, seed=7, prompt_logprobs=True))
    for i in range(3):
        home.send(train("a", *OTHERS))
        home.send(commands.Step(0, "a", commands.Adam(lr=0.3)))
        home.send(sample("s1", max_tokens=6, num_samples=2, seed=7))
        home.send(sample(max_tokens=3 + i, temperature=0.0, stream=True))
    home.run()
    again = home.ask(sample("s1", max_tokens=6, num_samples=2, seed=7))
    assert [s.tokens for s in again.sequences] == [s.tokens for s in first.sequences]
    assert len(first.sequences) == 2 and first.sequences[0].reason in ("stop", "length")
    values = np.frombuffer(first.prompt_logprobs.data, np.float32)
    assert math.isnan(values[0]) and np.isfinite(values[1:]).all() and len(values) == 3
    assert home.progress and all(len(p.tokens) == len(p.logprobs) == 1 for p in home.progress)
    assert home.core.samplers.idle


def test_adapters_for_sampling_are_bounded_and_a_stack_waits_for_places(tmp_path: Path) -> None:
    home = Service(folder=tmp_path, samplers=2)
    for i in range(4):
        home.open(f"r{i}", spec=commands.RunSpec("lora", {"rank": 2}, seed=i))
        home.ask(train(f"r{i}", *BATCH))
        home.ask(commands.Step(0, f"r{i}", commands.Adam(lr=0.3)))
        home.ask(commands.Save(0, f"r{i}", f"s{i}", state=False))
    alone = [home.ask(sample(f"s{i}", max_tokens=5, seed=1)) for i in range(4)]
    ids = [home.send(sample(f"s{i}", max_tokens=5, seed=1)) for i in range(4)]
    ids.append(home.send(sample("s0", "s3", max_tokens=3)))
    while home.core.busy:
        home.turn()
        assert home.core.samplers.adapters <= 2
    for id, own in zip(ids[:4], alone, strict=True):
        assert home.told(id).sequences[0].tokens == own.sequences[0].tokens
    assert home.told(ids[4])
    with pytest.raises(RefusedError, match="at most 2 adapters"):
        home.ask(sample("s0", "s1", "s2"))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (sample("nowhere"), "There is no adapter at"),
        (sample(tokens=()), "The prompt is empty"),
        (sample(tokens=(5, 999)), "token id 999"),
        (sample(temperature=-1.0), "temperature is -1.0"),
        (sample(max_tokens=10_000), "10000 are to be sampled"),
        (sample(num_samples=0), "at least one sample"),
    ],
)
def test_wrong_requests_for_samples_are_refused(command: commands.Sample, words: str, tmp_path: Path) -> None:
    home = Service(folder=tmp_path)
    id = home.send(sample(max_tokens=4, temperature=0.0))
    with pytest.raises(RefusedError, match=words) as caught:
        home.ask(command)
    assert caught.value.reply.category == "user"
    assert len(home.told(id).sequences[0].tokens.data) >= 4


def test_a_cancelled_command_fails_and_the_rest_goes_on() -> None:
    home = Service()
    home.open("a")
    queued = [home.send(train("a", *BATCH)), home.send(sample(max_tokens=50))]
    home.send(commands.Cancel(0, queued[1]))
    home.send(commands.Cancel(0, 12345))
    home.turn()
    last = home.send(train("a", *BATCH))
    home.send(commands.Cancel(0, last))
    home.run()
    reply = home.replies[last]
    assert isinstance(reply, commands.Failed) and "cancelled" in reply.message
    assert all(id in home.replies for id in queued)
    assert home.core.samplers.idle and not home.core.busy


def test_draining_finishes_what_is_queued_and_takes_nothing_new() -> None:
    home = Service()
    home.open("a")
    queued = [home.send(train("a", *BATCH)), home.send(sample(max_tokens=5))]
    drained = home.send(commands.Drain(0))
    late = home.send(train("a", *BATCH))
    home.run()
    assert all(home.told(id) for id in queued)
    assert isinstance(home.replies[late], commands.Failed)
    assert list(home.replies)[-1] == drained and isinstance(home.replies[drained], commands.Closed)


def test_numbers_are_told_once_a_second_and_once_more_when_nothing_is_left() -> None:
    home = Service()
    home.open("a")
    for _ in range(5):
        home.send(train("a", *BATCH))
    reports = []
    while home.core.busy:
        reports += [reply for reply in home.core.turn() if isinstance(reply, commands.Stats)]
    assert len(reports) <= 4
    last = (reports or [commands.Stats(0, home.core.stats())])[-1].values
    assert (last["queue_depth"], last["resident_runs"], last["queue_tokens"]) == (0.0, 1.0, 0.0)


def test_training_and_sampling_share_the_time() -> None:
    home = Service(kv_budget=0)
    home.open("a")
    for _ in range(40):
        home.send(train("a", *BATCH))
        home.send(sample(max_tokens=40, temperature=0.0))
    kinds = []
    for _ in range(40):
        before = home.core.stats()["batch_tokens"]
        home.core.turn()
        kinds.append(home.core.stats()["batch_tokens"] > before)
    assert 3 <= sum(kinds) <= 37
