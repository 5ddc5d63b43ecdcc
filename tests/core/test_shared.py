"""Frozen tensors that adapters share: one copy of equal ones, and what is made of them is never of an older content."""

from __future__ import annotations

import gc
import pickle

import torch

from lorica.core.shared import share, shared_of


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_equal_tensors_of_one_name_are_one() -> None:
    first = share("A", numbers(4, 6))
    assert share("A", numbers(4, 6)) is first
    assert share("B", numbers(4, 6)) is not first
    assert share("A", numbers(4, 6) + 1) is not first


def test_any_view_leads_to_the_shared_tensor_and_a_copy_does_not() -> None:
    shared = share("A", numbers(4, 6))
    for view in (shared.tensor, shared.tensor[:, :3], shared.tensor[1:].mT):
        assert shared_of(view) is shared
    assert shared_of(shared.tensor.clone()) is None
    assert shared_of(shared.tensor.detach().requires_grad_(True)) is None


def test_tensors_of_one_memory_are_told_apart() -> None:
    both = numbers(8, 6)
    one, two = share("A", both[:4]), share("B", both[4:])
    assert shared_of(one.tensor) is one
    assert shared_of(two.tensor) is two
    assert shared_of(both[4:]) is None


def test_what_is_made_is_kept_until_the_tensor_is_written_to() -> None:
    shared = share("A", numbers(4, 6))
    first = shared.made("cast", shared.tensor.bfloat16)
    assert shared.made("cast", shared.tensor.bfloat16) is first
    shared.tensor[:, :2].mul_(2.0)
    assert torch.equal(shared.made("cast", shared.tensor.bfloat16), shared.tensor.bfloat16())


def test_what_is_made_in_inference_mode_serves_training() -> None:
    shared = share("A", numbers(4, 6))
    with torch.inference_mode():
        made = shared.made("cast", shared.tensor.bfloat16)
    assert not made.is_inference()


def test_it_is_gone_with_its_last_user() -> None:
    shared = share("A", numbers(3, 7))
    view = shared.tensor[:2]
    assert shared_of(view) is shared
    del shared
    gc.collect()
    assert shared_of(view) is None


def test_a_copy_carries_the_tensor_and_nothing_that_was_made_of_it() -> None:
    shared = share("A", torch.zeros(1000))
    size = len(pickle.dumps(shared))
    shared.made("double", shared.tensor.double)
    assert len(pickle.dumps(shared)) < size + 100
