"""One model in two libraries: an adapter moves between Lorica and PEFT as a folder, and the logits are compared.

In: a method, a family, and a PEFT config or a target. Out: logits of both. Refuses to know what is asserted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from lorica.adapters.adapter import Adapter
from lorica.engine.host import Host, TargetSpec
from lorica.methods import make_method
from lorica.models import Backbone, tiny, wrap
from lorica.models.factory import example_inputs

TOLERANCE = 1e-5
"""Largest difference of float32 logits, relative to the largest logit."""


def close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal up to rounding."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))


def logits(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


def perturb(tensors: Sequence[Tensor], seed: int = 3, size: float = 0.1) -> None:
    """Move tensors off their initial values, so that every one of them is seen."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor += size * torch.randn(tensor.shape, generator=rng).to(tensor)


def ours(
    base: Backbone, name: str, targets: TargetSpec = None, *, seed: int = 0, **settings: Any
) -> tuple[Host, Adapter]:
    """A host with one active, perturbed adapter."""
    host = Host(base)
    adapter = host.add("a", make_method(name, **settings), targets, seed=seed)
    perturb([adapter.flat])
    host.activate("a")
    return host, adapter


def in_peft(module: nn.Module, folder: Path) -> nn.Module:
    """A fresh copy of the module with the folder's adapter, loaded by PEFT."""
    return peft.PeftModel.from_pretrained(module, str(folder)).eval()


def from_ours(
    name: str,
    targets: TargetSpec,
    folder: Path,
    *,
    family: str = "llama",
    make: Callable[[], Backbone] | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """Logits of an adapter of ours, and of PEFT that loaded its folder. They differ from the base's."""
    make = make or (lambda: tiny(family))
    host, _ = ours(make(), name, targets, **settings)
    given = example_inputs(host.backbone)
    with torch.no_grad():
        y = logits(host(**given))
        with host.disabled():
            assert (logits(host(**given)) - y).abs().max() > 1e-3
        theirs = in_peft(make().module, host.save(folder))
        return y, logits(theirs(**given))


def peft_adapter(
    config: Any, folder: Path, *, family: str = "llama", make: Callable[[], Backbone] | None = None, seed: int = 3
) -> tuple[Tensor, nn.Module]:
    """Logits of a perturbed PEFT adapter that was saved to `folder`, and the PEFT model."""
    base = make() if make else tiny(family)
    torch.manual_seed(seed)
    model = peft.get_peft_model(base.module, copy.deepcopy(config)).eval()
    perturb([p for p in model.parameters() if p.requires_grad], seed)
    model.save_pretrained(str(folder))
    with torch.no_grad():
        return logits(model(**example_inputs(base))), model


def from_peft(
    config: Any, folder: Path, *, family: str = "llama", make: Callable[[], Backbone] | None = None
) -> tuple[Tensor, Tensor, Adapter]:
    """Logits of a PEFT adapter loaded by us, those of PEFT, and the adapter. They differ from the base's."""
    y, _ = peft_adapter(config, folder, family=family, make=make)
    host = Host(make() if make else tiny(family))
    given = example_inputs(host.backbone)
    with torch.no_grad():
        plain = logits(host(**given))
        adapter = host.load(folder, "theirs")
        host.activate("theirs")
        found = logits(host(**given))
    assert (found - plain).abs().max() > 1e-3
    return found, y, adapter


def module_backbone(module: nn.Module) -> Backbone:
    return wrap(module, name="a plain module")
