"""Passes that come again are replayed where the device has graphs, and nobody can tell from their numbers.

A CPU has none; the tests give it one, and run on CUDA too where that is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.host import Host
from lorica.engine.replay import BESIDE, GRAPHS, Body, Replays, held
from lorica.engine.requests import Finished, StreamRequest
from lorica.engine.stream import Stream
from lorica.methods import make_method
from lorica.sampling.params import SamplingParams
from lorica.training.optimizer import AdamStep, AdapterOptimizer
from tests.contract.cases import small
from tests.engine.tape import Tape
from tests.tiny import tiny

Build = Callable[[bool], Host]
NEEDS = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
METHODS = ("lora", "dora", "vera", "ia3", "norm", "miss", "pissa", "singlora")


def test_a_cpu_runs_every_pass_as_it_is() -> None:
    replays, runs = Replays(torch.device("cpu")), []
    for _ in range(3):
        replays.run("key", {"x": torch.ones(1)}, lambda inputs: runs.append(inputs) or [held(inputs["x"])])  # type: ignore[func-returns-value]
    assert len(runs) == 3 and len(replays) == replays.replayed == 0


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NEEDS)])
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Makes hosts whose passes are recorded, or are not."""
    if request.param == "cpu":
        monkeypatch.setitem(GRAPHS, "cpu", Tape)

    def make(active: bool) -> Host:
        base = tiny("qwen3", dtype=torch.float64)
        base.module.to(request.param)
        host = Host(base)
        for seed, name in enumerate(METHODS):
            host.add(name, small(name), seed=seed, dtype=torch.float64)
        Engine(host)._replays().active = active
        return host

    return make


def items(seed: int, lengths: tuple[int, ...] = (5, 9, 4, 12), names: tuple[str | None, ...] = ()) -> list[Item]:
    rng = torch.Generator().manual_seed(seed)
    owners = names or (*METHODS, None)
    rows = [torch.randint(3, 120, (lengths[i % len(lengths)],), generator=rng).tolist() for i in range(len(owners))]
    return [Item(Example.whole(row), owner) for row, owner in zip(rows, owners, strict=True)]


def trained(host: Host) -> tuple[list[float], dict[str, torch.Tensor], Replays]:
    engine, losses = Engine(host), []
    steps = {name: AdapterOptimizer(host.adapter(name), steps=20) for name in METHODS}
    for seed in range(6):
        for given in (items(seed), items(seed + 50, names=("lora", "dora")), items(seed + 90, (3 + seed,))):
            losses += [result.loss for result in engine.forward_backward(given)]
        for name in METHODS:
            steps[name].step(AdamStep(1e-2))
        losses += [result.loss for result in engine.forward(items(seed))]
    return losses, {name: host.adapter(name).flat for name in METHODS}, engine._replays()


def test_training_with_replayed_passes_is_training_without(build: Build) -> None:
    losses, ends, replays = trained(build(True))
    plain, plain_ends, none = trained(build(False))
    assert replays.active and replays.replayed == 4 * 3 and none.replayed == 0
    assert losses == pytest.approx(plain, rel=1e-9)
    for name, end in ends.items():
        torch.testing.assert_close(end, plain_ends[name], rtol=1e-7, atol=1e-9)


def test_what_a_replay_would_not_see_is_computed_anew(build: Build) -> None:
    host = build(True)
    engine, given = Engine(host), items(0, names=("vera",))
    found = [engine.forward(given)[0].loss for _ in range(3)]
    assert engine._replays().replayed == 1 and found[1:] == pytest.approx(found[:1] * 2, rel=1e-12)
    adapter = host.adapter("vera")
    site, param, frozen = next((s, p, t) for s, p, t in adapter.named_tensors() if not t.requires_grad)
    adapter.flat += 0.1
    moved = engine.forward(given)[0].loss
    adapter.set(site, param, frozen * 2)
    doubled = engine.forward(given)[0].loss
    host.delete("vera")
    host.add("vera", small("vera"), seed=99, dtype=torch.float64)
    fresh = engine.forward(given)[0].loss
    host.model.model.norm.weight.mul_(1.5)
    other = engine.forward(given)[0].loss
    assert len({round(x, 9) for x in (found[0], moved, doubled, other)}) == 4 and fresh == pytest.approx(found[0])


def test_passes_that_draw_or_are_listened_to_are_not_recorded(build: Build) -> None:
    host = build(True)
    host.add("drops", make_method("lora", rank=2, dropout=0.5))
    engine, heard = Engine(host), []
    for _ in range(3):
        engine.forward_backward(items(0, names=("drops",)))
    layer = host.model.model.layers[0]
    handle = layer.mlp.register_forward_hook(lambda *seen: heard.append(seen))
    for _ in range(3):
        engine.forward(items(0, names=("lora",)))
    handle.remove()
    host.set_graphs(False)
    for _ in range(3):
        engine.forward(items(0, names=("dora",)))
    assert len(engine._replays()) == 0 and len(heard) == 3


def test_gradients_that_a_foreign_optimiser_detached_are_not_lost(build: Build) -> None:
    host = build(True)
    engine, adapter, found = Engine(host), host.adapter("lora"), []
    for step in range(4):
        if step == 3:
            for leaf in adapter.parameters():
                leaf.grad = None
        else:
            adapter.zero_grad()
        engine.forward_backward(items(0, names=("lora",)))
        found.append(adapter.collect_grad().clone())
    for own in found[1:]:
        torch.testing.assert_close(own, found[0], rtol=1e-9, atol=1e-12)


def test_an_error_after_replayed_passes_keeps_what_they_accumulated(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = build(True)
    engine, adapter = Engine(host), host.adapter("lora")
    for _ in range(3):
        engine.forward_backward(items(0, names=("lora",)))
    adapter.zero_grad()
    engine.forward_backward(items(0, names=("lora",)))
    assert engine._replays().replayed == 2
    one = adapter.grad.clone()
    assert one.any()
    micro, seen = engine._micro, []

    def fails(*given: Any) -> Any:
        seen.append(micro(*given))
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_micro", fails)
    with pytest.raises(KeyboardInterrupt):
        engine.forward_backward(items(0, names=("lora",)))
    assert len(seen) == 1
    assert torch.equal(adapter.grad, one)


def test_sampling_with_replayed_steps_is_sampling_without(build: Build) -> None:
    samples = []
    for active in (True, False):
        host = build(active)
        for name in METHODS:
            host.adapter(name).flat += 0.05
        stream, replayed, events = Stream(host, slots=16), 0, []
        for i, name in enumerate((*METHODS, None, "lora")):
            params = SamplingParams(max_tokens=24 + 8 * (i % 2), temperature=1.0, seed=i)
            stream.add(
                StreamRequest(i, [5 + i, 9, 30][: 1 + i % 3], () if name is None else (host.adapter(name),), params)
            )
        while not stream.idle:
            events += stream.turn()
            for batch in stream._batches.values():
                batch._replays.active = active
                replayed = max(replayed, batch._replays.replayed)
        assert (replayed > 10) == active
        samples.append({e.key: e.result.samples[0].tokens for e in events if isinstance(e, Finished)})
    assert samples[0] == samples[1]


def doubled(inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    return [inputs["x"] * 2]


def waiting(inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    return [inputs["x"] * 2 if float(inputs["x"].sum()) >= 0 else inputs["x"]]


def several(replays: Replays, key: str, body: Body) -> None:
    """Three runs of other numbers."""
    for i in range(3):
        x = torch.full((2,), float(i))
        assert torch.equal(replays.run(key, {"x": x}, body)[0], x * 2)


def test_a_pass_that_cannot_be_recorded_runs_as_it_is_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Tape):
        def record(self, run: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
            raise RuntimeError("no room\nfor a graph")

    monkeypatch.setitem(GRAPHS, "cpu", Broken)
    replays = Replays(torch.device("cpu"))
    with pytest.warns(RuntimeWarning, match="one operation after the other from now on: no room$"):
        several(replays, "key", doubled)
    several(replays, "key", doubled)
    assert not replays.active and len(replays) == 0


def recorded(replays: Replays) -> set[object]:
    return {key for key, found in replays._passes.items() if found.recording is not None}


def test_a_recording_in_use_makes_no_room_and_an_idle_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRAPHS, "cpu", Tape)
    replays = Replays(torch.device("cpu"), most=2)
    for _ in range(4):
        for key in ("a", "b", "c"):  # more than there may be, in turns
            several(replays, key, doubled)
    assert recorded(replays) == {"a", "b"} and replays.replayed == 2 * (1 + 3 * 3)
    for _ in range(3):
        for key in ("b", "c"):
            several(replays, key, doubled)
    assert recorded(replays) == {"b", "c"}


def test_nothing_is_recorded_while_another_thread_works_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRAPHS, "cpu", Tape)
    replays = Replays(torch.device("cpu"))
    with BESIDE:
        several(replays, "key", doubled)
        several(replays, "key", doubled)
        assert not recorded(replays)
    several(replays, "key", doubled)
    assert recorded(replays) == {"key"} and replays.replayed == 3


def test_a_pass_that_waits_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRAPHS, "cpu", Tape)
    replays = Replays(torch.device("cpu"))
    for _ in range(3):
        several(replays, "waits", waiting)
    assert replays.active and not recorded(replays)
