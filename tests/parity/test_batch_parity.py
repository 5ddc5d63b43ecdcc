"""Mixed batches: PEFT's `adapter_names` where PEFT honours it, and one PEFT run a row where it does not (defect 1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorica.adapters.peft_format import why_not
from lorica.engine.host import Host
from lorica.methods import Method, make_method
from lorica.models.factory import example_inputs
from tests.contract.cases import small
from tests.parity.both import (
    CONV1D,
    ODD_NORM,
    OLD_CACHE,
    OLD_CHECKPOINTING,
    TIED,
    UNMATCHED,
    Make,
    close,
    in_peft,
    of_family,
    perturb,
)
from tests.parity.cases import NAMED

pytestmark = [OLD_CHECKPOINTING, OLD_CACHE, CONV1D, TIED, ODD_NORM, UNMATCHED]

ROWS = ["b", None, "a", "a", None, "b", "c"]


def residents(make: Make, methods: dict[str, tuple[Method, Any]], folder: Path) -> Host:
    """A host with adapters off their initial values, each saved to a folder of its name."""
    host = Host(make())
    for seed, (name, (method, targets)) in enumerate(methods.items()):
        perturb([host.add(name, method, targets, seed=seed).flat], seed=seed + 3)
        host.save(folder / name, name)
    return host


@torch.no_grad()
def mixed(host: Host, given: dict[str, Tensor]) -> Tensor:
    with host.rows(ROWS):
        y = host(**given)
    return y if isinstance(y, Tensor) else y.logits


LAYERS: dict[str, tuple[str, Any]] = {
    "linear": ("llama", ["q_proj", "up_proj", "lm_head"]),
    "Conv1D": ("gpt2", ["c_attn", "c_proj"]),
    "embedding": ("llama", ["embed_tokens", "v_proj"]),
    "a scaled embedding": ("gemma", ["embed_tokens", "v_proj"]),
    "an encoder": ("bert", ["query", "dense"]),
    "images": ("vit", ["q_proj", "projection", "classifier"]),
    "convolutions": ("conv", ["0", "7", "9"]),
}


@pytest.mark.parametrize("row", LAYERS)
@torch.no_grad()
def test_a_mixed_batch_is_pefts_for_lora_of_any_rank_and_scale(row: str, tmp_path: Path) -> None:
    family, targets = LAYERS[row]
    make = of_family(family)
    methods = {
        "a": (make_method("lora", rank=4, alpha=6.0), targets),
        "b": (make_method("lora", rank=2, rslora=True), targets),
        "c": (make_method("lora", rank=5, alpha=1.0), targets[:1]),
    }
    host = residents(make, methods, tmp_path)
    given = example_inputs(host.backbone, rows=len(ROWS))
    theirs = in_peft(make().module, tmp_path / "a", adapter_name="a")
    for name in ("b", "c"):
        theirs.load_adapter(str(tmp_path / name), name)
    out = theirs(**given, adapter_names=[name or "__base__" for name in ROWS])
    close(mixed(host, given), out if isinstance(out, Tensor) else out.logits)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_a_mix_of_every_method_is_one_peft_run_a_row(family: str, tmp_path: Path) -> None:
    make = of_family(family)
    host = residents(make, {name: (small(name), None) for name in NAMED}, tmp_path)
    held = [name for name in NAMED if why_not(host.adapter(name), host.backbone) is None]  # of some, PEFT has no Conv1D
    assert len(held) >= len(NAMED) - 2
    owners = [*held, None, *held[::-1]]
    given = example_inputs(host.backbone, rows=len(owners))["input_ids"]
    with host.rows(owners):
        found = host(input_ids=given).logits
    for index, name in enumerate(owners):
        theirs = make().module if name is None else in_peft(make().module, tmp_path / name)
        close(found[index], theirs(input_ids=given[index : index + 1]).logits[0, -given.shape[1] :])


@torch.no_grad()
def test_rows_of_the_base_are_the_base_where_peft_ignores_whose_they_are(tmp_path: Path) -> None:
    """PEFT swallows `adapter_names` for VeRA, IA³ and norms: rows marked `__base__` get the adapter (defect 1)."""
    make = of_family("llama")
    host = residents(make, {name: (small(name), None) for name in ("vera", "ia3", "norm")}, tmp_path)
    given = example_inputs(host.backbone)
    plain = make().module(**given).logits
    for name in host.adapters:
        theirs = in_peft(make().module, tmp_path / name)
        ignored = theirs(**given, adapter_names=["__base__", "default"]).logits
        assert not torch.allclose(ignored[0], plain[0], atol=1e-3)
        with host.rows([None, name]):
            found = host(**given).logits
        close(found[0], plain[0])
        close(found[1], ignored[1])


def test_a_batch_in_training_which_peft_refuses_gives_each_its_own_gradient(tmp_path: Path) -> None:
    """PEFT raises for `adapter_names` in training; ours is compared with PEFT trained on each row alone."""
    make = of_family("gpt2")
    host = residents(make, {n: (make_method("lora", rank=r), "c_attn") for n, r in (("a", 3), ("b", 2))}, tmp_path)
    ids = example_inputs(host.backbone)["input_ids"]
    host.train()
    with host.rows(["b", "a"]):
        host(input_ids=ids).logits.square().mean(dim=(1, 2)).sum().backward()
    for name, row in (("a", 1), ("b", 0)):
        theirs = in_peft(make().module, tmp_path / name, is_trainable=True).train()
        with pytest.raises(ValueError, match="training"):
            theirs(input_ids=ids, adapter_names=["default", "__base__"])
        theirs(input_ids=ids[row : row + 1]).logits.square().mean().backward()
        for key, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                site, _, param = key.removeprefix("base_model.model.").partition(".lora_")
                close(host.adapter(name).tensors(site)[param[0]].grad, parameter.grad)
