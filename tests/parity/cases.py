"""Which adapters PEFT can hold: every registered method on every family, at the sites where PEFT has the maths.

In: the registry and the families of the contract. Out: cases, hosts with a moved adapter, tensors under PEFT's names.
A method file that is added is covered without an edit here. Refuses to know what is asserted.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.layout import Layout
from lorica.adapters.peft_format import encode, why_not
from lorica.adapters.peft_keys import OWN
from lorica.engine.host import Host
from lorica.methods import Method, all_methods
from lorica.models import Backbone
from tests.contract.cases import CASES, MORE, Case, backbone, known, places
from tests.parity.both import ours

REGISTERED = [case for case in CASES if case.method in all_methods()]
SETTINGS = [case for case in MORE if case.method in all_methods()]
NAMED = [name for name, cls in all_methods().items() if cls.peft is not None]
"""Methods that say how PEFT names them."""


def slowly(cases: list[Case]) -> list[Any]:
    """The cases as parameters of slow tests: they repeat in other settings or families what quick ones check."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


@cache
def sites(case: Case) -> tuple[str, ...]:
    """Where the method can act and PEFT has the maths; wherever it can, where PEFT has it nowhere."""
    base, method = known(case.family), case.make()
    every = places(base, method)
    if not every or _held(base, method, every):
        return every
    fit = tuple(name for name in every if _held(base, method, (name,)))
    return fit if fit and _held(base, method, fit) else every


def _held(base: Backbone, method: Method, names: tuple[str, ...]) -> bool:
    layout = Layout(method, {name: (base.sites[name], method) for name in names})
    return why_not(Adapter("a", layout), base) is None


@cache
def in_pefts_words(case: Case) -> bool:
    """Whether PEFT can hold the adapter at `sites(case)`."""
    return _held(known(case.family), case.make(), sites(case))


def held(cases: list[Case]) -> list[Case]:
    """The cases that PEFT can hold."""
    return [case for case in cases if in_pefts_words(case)]


def fresh(case: Case, dtype: torch.dtype = torch.float32) -> Backbone:
    """A backbone of the case's family that nobody else has."""
    return backbone(case.family, dtype)


def made(case: Case, dtype: torch.dtype = torch.float32) -> Host:
    """A host with one active adapter `a`, moved off its initial values."""
    return ours(fresh(case, dtype), case.make(), sites(case))


def our_tensors(adapter: Adapter, base: Backbone, row: Tensor) -> dict[str, Tensor]:
    """A row of the adapter's size (its values, their gradients) under PEFT's names, without what is added to it."""
    moved, zero = copy.deepcopy(adapter), copy.deepcopy(adapter)
    moved.flat, zero.flat = row.clone(), torch.zeros_like(row)
    offsets = encode(zero, base)[0]
    return {key: t - offsets[key] for key, t in encode(moved, base)[0].items() if not key.startswith(OWN)}


def their_tensors(model: Any, gradients: bool) -> dict[str, Tensor]:
    """What a PEFT model trains, or the gradients of that, under the names of its files."""
    if model.active_peft_config.is_prompt_learning:
        table = model.prompt_encoder["default"].embedding.weight
        return {"prompt_embeddings": (table.grad if gradients else table.detach()).clone()}
    found = {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = (parameter.grad if gradients else parameter.detach()).clone()
    return dict(peft.get_peft_model_state_dict(model, state_dict=found, save_embedding_layers=False))
