"""Tenants of one service: who is gone is refused, a failure changes nobody, signed weights, masks of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorica.client.local import Service, TrainingClient
from lorica.core.errors import DataError, RouteError
from lorica.data.example import Example
from lorica.methods import make_method
from lorica.sampling.params import SamplingParams
from lorica.training.optimizer import AdamWConfig
from tests.contract.cases import close, perturb
from tests.tiny import tiny


def service(token_budget: int = 2048) -> Service:
    return Service(tiny("llama", dtype=torch.float64), token_budget=token_budget)


def client(home: Service, name: str, method: str = "lora", targets: Any = None, **fields: Any) -> TrainingClient:
    """A client whose adapter is moved off its initial values and computes in float64."""
    made = home.training_client(make_method(method, rank=2, **fields), targets, name=name, seed=len(name))
    perturb(made.adapter.to(dtype=torch.float64))
    made.optimizer = type(made.optimizer)(made.adapter, AdamWConfig())
    return made


def example(seed: int, length: int) -> Example:
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 120, (length,), generator=rng).tolist()
    return Example(tuple(tokens), (0.0, *(torch.rand(length - 1, generator=rng) + 0.1).tolist()), f"row {seed}")


def examples(seed: int, count: int = 3) -> list[Example]:
    return [example(10 * seed + i, 4 + 3 * i) for i in range(count)]


@pytest.mark.parametrize(
    "act",
    [
        lambda c, path: c.forward_backward(examples(1)),
        lambda c, path: c.forward(examples(1)),
        lambda c, path: c.sampling_client().sample([[5, 6]], SamplingParams(max_tokens=2)),
        lambda c, path: c.sampling_client().logprobs(examples(1)),
        lambda c, path: c.save(path),
    ],
    ids=["forward_backward", "forward", "sample", "logprobs", "save"],
)
@pytest.mark.parametrize("renewed", [True, False])
def test_a_client_of_a_deleted_adapter_is_refused_and_does_not_act_on_the_next_of_that_name(
    act: Callable[[TrainingClient, Path], object], renewed: bool, tmp_path: Path
) -> None:
    home = service()
    gone = client(home, "a")
    home.host.delete("a")
    new = client(home, "a" if renewed else "b")
    before = new.adapter.flat.clone()
    with pytest.raises(RouteError, match="'a' of this row was deleted"):
        act(gone, tmp_path / "adapter")
    assert not new.adapter.grad.any() and not gone.adapter.grad.any()
    assert torch.equal(new.adapter.flat, before)
    assert (new.adapter.forwards, new.weight, new.waiting) == (0, 0.0, False)
    assert not (tmp_path / "adapter").exists()
    new.forward_backward(examples(1))
    assert new.adapter.grad.any()


def test_one_deleted_tenant_of_a_joint_batch_leaves_the_others_as_they_were() -> None:
    home = service()
    a, b = client(home, "a"), client(home, "b")
    home.host.delete("a")
    with pytest.raises(RouteError, match="'a' of this row was deleted"):
        home.forward_backward([(b, examples(1)), (a, examples(2))])
    assert not b.adapter.grad.any() and not b.waiting


@contextmanager
def untouched(*clients: TrainingClient) -> Iterator[None]:
    """Nothing that belongs to a client is another afterwards."""

    def everything() -> list[tuple[Tensor, int, float, bool]]:
        return [(c.adapter.grad.clone(), c.adapter.forwards, c.weight, c.waiting) for c in clients]

    before = everything()
    yield
    for (grad, *rest), (grad_before, *rest_before) in zip(everything(), before, strict=True):
        assert torch.equal(grad, grad_before)
        assert rest == rest_before


BAD = {
    "vocabulary": (Example((5, 128, 7), (0.0, 1.0, 1.0), "file, line 7"), "token id 128"),
    "negative": (Example((5, 6, -1), (0.0, 1.0, 1.0), "file, line 7"), "token id -1"),
    "short": (Example((5,), (0.0,), "file, line 7"), "1 tokens"),
    "empty": (Example((), (), "file, line 7"), "0 tokens"),
}


@pytest.mark.parametrize("bad", list(BAD))
@pytest.mark.parametrize("trained", [False, True])
def test_a_bad_row_of_a_joint_batch_is_named_and_nobodys_gradient_changes(bad: str, trained: bool) -> None:
    row, words = BAD[bad]
    home = service(token_budget=12)
    a, b, c = (client(home, name, dropout=0.3) for name in "abc")
    if trained:  # an accumulated gradient is kept too
        home.forward_backward([(a, examples(1)), (b, examples(2))])
    with untouched(a, b, c), pytest.raises(DataError, match=rf"Example 4 \(file, line 7\),?.* has {words}"):
        home.forward_backward([(a, examples(3)), (b, [example(1, 5), row, example(2, 6)]), (c, examples(4))])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_breaks_off_in_the_middle_changes_nobody_and_can_be_repeated(error: type[BaseException]) -> None:
    home, other = service(token_budget=12), service(token_budget=12)
    ours, theirs = ([client(h, name, dropout=0.3) for name in ("a", "bb")] for h in (home, other))
    for h, clients in ((home, ours), (other, theirs)):
        h.forward_backward([(c, examples(i)) for i, c in enumerate(clients)])
    calls: list[int] = []

    def break_off(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise error("stop")

    layer: Any = home.host.backbone.module_of("model.layers.1.self_attn.q_proj")
    handle = layer.register_forward_pre_hook(break_off)
    with untouched(*ours), pytest.raises(error, match="stop"):
        home.forward_backward([(c, examples(5 + i)) for i, c in enumerate(ours)])
    assert len(calls) == 3, "micro-batches before the third had their gradients"
    handle.remove()
    assert not home.host.model.training
    for h, clients in ((home, ours), (other, theirs)):
        h.forward_backward([(c, examples(5 + i)) for i, c in enumerate(clients)])
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one.adapter.grad, two.adapter.grad), "the masks are those of the call that failed"


def test_weights_that_sum_to_zero_still_teach() -> None:
    tokens = (5, 9, 20, 7, 8)
    signed, plus, minus = ((0.0, 1.0, -1.0, 0.5, -0.5), (0.0, 1.0, 0.0, 0.5, 0.0), (0.0, 0.0, 1.0, 0.0, 0.5))
    grads = {}
    for weights in (signed, plus, minus):
        c = client(service(), "a")
        loss = c.forward_backward([Example(tokens, weights, "row")])
        assert loss.weight == c.weight == sum(map(abs, weights))
        assert loss.mean == pytest.approx(loss.total / loss.weight)
        grads[weights] = c.adapter.grad.clone()
    close(grads[signed], grads[plus] - grads[minus], 1e-6)  # norms of transformers are in float32 within
    assert grads[signed].any()
    c = client(service(), "a")
    before = c.adapter.flat.clone()
    c.forward_backward([Example(tokens, signed, "row")])
    assert c.waiting
    assert c.optim_step().grad_norm == pytest.approx(float(grads[signed].norm()) / 3.0)
    assert not torch.equal(c.adapter.flat, before)
    assert (c.waiting, c.weight) == (False, 0.0)


def heads(home: Service) -> list[str]:
    return [site.name for site in home.host.backbone.sites.values() if site.kind == "linear"]


LENGTHS = [5, 120, 3, 90, 140, 4]
"""Together more positions than one chunk of the loss head."""


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dropout_masks_do_not_depend_on_the_token_budget_or_on_other_clients(method: str) -> None:
    batch = [example(i, length) for i, length in enumerate(LENGTHS)]
    grads = []
    for budget, company, rate in [(8, 0, 0.3), (64, 0, 0.3), (4096, 0, 0.3), (200, 2, 0.3), (64, 0, 0.0)]:
        home = service(token_budget=budget)
        own = client(home, "own", method, heads(home), dropout=rate)
        others = [client(home, f"other {i}", dropout=0.5) for i in range(company)]
        joint = [(c, examples(i, 4)) for i, c in enumerate(others)]
        home.forward_backward([*joint[:1], (own, batch), *joint[1:]])
        grads.append(own.adapter.grad.clone())
    for grad in grads[1:4]:
        close(grad, grads[0], 1e-9)
    assert (grads[4] - grads[0]).norm() > 0.01 * grads[0].norm()
