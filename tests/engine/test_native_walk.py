"""Whole steps in one call sample what their parts sample, whoever is in the batch and wherever the keys lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorica.engine import batch, kv_cache, updates
from lorica.engine.host import Host
from lorica.engine.native import spread
from lorica.engine.native.kernels import BUNCH, Kernels, LowRank, RowFactors, RowMaps
from lorica.engine.native.proved import kernels_for, walks_here
from lorica.engine.native.walk import PANEL, Adapted, Layers, Sampler, Walks
from lorica.engine.requests import Failed, Finished, StreamRequest
from lorica.engine.stream import Stream
from lorica.methods.lora import LoRA
from lorica.methods.norm import Norm
from lorica.methods.prefix import Prefix
from lorica.sampling.params import SamplingParams
from tests.tiny import tiny

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
METHODS = {"a": LoRA(rank=4), "b": LoRA(rank=6), "c": LoRA(rank=4), "prefix": Prefix(tokens=3)}
ROWS = [
    (("a",), 5, 6),
    ((), 3, 2),
    (("b",), 9, 4),
    (("prefix",), 4, 5),
    (("prefix", "a"), 6, 3),
    (("c",), 2, 6),
    (("a",), 7, 6),
]
"""Who acts on a row, the length of its prompt, and how many tokens it samples."""
LONG = [(("a",), 12, 8), (("prefix",), 9, 8), ((), 2, 3)]
Sampled = tuple[list[int], list[float]]
pytestmark = pytest.mark.skipif(walks_here() is None, reason="there is no C compiler on this machine")


def steps() -> tuple[Kernels, Walks]:
    kernels, walks = kernels_for(torch.float32), walks_here()
    assert kernels is not None
    assert walks is not None
    return kernels, walks


def host_of(family: str, *, native: bool, **sizes: Any) -> Host:
    host = Host(tiny(family, **SIZES, **sizes)).set_native(native)
    for seed, (name, method) in enumerate(METHODS.items()):
        adapter = host.add(name, method, "q_proj" if name == "c" else None, seed=seed)
        adapter.flat.add_(0.1 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(seed)))
    Stream(host)  # asks what the model can do, by steps of its own
    return host


def sampled(
    host: Host,
    rows: list[tuple[tuple[str, ...], int, int]] = ROWS,
    *,
    tells: bool = True,
    late: int = 0,
    **settings: Any,
) -> list[Sampled]:
    """What the rows sample; from the second on, each comes `late` turns behind the one before it."""
    stream, rng = Stream(host), torch.Generator().manual_seed(1)
    asked = []
    for key, (names, length, tokens) in enumerate(rows):
        prompt = torch.randint(3, 128, (length,), generator=rng).tolist()
        params = SamplingParams(**{"max_tokens": tokens, "temperature": 0.0, "seed": key, **settings})
        asked.append(StreamRequest(key, prompt, host.stacks([names])[0], params, tells=tells))
    found: dict[Any, Sampled] = {}
    turns = 0
    while asked or not stream.idle:
        while asked and (not late or turns >= late * asked[0].key):
            stream.add(asked.pop(0))
        turns += 1
        for event in stream.turn():
            if isinstance(event, Finished):
                (sample,) = event.result.samples
                found[event.key] = list(sample.tokens), list(sample.logprobs)
            elif isinstance(event, Failed):
                found[event.key] = [], []
    return [found[key] for key in range(len(rows))]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of whole layers."""
    seen: list[int] = []
    for kind in (Layers, Sampler):

        def call(self: Any, x: Tensor, *rest: Any, own: Any = kind.__call__) -> Any:
            seen.append(len(x))
            return own(self, x, *rest)

        monkeypatch.setattr(kind, "__call__", call)
    return seen


def same(one: list[Sampled], other: list[Sampled]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a[0] == b[0] and a[1] == pytest.approx(b[1], abs=1e-4) for a, b in pairs)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_step_of_rows_that_come_and_go_is_one_call(family: str, calls: list[int]) -> None:
    with_, without = (host_of(family, native=native) for native in (True, False))
    calls.clear()
    wanted = sampled(without)
    assert not calls
    assert same(sampled(with_), wanted)
    assert len(calls) == 5  # the first of six tokens is the prompts' pass's
    assert calls[0] == len(ROWS)
    assert calls[-1] < len(ROWS)


def test_a_sliding_window_hides_what_it_hides_step_by_step(calls: list[int]) -> None:
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    hosts = [host_of("qwen3", native=native, **window) for native in (True, False)]
    calls.clear()
    found = [sampled(host, LONG) for host in hosts]
    assert same(*found)
    assert len(calls) == 7
    assert not same(found[0], sampled(host_of("qwen3", native=True), LONG))


def test_rows_in_several_lanes_go_the_way_of_their_modules(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "SHORT", 8)
    hosts = [host_of("qwen3", native=native) for native in (True, False)]
    calls.clear()
    assert same(*(sampled(host, LONG) for host in hosts))
    assert calls == [2] * 5  # once the short row is done, the others are in one lane


def test_a_norm_that_an_adapter_changes_has_no_whole_steps(calls: list[int]) -> None:
    hosts = [host_of("qwen3", native=native) for native in (True, False)]
    for host in hosts:
        host.add("norms", Norm(), seed=9).flat.add_(0.3)
    calls.clear()
    rows = [(("norms",), 5, 4), (("a",), 3, 4)]
    assert same(*(sampled(host, rows) for host in hosts))
    assert not calls


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("late", [0, 1, 3])
def test_several_tokens_a_call_are_those_of_one_a_call(
    late: int, threads: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "LARGE", 1)
    host, before = host_of("qwen3", native=True), torch.get_num_threads()
    rows = [(names, length, 9 * tokens) for names, length, tokens in ROWS]
    wanted = sampled(host, rows, late=late, temperature=1.0)
    one = len(calls)
    calls.clear()
    torch.set_num_threads(threads)
    try:
        found = sampled(host, rows, late=late, temperature=1.0, tells=False)
    finally:
        torch.set_num_threads(before)
    assert len(calls) < one / 2
    assert found == wanted


def test_a_sample_that_ends_within_a_call_has_nothing_behind_its_end(calls: list[int]) -> None:
    host = host_of("qwen3", native=True)
    rows = [(names, length, 40) for names, length, _ in ROWS]
    stops = {"temperature": 1.5, "stop_ids": tuple(range(20)), "stop_sequences": ((40,), (41, 42))}
    wanted = sampled(host, rows, **stops)
    assert len({len(tokens) for tokens, _ in wanted}) > 2
    one = len(calls)
    calls.clear()
    assert sampled(host, rows, tells=False, **stops) == wanted
    assert len(calls) < one


def test_calls_end_where_memory_for_keys_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "GROWTH", 1)
    host, slots = host_of("qwen3", native=True), []
    rows = [(names, length, 30) for names, length, _ in ROWS]
    wanted = sampled(host, rows)
    own = Sampler.__call__

    def call(self: Sampler, *given: Any) -> Any:
        slots.append((given[6] + len(given[5]), self.layers.trunk.capacity))
        return own(self, *given)

    monkeypatch.setattr(Sampler, "__call__", call)
    assert sampled(host, rows, tells=False) == wanted
    assert all(stop <= capacity for stop, capacity in slots)
    assert sum(stop == capacity for stop, capacity in slots) > 1, "or no call had to end there"


@pytest.mark.parametrize(("rows", "all_", "most"), [(1, 128, batch.LONGEST), (20, 128, 6), (20, 16, 1)])
def test_many_rows_have_few_tokens_a_call(rows: int, all_: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    host, counts = host_of("qwen3", native=True), []
    own = Sampler.__call__
    monkeypatch.setattr(batch, "AT_A_STEP", all_)
    monkeypatch.setattr(Sampler, "__call__", lambda *given: (counts.append(len(given[6])), own(*given))[1])
    sampled(host, [(("a",), 3, 33)] * rows, tells=False)
    assert max(counts) == most
    assert sum(counts) == 32


def test_a_row_that_asks_for_more_is_drawn_from_its_logits(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = [host_of("qwen3", native=native) for native in (True, False)]
    heads: list[int] = []
    own = Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", lambda *given: (heads.append(1), own(*given))[1])
    calls.clear()
    assert same(*(sampled(host, temperature=1.0, top_k=5, tells=False) for host in hosts))
    assert len(calls) == 5
    assert not heads


def test_an_adapter_of_the_embedding_has_it_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = [host_of("qwen3", native=native) for native in (True, False)]
    for host in hosts:
        host.add("words", LoRA(rank=4), "embed_tokens", seed=9).flat.add_(0.2)
    drawn: list[int] = []
    own = Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", lambda *given: (drawn.append(len(given[1])), own(*given))[1])
    with_, without = [(("words",), 5, 9), (("a",), 3, 9)], [(("b",), 5, 9), (("a",), 3, 9)]
    assert same(*(sampled(host, with_, tells=False) for host in hosts))
    assert not drawn
    assert same(*(sampled(host, without, tells=False) for host in hosts))
    assert drawn, "nobody there changes the embedding"


def test_a_row_that_is_no_number_within_a_call_fails_alone() -> None:
    host = host_of("qwen3", native=True)
    rows = [(names, length, 12) for names, length, _ in ROWS]
    wanted = sampled(host, rows, tells=False)
    sick = host.add("sick", LoRA(rank=4), "down_proj", seed=5)
    sick.flat.fill_(torch.nan)
    rows[2] = ("sick",), 9, 12
    found = sampled(host, rows, tells=False)
    assert found[2] == ([], [])
    assert found[:2] + found[3:] == wanted[:2] + wanted[3:]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rank", [3, 16])
def test_a_rows_numbers_do_not_depend_on_the_others_bit_for_bit(threads: int, rank: int) -> None:
    kernels, walks = steps()
    rng, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    inputs, outputs, counts = 256, 8 * PANEL, [1, BUNCH + 1, 2, 2 * BUNCH]
    panels = walks.panels([torch.randn(outputs, inputs, generator=rng)])
    assert panels is not None
    own = [
        RowMaps([RowFactors(torch.randn(rank, inputs, generator=rng), torch.randn(rank, outputs, generator=rng))])
        for _ in counts
    ]
    x_NI = torch.randn(sum(counts), inputs, generator=rng)
    torch.set_num_threads(threads)
    try:
        together_NO = Adapted(walks, panels, None, LowRank(kernels, own, [outputs], counts))(x_NI)
    finally:
        torch.set_num_threads(before)
    which = [i for i, count in enumerate(counts) for _ in range(count)]
    for row, i in enumerate(which):
        alone_1O = Adapted(walks, panels, None, LowRank(kernels, [own[i]], [outputs]))(x_NI[row : row + 1])
        assert torch.equal(alone_1O[0], together_NO[row])


def test_updates_of_adapters_without_rows_stay_while_they_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for most, kept in ((2**26, 12), (0, updates.IDLE)):
        monkeypatch.setattr(updates, "IDLE_BYTES", most)
        host = Host(tiny("qwen3", **SIZES))
        stream = Stream(host)
        for i in range(12):
            adapter = host.add(str(i), LoRA(rank=2), seed=i)
            stream.add(StreamRequest(i, [3, 4, 5], (adapter,), SamplingParams(max_tokens=2)))
        while not stream.idle:
            stream.turn()
        assert len(stream._updates.known()) == kept
