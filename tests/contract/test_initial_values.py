"""What every method's initial values promise."""

from __future__ import annotations

import pytest
import torch

from lorica.methods import all_methods, get_method
from tests.contract.cases import (
    METHODS,
    Case,
    add,
    attached,
    backbone,
    close,
    every,
    every_kind,
    every_setting,
    every_variant,
    inputs,
    output,
    places,
    small,
)


@every_variant
def test_at_step_0_the_output_is_the_base_output_as_far_as_the_method_declares(case: Case) -> None:
    host = attached(case, move=0.0)
    given = inputs(host)
    y = output(host, given)
    with host.disabled():
        base = output(host, given)
    declared = METHODS[case.method].identity_at_init
    if declared == "bitwise":
        assert torch.equal(y, base)
    elif declared == "rounding":
        close(y, base, 1e-12)
    else:
        assert declared == "none"
        assert (y - base).abs().max() > 1e-6


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_bitwise_identity_is_bitwise_in_every_dtype(case: Case, dtype: torch.dtype) -> None:
    host = attached(case, dtype=dtype, move=0.0)
    given = inputs(host)
    y = output(host, given)
    with host.disabled():
        base = output(host, given)
    declared = METHODS[case.method].identity_at_init
    assert y.dtype == base.dtype == dtype
    if declared == "bitwise":
        assert torch.equal(y, base)
    elif declared == "rounding":
        close(y.float(), base.float(), 1e-5 if dtype == torch.float32 else 5e-2)


@every_setting
def test_the_same_seed_gives_the_same_values_and_leaves_the_global_random_state_alone(case: Case) -> None:
    state = torch.get_rng_state()
    one, two = attached(case, seed=3, move=0.0), attached(case, seed=3, move=0.0)
    assert torch.equal(one.adapter("a").flat, two.adapter("a").flat)
    assert torch.equal(torch.get_rng_state(), state)


@every
def test_a_sites_initial_values_do_not_depend_on_the_other_sites(case: Case) -> None:
    host, method = attached(case, seed=3, move=0.0), case.make()
    if type(method).sites_are_coupled:
        return  # declared: what is shared between sites depends on which they are
    names = places(host.backbone, method)
    alone = host.add("alone", method, names[len(names) // 2], seed=3, dtype=torch.float64)
    for site, param, tensor in alone.named_tensors():
        assert torch.equal(tensor, host.adapter("a").tensors(site)[param])


@every_setting
def test_the_parameter_count_is_the_sum_over_declared_trainable_shapes(case: Case) -> None:
    adapter = attached(case).adapter("a")
    declared = sum(
        torch.Size(spec.shape).numel()
        for owned in adapter.layout.specs.values()
        for spec in owned.values()
        if spec.trainable
    )
    assert adapter.layout.trainable_count() == declared == adapter.flat.numel()
    assert sum(p.numel() for p in adapter.parameters()) == declared > 0
    assert adapter.layout.frozen_count() == sum(
        tensor.numel() for site, param, tensor in adapter.named_tensors() if not tensor.requires_grad
    )


@every_setting
def test_what_weight_decay_acts_on_decays_towards_the_base(case: Case) -> None:
    host = attached(case, move=0.0)
    adapter, given = host.adapter("a"), inputs(host)
    y = output(host, given)
    if not any(group.decay for group in adapter.layout.groups):
        return  # nothing decays, so nothing can drift
    for group in adapter.layout.groups:
        if group.decay:
            adapter.flat[group.start : group.stop] = 0.0
    assert METHODS[case.method].identity_at_init != "none"
    close(output(host, given), y, 1e-12)


@every_setting
def test_weight_decay_with_zero_gradient_leaves_excluded_tensors_bit_for_bit(case: Case) -> None:
    adapter = attached(case).adapter("a")
    before = adapter.flat.clone()
    groups = [{"params": g["params"], "weight_decay": 0.5 if g["decay"] else 0.0} for g in adapter.optimizer_groups()]
    torch.optim.AdamW(groups, lr=0.1).step()
    for group in adapter.layout.groups:
        same = torch.equal(adapter.flat[group.start : group.stop], before[group.start : group.stop])
        assert same is not group.decay


@pytest.mark.parametrize("name", list(all_methods()))
def test_a_method_declares_itself(name: str) -> None:
    cls = get_method(name)
    assert cls.name == name
    assert cls.summary and not cls.summary.endswith(".")
    assert cls.paper.arxiv and cls.paper.title and cls.paper.venue
    assert cls.kinds and cls.default_targets
    assert cls.identity_at_init in ("bitwise", "rounding", "none")
    assert cls.__doc__ and cls.paper.arxiv in cls.__doc__
    for field, info in cls.model_fields.items():
        assert info.description, f"{name}.{field} has no description"
        assert not info.is_required(), f"{name}.{field} has no default"


@pytest.mark.parametrize("name", list(all_methods()))
def test_default_targets_select_sites_that_the_method_fits(name: str) -> None:
    base = backbone("gpt2")  # the one family with every kind that a default names
    method = small(name)
    host = attached(Case("gpt2", name))
    adapter = host.add("default", method)
    assert adapter.layout.sites
    assert set(adapter.layout.sites) <= set(places(base, method, head=False))


@every_kind
def test_adding_an_adapter_leaves_those_there_as_they_are(case: Case) -> None:
    host = attached(case)
    given = inputs(host)
    y, flat = output(host, given), host.adapter("a").flat.clone()
    add(host, "b", case.make(), seed=9)
    assert torch.equal(output(host, given), y)
    assert torch.equal(host.adapter("a").flat, flat)
