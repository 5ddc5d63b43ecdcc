"""Hazards that methods share: weight decay, dropout, and small steps beside a half-precision base.

In: every registered method with the settings of the contract. What is asked of one follows from what its class declares
(`ParamSpec.decay`, a `dropout` field) and from its lowering, so a new method is covered without an edit here.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.core.update import LinearUpdate, Update
from lorica.engine.host import Host
from lorica.methods import get_method
from tests.contract.cases import KINDS, METHODS, MORE, Case, attached, close, inputs, output
from tests.methods.one import hosted, linear, matrix


def one_family(cases: list[Case]) -> list[Case]:
    """Of each method with its settings, the case on the first family that has it."""
    first: dict[tuple[str, Any], Case] = {}
    for case in cases:
        first.setdefault((case.method, case.settings), case)
    return list(first.values())


every_method = pytest.mark.parametrize("case", one_family([*KINDS, *MORE]), ids=str)
DECAY, LR = 0.5, 0.5


def decayed(adapter: Adapter, steps: int) -> None:
    """Steps of AdamW without a gradient."""
    adapter.zero_grad()
    groups = [{"params": g["params"], "weight_decay": DECAY if g["decay"] else 0.0} for g in adapter.optimizer_groups()]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    for _ in range(steps):
        optimizer.step()


def update_of(host: Host) -> tuple[str, Update]:
    """The update of the adapter's site in the middle."""
    adapter = host.adapter("a")
    names = list(adapter.layout.sites)
    return names[len(names) // 2], adapter.update(names[len(names) // 2], host.backbone.weight(names[len(names) // 2]))


def updates_of(host: Host) -> list[Update]:
    adapter = host.adapter("a")
    return [adapter.update(name, host.backbone.weight(name)) for name in adapter.layout.sites]


# -- weight decay ------------------------------------------------------------------------------------------------------


@every_method
def test_decay_without_a_gradient_leaves_what_is_excluded_and_shrinks_the_rest(case: Case) -> None:
    adapter = attached(case).adapter("a")
    before = adapter.flat.clone()
    decayed(adapter, 3)
    for group in adapter.layout.groups:
        found, was = adapter.flat[group.start : group.stop], before[group.start : group.stop]
        if group.decay:
            torch.testing.assert_close(found, was * (1 - LR * DECAY) ** 3)
        else:
            assert torch.equal(found, was)


@every_method
def test_decay_without_a_gradient_keeps_the_function_or_ends_at_the_base(case: Case) -> None:
    """A method whose tensors are all excluded stays where it is. What is not excluded may only ever fall back to where
    the others were at the start: the base, or at worst the initial function.
    """
    host = attached(case, move=0.0)
    adapter, given = host.adapter("a"), inputs(host)
    start = output(host, given).detach()
    decayed(adapter, 100)  # the factor is 0.75¹⁰⁰
    close(output(host, given).detach(), start, 1e-11)
    if not any(group.decay for group in adapter.layout.groups):
        adapter.flat.add_(0.1)
        moved = output(host, given).detach()
        decayed(adapter, 100)
        assert torch.equal(output(host, given).detach(), moved)


def test_a_moved_lora_decays_to_the_base() -> None:
    host = attached(Case("gpt2", "lora"))
    given = inputs(host)
    y = output(host, given).detach()
    with host.disabled():
        base = output(host, given)
    assert not torch.allclose(y, base)
    decayed(host.adapter("a"), 200)
    close(output(host, given).detach(), base, 1e-12)


# -- dropout -----------------------------------------------------------------------------------------------------------


@every_method
def test_a_method_whose_factors_carry_a_part_of_the_function_has_no_dropout(case: Case) -> None:
    """Dropout acts on the whole low-rank path, so that path has to be nothing where nothing was learnt: at the start,
    and with every trained tensor at zero. PiSSA, MiLoRA and LoftQ fail the one or the other and have no such field.
    """
    host = attached(case, move=0.0)
    carries = any(_low_rank(update) for update in updates_of(host))
    host.adapter("a").flat.zero_()
    carries = carries or any(_low_rank(update) for update in updates_of(host))
    if carries:
        assert "dropout" not in type(case.make()).model_fields


def _low_rank(update: Update) -> bool:
    """Whether the low-rank path changes the weight by more than rounding."""
    if not isinstance(update, LinearUpdate) or not update.factors:
        return False
    change = torch.stack([factor.dense().detach() for factor in update.factors]).sum(0)
    return float(change.abs().max()) > 1e-9


@every_method
def test_dropout_at_the_start_drops_nothing_of_the_base(case: Case) -> None:
    if "dropout" not in METHODS[case.method].model_fields or METHODS[case.method].identity_at_init == "none":
        return
    settings = {**dict(case.settings), "dropout": 0.5}
    if dict(case.settings).get("form") == "bat":
        return  # has no path that could drop, and refuses the setting
    host = attached(Case(case.family, case.method, tuple(settings.items())), move=0.0)
    given = inputs(host)
    base = output(host, given).detach()
    host.train()
    close(output(host, given).detach(), base, 1e-12)


@pytest.mark.parametrize("name", ["pissa", "milora"])
def test_a_counter_term_does_carry_a_part_of_the_base(name: str) -> None:
    """The test above has teeth: at zero the low-rank path of these takes directions out of the base."""
    host = hosted(linear(matrix(8, 6)), get_method(name)(rank=2))
    host.adapter("a").flat.zero_()
    assert _low_rank(update_of(host)[1])


# -- dtype -------------------------------------------------------------------------------------------------------------

SMALL = 1 + 2.0**-10
"""A step that bfloat16, with its 8 bits, rounds away."""


def parts(value: Any) -> list[Tensor]:
    """Every tensor of an update."""
    if isinstance(value, Tensor):
        return [value.detach()]
    if isinstance(value, tuple):
        return [t for item in value for t in parts(item)]
    return [t for f in fields(value) for t in parts(getattr(value, f.name))] if is_dataclass(value) else []


@every_method
def test_a_half_precision_base_gets_float32_values_and_no_small_step_is_lost(case: Case) -> None:
    host = attached(case, dtype=torch.bfloat16)
    adapter = host.adapter("a")
    assert adapter.flat.dtype == torch.float32
    adapter.flat[adapter.flat == 0] = 0.1
    before = {(site, param): t.detach().clone() for site, param, t in adapter.named_tensors(trainable_only=True)}
    names = [name for name, owned in adapter.layout.places.items() if name]
    name = names[len(names) // 2] if names else next(iter(adapter.layout.sites))
    shared = [(site, param) for site, param in before if site in ("", name)]
    for site, param in shared:
        was = before[site, param]
        lowered = [t.clone() for t in parts(adapter.update(name, host.backbone.weight(name)))]
        assert {t.dtype for t in lowered if t.is_floating_point()} == {torch.float32}, f"{site} {param}"
        adapter.set(site, param, was * SMALL)
        now = adapter.tensors(site)[param].detach()
        assert not (now == was).any()
        assert torch.equal((was.bfloat16() * SMALL).bfloat16(), was.bfloat16())  # as a bfloat16 master would have it
        moved = parts(adapter.update(name, host.backbone.weight(name)))
        assert any(not torch.equal(a, b) for a, b in zip(lowered, moved, strict=True)), f"{site} {param}"
        adapter.set(site, param, was)
