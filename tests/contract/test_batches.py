"""Rows of one batch do not see each other's adapters: every mix equals its rows alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lorica.engine.host import Host
from tests.contract.cases import (
    CASES,
    DEVICE,
    METHODS,
    Case,
    add,
    attached,
    backbone,
    close,
    every_family,
    every_kind,
    inputs,
    logits,
    loss,
    output,
    perturb,
    small,
    whole_families,
)


def crowd(family: str) -> tuple[Host, list[str | list[str] | None]]:
    """One adapter of every method that the family has sites for, a LoRA of another rank, and rows for all of them."""
    host = Host(backbone(family))
    for index, name in enumerate(METHODS):
        if Case(family, name) in CASES:
            add(host, name, small(name), seed=index)
    add(host, "tall", small("lora", rank=4), seed=40)
    add(host, "late", small("lora"), seed=41)  # in no row
    names = [name for name in host.adapters if name not in ("late", "prompt")]
    rows: list[str | list[str] | None] = [*names[::-1], None, *(["prompt"] if "prompt" in host.adapters else [])]
    rows += ["lora", None, "dora", "lora"]  # unsorted, and some adapters twice
    rows.append(["ia3", "lora"])
    if "prompt" in host.adapters:
        rows.append(["prompt", "prefix"])
    return host, rows


def named(entry: str | list[str] | None) -> list[str]:
    return [] if entry is None else [entry] if isinstance(entry, str) else entry


def row_of(given: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {key: value[row : row + 1] for key, value in given.items()}


def run_rows(host: Host, rows: Sequence[str | list[str] | None], given: dict[str, Tensor]) -> Tensor:
    with host.rows(rows):
        y = output(host, given)
        if y.requires_grad:
            loss(y).backward()
    return y.detach()


@every_family
def test_a_mixed_batch_is_its_rows_alone_and_gradients_reach_each_adapter_alone(family: str) -> None:
    host, rows = crowd(family)
    given = inputs(host, rows=len(rows), length=5)
    y = run_rows(host, rows, given)
    grads = {name: adapter.grad.clone() for name, adapter in host.adapters.items()}
    for adapter in host.adapters.values():
        adapter.zero_grad()
    for index, entry in enumerate(rows):
        alone = run_rows(host, [entry], row_of(given, index))
        close(y[index : index + 1], alone, 1e-10)
    for name, adapter in host.adapters.items():
        if name == "late":
            assert not grads[name].any()
        else:
            assert grads[name].any()
            close(grads[name], adapter.grad, 1e-9)


@whole_families
def test_permuting_the_rows_permutes_the_outputs_and_keeps_the_gradients(family: str) -> None:
    host, rows = crowd(family)
    given = inputs(host, rows=len(rows), length=4)
    results = []
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    for index in (torch.arange(len(rows)), order):
        for adapter in host.adapters.values():
            adapter.zero_grad()
        y = run_rows(host, [rows[i] for i in index], {key: value[index] for key, value in given.items()})
        results.append((y, torch.cat([adapter.grad.clone() for adapter in host.adapters.values()])))
    close(results[1][0], results[0][0][order], 1e-11)
    close(results[1][1], results[0][1], 1e-10)


@whole_families
def test_base_rows_of_a_mixed_batch_have_the_base_output(family: str) -> None:
    host, rows = crowd(family)
    given = inputs(host, rows=len(rows), length=5)
    y = run_rows(host, rows, given)
    with host.disabled():
        base = output(host, given)
    for index, entry in enumerate(rows):
        if entry is None:
            close(y[index], base[index], 1e-11)


@whole_families
def test_an_adapter_of_nan_spoils_its_own_rows_alone(family: str) -> None:
    host, rows = crowd(family)
    given = inputs(host, rows=len(rows), length=5)
    expected = run_rows(host, rows, given)
    before = {name: adapter.grad.clone() for name, adapter in host.adapters.items()}
    for adapter in host.adapters.values():
        adapter.zero_grad()
    host.adapter("tall").flat.fill_(float("nan"))
    with host.rows(rows):
        y = output(host, given)
        sick = [i for i, entry in enumerate(rows) if "tall" in named(entry)]
        well = [i for i in range(len(rows)) if i not in sick]
        assert y[sick].isnan().any()
        (loss(y[well]) + loss(y[sick])).backward()
    close(y[well], expected[well], 1e-10)
    for name, adapter in host.adapters.items():
        if name != "tall":
            close(adapter.grad, before[name], 1e-9)


@every_kind
def test_absent_adapters_keep_their_values_gradient_and_optimiser_state(case: Case) -> None:
    host = attached(case)
    present, absent = add(host, "b", small("lora"), seed=3), host.adapter("a")
    optimizer = torch.optim.AdamW(absent.optimizer_groups(), lr=0.1)
    given = inputs(host, rows=3)
    before = absent.flat.clone()
    run_rows(host, ["b", None, "b"], given)
    assert present.grad.any()
    assert torch.equal(absent.flat, before)
    assert not absent.grad.any() and absent.forwards == 0
    assert not optimizer.state


@every_kind
def test_padding_a_smaller_rank_with_zeros_changes_nothing(case: Case) -> None:
    method = case.make()
    host = attached(case)
    site = next(iter(host.adapter("a").layout.sites.values()))
    if "rank" not in type(method).model_fields or not {"A", "B"} <= method.params(site).keys():
        return  # only of factors of its own is a zero row nothing
    small_rank, sites = host.adapter("a"), host.adapter("a").layout.sites
    rank = getattr(method, "rank")  # noqa: B009
    fields = {"rank": rank + 1}
    if "alpha" in type(method).model_fields:
        fields["alpha"] = getattr(method, "alpha") * (rank + 1) / rank  # noqa: B009
    wide = host.add("wide", method.replace(**fields), tuple(sites), dtype=torch.float64)
    for site, param, tensor in list(wide.named_tensors()):
        source = small_rank.tensors(site)[param].detach()
        padded = torch.zeros_like(tensor)
        padded[tuple(slice(0, n) for n in source.shape)] = source
        wide.set(site, param, padded)
    given = inputs(host)
    y = output(host, given)
    host.activate("wide")
    close(output(host, given), y, 1e-12)


@whole_families
def test_a_batch_of_another_number_of_rows_is_refused(family: str) -> None:
    from lorica.core.errors import RouteError

    host, rows = crowd(family)
    given = inputs(host, rows=3)
    with pytest.raises(RouteError, match="3 rows"), host.rows(rows):
        output(host, given)


def _with_dropout() -> list[Case]:
    return [
        c for c in CASES if "dropout" in METHODS[c.method].model_fields and c.family in ("qwen3-moe", "gpt2", "conv")
    ]


@pytest.mark.parametrize("case", _with_dropout(), ids=str)
def test_dropout_masks_do_not_depend_on_who_shares_the_batch(case: Case) -> None:
    host = Host(backbone(case.family))
    add(host, "a", small(case.method, dropout=0.4), seed=1)
    add(host, "b", small("lora", dropout=0.3), seed=2)
    given = inputs(host, rows=5, length=4)
    host.train()
    mixed = run_rows(host, ["b", "a", None, "a", "b"], given)
    grad = host.adapter("a").grad.clone()
    for adapter in host.adapters.values():
        adapter.forwards = 0
        adapter.zero_grad()
    pair = {key: value[[1, 3]] for key, value in given.items()}
    alone = run_rows(host, ["a", "a"], pair)
    close(mixed[[1, 3]], alone, 1e-11)
    close(grad, host.adapter("a").grad, 1e-10)
    assert not torch.allclose(run_rows(host, ["a", "a"], pair), alone), "the next pass draws another mask"


@pytest.mark.parametrize("case", _with_dropout(), ids=str)
def test_dropout_acts_in_training_only(case: Case) -> None:
    host = Host(backbone(case.family))
    dropped = add(host, "a", small(case.method, dropout=0.4), seed=1)
    plain = add(host, "b", small(case.method, dropout=0.0), seed=1)
    assert torch.equal(dropped.flat, plain.flat)
    given = inputs(host)
    host.activate("b")
    y = output(host, given)
    assert torch.equal(output(host.train(), given), y)
    host.activate("a")
    assert torch.equal(output(host.eval(), given), y)
    assert not torch.allclose(output(host.train(), given), y)
    with host.disabled():
        base = output(host, given)
    perturb(dropped, 0.5)
    with host.disabled():
        assert torch.equal(output(host, given), base)


@every_kind
def test_right_padding_with_a_mask_is_the_unpadded_row(case: Case) -> None:
    host = attached(case)
    given = inputs(host, rows=2, length=6)
    if "input_ids" not in given:
        return
    given["attention_mask"] = torch.tensor([[1] * 6, [1] * 4 + [0] * 2], device=DEVICE)
    if case.family == "qwen3-moe" or case.family in ("gpt2", "bert"):
        y = logits(host.model(**given))
        short = {key: value[1:, :4] for key, value in given.items() if key != "attention_mask"}
        close(y[1:, :4], output(host, short), 1e-10)
