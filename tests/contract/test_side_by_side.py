"""Adapters live side by side: stacked, switched, deleted, copied, whatever their names."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from lorica.core.errors import RouteError
from lorica.engine.host import Host
from tests.contract.cases import (
    CASES,
    METHODS,
    Case,
    add,
    attached,
    backbone,
    close,
    every_kind,
    gradient,
    inputs,
    output,
    small,
)


@every_kind
def test_switching_is_exact_and_names_may_be_prefixes_of_each_other_and_of_modules(case: Case) -> None:
    host = attached(case)
    names = ["a", "aa", "weight", "model", "layers.0"]
    for index, name in enumerate(names[1:]):
        add(host, name, case.make(), seed=index + 1)
    given = inputs(host)
    outputs = {}
    for name in names:
        host.activate(name)
        outputs[name] = output(host, given)
    for name in reversed(names):
        host.activate(name)
        assert host.active == (name,)
        assert torch.equal(output(host, given), outputs[name])
    for name in names[1:]:
        assert not torch.equal(outputs[name], outputs["a"])


@every_kind
def test_one_adapters_step_leaves_its_neighbours_alone(case: Case) -> None:
    host = attached(case)
    other = add(host, "b", case.make(), seed=4)
    before = other.flat.clone()
    given = inputs(host)
    host.adapter("a").flat.sub_(0.1 * gradient(host, "a", given))
    assert torch.equal(other.flat, before)
    assert not other.grad.any()


@every_kind
def test_a_deleted_adapter_no_longer_acts(case: Case) -> None:
    host = attached(case)
    add(host, "b", small("lora"), seed=4)
    given = inputs(host)
    host.activate("b")
    y = output(host, given)
    host.activate("a", "b")
    host.delete("a")
    assert host.active == ("b",)
    assert torch.equal(output(host, given), y)
    with pytest.raises(RouteError, match="no adapter 'a'"):
        host.activate("a")
    host.delete("b")
    assert host.active == ()
    with host.disabled():
        base = output(host, given)
    assert torch.equal(output(host, given), base)


def test_deleted_adapters_of_every_method_free_their_memory() -> None:
    host = Host(backbone("gpt2"))
    gone = {}
    for case in [case for case in CASES if case.family == "gpt2"]:
        adapter = add(host, case.method, case.make())
        host.activate(case.method)
        gradient(host, case.method, inputs(host))
        gone[case.method] = weakref.ref(adapter)
        del adapter
        host.delete(case.method)
    output(host, inputs(host))
    gc.collect()
    assert [name for name, ref in gone.items() if ref() is not None] == []


@every_kind
def test_a_deep_copy_of_the_model_alone_is_a_working_model(case: Case) -> None:
    host = attached(case)
    given = inputs(host)
    y = output(host, given)
    twin = copy.deepcopy(host.model)
    assert torch.equal(_logits(twin(**given)), y)
    host.adapter("a").flat.add_(0.1)
    assert torch.equal(_logits(twin(**given)), y)


def _logits(out: object) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out.logits  # type: ignore[attr-defined]


@every_kind
def test_stacking_an_adapter_at_its_identity_changes_nothing(case: Case) -> None:
    if METHODS[case.method].identity_at_init == "none":
        return
    host = attached(case, move=0.0)
    add(host, "b", small("lora"), seed=4)
    given = inputs(host)
    host.activate("b")
    y = output(host, given)
    if case.method != "dora":  # a norm of W₀ + sBA is no identity over another adapter's weights
        host.activate("b", "a")
        close(output(host, given), y, 1e-11)
    host.activate("a", "b")
    close(output(host, given), y, 1e-11)


@every_kind
def test_a_stack_trains_each_of_its_adapters_as_rows_of_stacks_do(case: Case) -> None:
    host = attached(case)
    add(host, "b", small("lora"), seed=4)
    given = inputs(host)
    host.activate("b", "a")
    y, expected = output(host, given), [gradient(host, name, given) for name in ("a", "b")]
    host.adapter("a").zero_grad()
    with host.rows([["b", "a"], ["b", "a"]]):
        close(output(host, given), y, 1e-12)
        found = [gradient(host, name, given) for name in ("a", "b")]
    for one, two in zip(found, expected, strict=True):
        close(one, two, 1e-10)
