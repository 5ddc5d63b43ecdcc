"""Models whose rows cannot share a pass: layers with a state along the sequence, rotations that depend on the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lorica.core.errors import MethodError
from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.host import Host
from lorica.engine.sample import generate
from lorica.methods import make_method
from lorica.models import Backbone, tiny, wrap
from lorica.sampling.params import SamplingParams
from tests.contract.cases import close, perturb

ROWS = [[5, 9, 20, 7, 8, 3], [30, 11, 6], [9, 9, 5, 5, 7, 40, 41, 2], [17, 4]]
OWNERS = ["a", None, "b", "a"]
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}


class Running(nn.Module):
    """A feed-forward layer to which a running mean over the sequence is added: it knows no borders between rows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x_BTD: Tensor) -> Tensor:
        count_T1 = torch.arange(1, x_BTD.shape[1] + 1, dtype=x_BTD.dtype)[:, None]
        result: Tensor = self.inner(x_BTD) + x_BTD.cumsum(1) / count_T1
        return result


def running() -> Backbone:
    module: Any = tiny("llama", dtype=torch.float64).module
    module.model.layers[1].mlp = Running(module.model.layers[1].mlp)
    return wrap(module)


def recurrent(family: str) -> Backbone:
    if family == "running":
        return running()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "lfm2":
            config = transformers.Lfm2Config(
                **SMALL, num_hidden_layers=2, num_key_value_heads=1, layer_types=["conv", "full_attention"]
            )
            module: nn.Module = transformers.Lfm2ForCausalLM(config)
        else:
            config = transformers.RecurrentGemmaConfig(**SMALL, num_hidden_layers=3, lru_width=32)
            module = transformers.RecurrentGemmaForCausalLM(config)
    return wrap(module.double())


def resident(base: Backbone) -> Host:
    host = Host(base)
    for seed, name in enumerate("ab"):
        method = make_method("lora", rank=2 + seed)
        perturb(host.add(name, method, seed=seed, dtype=torch.float64), 0.1, seed)
    return host


def items(rows: list[list[int]], owners: list[Any]) -> list[Item]:
    return [Item(Example.whole(row), owner) for row, owner in zip(rows, owners, strict=True)]


def own(host: Host, item: Item) -> Tensor:
    """Log-probabilities from the model's own pass of one row."""
    ids = torch.tensor([item.example.tokens])
    with host.rows([item.adapter]):
        logits = host.model(input_ids=ids[:, :-1], use_cache=False).logits[0]
    found: Tensor = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return found


def greedy(host: Host, row: list[int], owner: Any, count: int) -> tuple[int, ...]:
    tokens = list(row)
    for _ in range(count):
        with host.rows([owner]), torch.no_grad():
            tokens.append(int(host.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tuple(tokens[len(row) :])


@pytest.mark.parametrize("family", ["running", "lfm2", "recurrent-gemma"])
def test_rows_of_a_model_with_a_state_along_the_sequence_do_not_see_each_other(family: str) -> None:
    host, batch = resident(recurrent(family)), items(ROWS, OWNERS)
    engine = Engine(host, token_budget=4096)
    together = engine.forward_backward(batch)
    assert not engine.trunk.packs()
    grads = {name: adapter.grad.clone() for name, adapter in host.adapters.items()}
    for adapter in host.adapters.values():
        adapter.zero_grad()
    for item, result in zip(batch, together, strict=True):
        assert engine.forward([item])[0].logprobs == pytest.approx(result.logprobs, rel=1e-9)
        logprobs = own(host, item)
        assert result.logprobs == pytest.approx(logprobs.tolist(), rel=1e-5)  # norms of transformers are in float32
        if item.adapter is not None:
            (-logprobs.sum()).backward()
    for name, adapter in host.adapters.items():
        assert adapter.grad.any()
        close(grads[name], adapter.grad, 1e-4)


@pytest.mark.parametrize("family", ["running", "lfm2", "recurrent-gemma"])
def test_a_model_with_a_state_samples_what_it_computes_anew(family: str) -> None:
    host = resident(recurrent(family))
    samples = generate(host, list(zip(ROWS, OWNERS, strict=True)), SamplingParams(max_tokens=5))
    for row, owner, sample in zip(ROWS, OWNERS, samples, strict=True):
        assert sample.tokens == greedy(host, row, owner, 5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3-moe", "gemma", "gpt2"])
def test_rows_of_a_model_with_attention_alone_share_passes(family: str) -> None:
    host = Host(tiny(family))
    engine, widths = Engine(host), []
    engine.forward(items(ROWS, [None] * 4))
    trunk = host.backbone.trunk
    assert trunk is not None
    trunk.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    engine.forward(items(ROWS, [None] * 4))
    assert widths == [sum(len(row) - 1 for row in ROWS)], "one pass, and the model is asked once what it can"


class Strange(nn.Module):
    """A feed-forward layer of which every pass after the first gives something else, or fails."""

    def __init__(self, inner: nn.Module, say: str | None) -> None:
        super().__init__()
        self.inner, self.say = inner, say
        self.calls = 0

    def forward(self, x_BTD: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1 and self.say is not None:
            raise NotImplementedError(self.say)
        result: Tensor = self.inner(x_BTD) * self.calls
        return result


@pytest.mark.parametrize(
    ("say", "words"),
    [(None, "does not give what the model itself gives"), ("No packs here.", "packed passes: No packs here")],
)
def test_a_model_whose_packed_pass_is_not_its_own_is_refused(say: str | None, words: str) -> None:
    module: Any = tiny("llama").module
    module.model.layers[1].mlp = Strange(module.model.layers[1].mlp, say)
    engine = Engine(Host(wrap(module)))
    with pytest.raises(MethodError, match=words) as caught:
        engine.forward(items(ROWS, [None] * 4))
    assert caught.value.hint is not None and "when the model itself is called" in caught.value.hint


ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + 2 * i for i in range(8)],
        "original_max_position_embeddings": 8,
    },
}


def rotated(kind: str) -> Host:
    most = 8 if kind == "dynamic" else 64
    return resident(tiny("llama", dtype=torch.float64, rope_parameters=dict(ROPES[kind]), max_position_embeddings=most))


@pytest.mark.parametrize("kind", list(ROPES))
def test_a_row_that_stretches_the_rotations_stretches_those_of_no_other_row(kind: str) -> None:
    host = rotated(kind)
    long = [(7 * i) % 120 + 3 for i in range(20)]
    batch = items([ROWS[0], long, ROWS[1], ROWS[3]], ["b", "a", "a", None])
    results = Engine(host).forward_backward(batch)
    assert host.adapter("a").grad.any()
    for item, result in zip(batch, results, strict=True):
        assert result.logprobs == pytest.approx(own(rotated(kind), item).tolist(), rel=1e-6)
    stretched = Engine(Host(tiny("llama", dtype=torch.float64))).forward(items([long], [None]))
    plain = Engine(rotated(kind)).forward(items([long], [None]))
    assert stretched[0].logprobs[-1] != pytest.approx(plain[0].logprobs[-1], rel=1e-6), "these rotations matter"


@pytest.mark.parametrize("kind", list(ROPES))
def test_rotations_are_those_of_a_row_whatever_longer_ones_came_before(kind: str) -> None:
    host, lengths = rotated(kind), [30, 20, 9, 8, 25]
    batch = items([[(7 * i + n) % 120 + 3 for i in range(n)] for n in lengths], ["b", "a", None, "a", "b"])
    engine = Engine(host)
    engine.forward(batch[:1])
    for item, result in zip(batch, engine.forward(batch), strict=True):
        assert result.logprobs == pytest.approx(own(rotated(kind), item).tolist(), rel=1e-6)


def test_a_row_that_grows_beyond_the_rotations_limit_samples_what_it_computes_anew() -> None:
    rows, owners = [ROWS[0], ROWS[1]], ["a", None]
    samples = generate(rotated("longrope"), list(zip(rows, owners, strict=True)), SamplingParams(max_tokens=6))
    for row, owner, sample in zip(rows, owners, samples, strict=True):
        assert sample.tokens == greedy(rotated("longrope"), row, owner, 6)
