"""The in-process client: accumulation, isolation of tenants, exact continuation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorica.client.local import Service, TrainingClient
from lorica.core.errors import DataError, FormatError, MethodError, RouteError
from lorica.data.example import Example
from lorica.methods import make_method
from lorica.sampling.params import SamplingParams
from lorica.training.optimizer import AdamWConfig
from tests.tiny import tiny


def examples(seed: int, count: int = 3) -> list[Example]:
    rng = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        tokens = torch.randint(3, 120, (4 + 3 * i,), generator=rng).tolist()
        made.append(Example.whole(tokens, f"row {i}"))
    return made


def service(**options: int) -> Service:
    return Service(tiny("qwen3", dtype=torch.float64), **options)


def client(home: Service, method: str, name: str, **fields: object) -> TrainingClient:
    made = home.training_client(
        make_method(method, **fields), name=name, seed=len(name), optimizer=AdamWConfig(lr=1e-2), steps=4
    )
    made.adapter.to(dtype=torch.float64)
    made.optimizer = type(made.optimizer)(made.adapter, AdamWConfig(lr=1e-2), steps=4)
    return made


TENANTS = {
    "lora": {"rank": 4},
    "dora": {"rank": 2},
    "vera": {"rank": 8},
    "ia3": {},
    "prefix": {"tokens": 3},
    "prompt": {"tokens": 2},
}


def test_tenants_trained_in_joint_batches_learn_what_each_learns_alone() -> None:
    home = service(token_budget=40)
    together = [client(home, method, method, **fields) for method, fields in TENANTS.items()]
    for step in range(3):
        home.forward_backward([(c, examples(10 * step + i)) for i, c in enumerate(together)])
        for c in together:
            c.optim_step()
    for i, (method, fields) in enumerate(TENANTS.items()):
        alone = client(service(), method, method, **fields)
        for step in range(3):
            alone.forward_backward(examples(10 * step + i))
            alone.optim_step()
        torch.testing.assert_close(together[i].adapter.flat, alone.adapter.flat, rtol=1e-7, atol=1e-9)


def test_two_calls_before_a_step_are_one_larger_batch() -> None:
    one, two = client(service(), "lora", "a"), client(service(), "lora", "a")
    batch = examples(1, 4)
    one.forward_backward(batch)
    two.forward_backward(batch[:1])
    two.forward_backward(batch[1:])
    assert one.optim_step().grad_norm == pytest.approx(two.optim_step().grad_norm, rel=1e-10)
    torch.testing.assert_close(one.adapter.flat, two.adapter.flat, rtol=1e-8, atol=1e-10)


def test_a_forward_pass_moves_nothing() -> None:
    c = client(service(), "lora", "a", dropout=0.5)
    before = c.adapter.flat.clone()
    first = c.forward(examples(3)).total
    assert c.forward(examples(3)).total == first
    assert torch.equal(c.adapter.flat, before)
    assert c.adapter.forwards == 0
    with pytest.raises(MethodError, match="call forward_backward before optim_step"):
        c.optim_step()


def test_state_continues_exactly() -> None:
    c = client(service(), "lora", "a", dropout=0.2)
    c.forward_backward(examples(1))
    c.optim_step()
    saved = c.state()
    ends = []
    for _ in range(2):
        c.load_state(saved)
        for step in (2, 3):
            c.forward_backward(examples(step))
            c.optim_step()
        ends.append(c.adapter.flat.clone())
    assert torch.equal(*ends)


def test_the_state_of_another_adapter_is_refused() -> None:
    home = service()
    with pytest.raises(FormatError, match="trained values"):
        client(home, "lora", "a", rank=2).load_state(client(home, "lora", "b", rank=4).state())


def test_a_batch_without_a_trained_token_is_refused_and_changes_nobody() -> None:
    home = service()
    a, b = client(home, "lora", "a"), client(home, "lora", "b")
    silent = Example((3, 4, 5), (0.0, 0.0, 0.0), "row")
    with pytest.raises(DataError, match="for 'b' is trained"):
        home.forward_backward([(a, examples(1)), (b, [silent])])
    assert float(a.adapter.grad.abs().sum()) == 0.0
    assert a.weight == 0.0


def test_sampled_log_probabilities_are_those_of_training() -> None:
    c = client(service(), "lora", "a")
    c.adapter.flat.add_(0.05)
    prompt = [5, 6, 7]
    (sample,) = c.sampling_client().sample([prompt], SamplingParams(max_tokens=5))
    tokens = (*prompt, *sample.tokens)
    (scored,) = c.sampling_client().logprobs([Example.whole(tokens, "row")])
    assert sample.logprobs == pytest.approx(scored.logprobs[-len(sample.tokens) :], abs=1e-6)


def test_a_name_can_be_taken_once() -> None:
    home = service()
    client(home, "lora", "a")
    with pytest.raises(RouteError, match="already"):
        client(home, "dora", "a")


def test_a_saved_adapter_is_trained_further(tmp_path: Path) -> None:
    home = service()
    c = client(home, "lora", "a")
    c.forward_backward(examples(1))
    c.optim_step()
    c.save(tmp_path / "adapter")
    further = home.continue_client(tmp_path / "adapter", name="b")
    torch.testing.assert_close(further.adapter.flat, c.adapter.flat, check_dtype=False)
    assert further.forward(examples(2)).total == pytest.approx(c.forward(examples(2)).total, rel=1e-6)
    further.forward_backward(examples(2))
    assert further.optim_step().grad_norm > 0
