"""Pictures of an inspected adapter are drawn for whatever there is, and for nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorica.adapters.analysis.intruders import Search
from lorica.adapters.analysis.report import inspect_adapter
from lorica.engine.host import Host
from lorica.methods import make_method
from lorica.models import tiny, wrap
from lorica.recipes.inspect_plots import _short, pictures


def filled(host, method, targets=None, name="a"):
    adapter = host.add(name, method, targets)
    adapter.flat.copy_(0.1 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(0)))
    return adapter


@pytest.mark.parametrize(
    ("method", "targets", "names"),
    [
        ("lora", None, {"spectrum", "norms", "intruders"}),
        ("delta", "all", {"spectrum", "norms", "intruders"}),
        ("norm", None, {"norms"}),
        ("prompt", None, set()),
    ],
)
def test_what_there_is_is_drawn(method, targets, names):
    host = Host(tiny("llama"))
    more = {"tokens": 2} if method == "prompt" else {}
    adapter = filled(host, make_method(method, **more), targets)
    drawn = pictures(inspect_adapter(adapter, host.backbone, search=Search(top=3)))
    assert drawn.keys() == names and all(picture.startswith(b"\x89PNG") for picture in drawn.values())


def test_one_site_outside_of_blocks_and_an_adapter_of_nothing_are_drawn_too():
    host = Host(wrap(nn.Sequential(nn.Linear(5, 4))))
    one = filled(host, make_method("lora", rank=1))
    fresh = host.add("fresh", make_method("lora", rank=1))
    drawn = pictures(inspect_adapter(one, host.backbone, [(fresh, host.backbone)], search=Search()))
    assert drawn.keys() == {"spectrum", "norms", "similarity", "intruders"}
    assert pictures(inspect_adapter(fresh, host.backbone)).keys() == {"norms"}


def test_adapters_are_called_by_what_tells_their_paths_apart():
    assert _short(["runs/a/adapter", "runs/b/adapter"]) == ["a", "b"]
    assert _short(["x/one", "y/two"]) == ["one", "two"]
    assert _short(["a/x", "b/x", "b/y"]) == ["1", "2", "3"]
    assert _short(["x", "x (2)"]) == ["x", "x (2)"]
