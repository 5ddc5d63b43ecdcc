"""A model's modules and parameters are torch's own lists, also after somebody has changed the model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lorica.models.tree import Tree
from tests.tiny import tiny


def same(tree: Tree, module: nn.Module) -> bool:
    modules = [id(part) for part in tree.modules] == [id(part) for part in module.modules()]
    return modules and [id(p) for p in tree.parameters] == [id(p) for p in module.parameters()]


def _replace(module: nn.Module) -> None:
    module[0] = nn.Linear(3, 3)  # type: ignore[index]


def _append(module: nn.Module) -> None:
    module.append(nn.Linear(3, 3))  # type: ignore[operator]


def _remove(module: nn.Module) -> None:
    del module[1]  # type: ignore[attr-defined]


def _deep(module: nn.Module) -> None:
    module[1][0] = nn.Identity()  # type: ignore[index]


def _parameter(module: nn.Module) -> None:
    module[0].weight = nn.Parameter(torch.zeros(3, 3))  # type: ignore[index]


def _register(module: nn.Module) -> None:
    module[1].register_parameter("more", nn.Parameter(torch.zeros(1)))  # type: ignore[index]


def _leave(module: nn.Module) -> None:
    pass


@pytest.mark.parametrize("change", [_replace, _append, _remove, _deep, _parameter, _register, _leave])
def test_a_change_anywhere_is_seen(change: object) -> None:
    shared = nn.Linear(3, 3)
    module = nn.Sequential(nn.Linear(3, 3), nn.Sequential(shared, nn.LayerNorm(3)), shared)
    tree = Tree(module)
    assert same(tree, module)
    change(module)  # type: ignore[operator]
    assert same(tree, module)


def test_a_copied_backbone_has_a_tree_of_its_own() -> None:
    base = tiny("llama")
    other = copy.deepcopy(base)
    assert same(other.tree, other.module)
    assert not {id(part) for part in other.tree.modules} & {id(part) for part in base.tree.modules}
