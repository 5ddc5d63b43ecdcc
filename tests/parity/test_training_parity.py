"""Training parity: the same gradients as PEFT for the same values, and the same values after the same steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer
from safetensors.torch import load_file
from torch import Tensor, nn

from lorica.adapters.peft_prompts import TABLE
from lorica.engine.host import Host
from lorica.methods import make_method
from lorica.models import Backbone
from lorica.training.optimizer import AdamWConfig, AdapterOptimizer
from tests.contract.cases import Case, backbone, loss, marked
from tests.parity.both import (
    CONV1D,
    NO_BIAS,
    ODD_NORM,
    OLD_CACHE,
    OLD_CHECKPOINTING,
    REGENERATED,
    TIED,
    UNMATCHED,
    close,
    in_peft,
    loaded,
    lora,
    of_family,
    ours,
    peft_model,
    run,
)
from tests.parity.cases import REGISTERED, fresh, held, made, our_tensors, sites, slowly, their_tensors

pytestmark = [OLD_CHECKPOINTING, OLD_CACHE, CONV1D, TIED, ODD_NORM, NO_BIAS, UNMATCHED, REGENERATED]

FAMILIES = ("llama", "qwen3-moe", "gemma", "gpt2", "bert", "vit", "conv")


def trains_the_same(case: Case) -> bool:
    """Whether the method freezes nothing at a site. PEFT's LORA type trains every factor, so counter-terms (PiSSA) and
    a fixed A (LoRA-FA) move there; they have tests of their own below.
    """
    base, method = backbone(case.family), case.make()
    return all(spec.trainable for name in sites(case) for spec in method.params(base.sites[name]).values())


CASES = [case for case in held(REGISTERED) if case.family in FAMILIES and trains_the_same(case)]
STEPS = ("qwen3-moe", "gpt2", "conv")
"""Fewer families which together have every kind of site."""
MORE = held(
    [
        Case("llama", "miss", (("form", "mini"), ("mini_rank", 4))),
        Case("llama", "miss", (("form", "bat"), ("rank", 4))),
        Case("llama", "lora", (("rslora", True),)),
        Case("gpt2", "lora", (("lora_bias", True),)),
        Case("qwen3-moe", "lora", (("rslora", True),)),
        Case("llama", "dora", (("rslora", True),)),
    ]
)


REST = [*(case for case in CASES if case.family not in STEPS), *MORE]


def pair(case: Case, folder: Path) -> tuple[Host, Any]:
    """One adapter in both libraries, in float64 and ready to be trained."""
    host = made(case, torch.float64)
    module = fresh(case, torch.float64).module
    host.save(folder)
    if case.method not in ("prompt", "prefix"):
        return host, in_peft(module, folder, is_trainable=True)
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode, config.base_model_name_or_path = False, None  # PEFT itself cannot go on training a prompt
    theirs = peft.get_peft_model(module, config).eval()
    theirs.prompt_encoder.double()
    theirs.prompt_encoder["default"].embedding.weight.data = load_file(folder / "adapter_model.safetensors")[TABLE]
    return host, theirs


def backward(model: nn.Module | Host, base: Backbone) -> float:
    value = loss(run(model, base))
    value.backward()
    return float(value.detach())


def same(found: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal names, and values within rounding relative to the largest of each tensor: RMSNorm rounds to float32."""
    assert found.keys() == theirs.keys()
    for key, tensor in theirs.items():
        size = max(1e-3, float(tensor.abs().max()))
        close(found[key] / size, tensor / size, 1e-6)


@pytest.mark.parametrize("case", [*marked(CASES), *MORE], ids=str)
def test_gradients_are_those_of_peft(case: Case, tmp_path: Path) -> None:
    host, theirs = pair(case, tmp_path)
    assert backward(host, host.backbone) == pytest.approx(backward(theirs, host.backbone), rel=1e-6)
    adapter = host.adapter("a")
    gradients = our_tensors(adapter, host.backbone, adapter.collect_grad())
    assert sum(bool(g.any()) for g in gradients.values()) >= len(adapter.layout.groups)
    same(gradients, their_tensors(theirs, gradients=True))


@pytest.mark.parametrize("case", [*(c for c in CASES if c.family in STEPS), *slowly(REST)], ids=str)
def test_three_steps_of_adamw_go_where_pefts_go(case: Case, tmp_path: Path) -> None:
    """ε is large, so that Adam does not magnify rounding where a gradient is nearly zero. Decay pulls a norm to the
    base here and to zero in PEFT, so norms have none.
    """
    host, theirs = pair(case, tmp_path)
    adapter, base = host.adapter("a"), host.backbone
    settings: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.0 if case.method == "norm" else 0.1}
    our_start, their_start = adapter.flat.clone(), their_tensors(theirs, gradients=False)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    pairs = [(torch.optim.AdamW(host.parameters(), **settings), host), (torch.optim.AdamW(trained, **settings), theirs)]
    for _ in range(3):
        losses = []
        for optimizer, model in pairs:
            optimizer.zero_grad()
            losses.append(backward(model, base))
            optimizer.step()
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert float((adapter.flat - our_start).abs().max()) > 1e-3
    start, end = our_tensors(adapter, base, our_start), our_tensors(adapter, base, adapter.flat)
    their_end = their_tensors(theirs, gradients=False)
    same({key: end[key] - start[key] for key in end}, {key: their_end[key] - their_start[key] for key in their_end})


# -- what PEFT starts and we go on with --------------------------------------------------------------------------------


def test_pissa_trains_its_factors_as_pefts_does(tmp_path: Path) -> None:
    make = of_family("gpt2")
    theirs = peft_model(lora("c_attn", "c_fc", init_lora_weights="pissa"), make)
    theirs.save_pretrained(str(tmp_path))
    host = loaded(tmp_path, make)
    assert host.adapter().method.name == "pissa"
    assert backward(host, host.backbone) == pytest.approx(backward(theirs, host.backbone), rel=1e-6)
    gradients = their_tensors(theirs, gradients=True)
    for site in host.adapter().layout.sites:
        for param in ("A", "B"):
            expected = gradients[f"base_model.model.{site}.lora_{param}.weight"]
            size = float(expected.abs().max())
            close(host.adapter().tensors(site)[param].grad / size, expected / size, 1e-4)


@pytest.mark.parametrize("correct", [False, True], ids=["plain", "corrected"])
def test_lora_fa_steps_along_bs_gradient_or_along_what_pefts_optimiser_makes_of_it(
    correct: bool, tmp_path: Path
) -> None:
    """Adam's first moment after one step; PEFT's product with (AAᵀ)⁻¹ is in bfloat16."""
    make = of_family("llama")
    host = ours(make(), make_method("lora_fa", rank=3, alpha=6, correct=correct), "q_proj")
    theirs = in_peft(make().module, host.save(tmp_path), is_trainable=True)
    adapter = host.adapter("a")
    A = {site: adapter.values(site)["A"].clone() for site in adapter.layout.sites}
    assert backward(host, host.backbone) == pytest.approx(backward(theirs, host.backbone), rel=1e-6)
    own = AdapterOptimizer(adapter, AdamWConfig(clip=None))
    own.step()
    optimizer = create_lorafa_optimizer(theirs, r=3, lora_alpha=6, lr=1e-2)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    optimizer.step()
    for site in adapter.layout.sites:
        assert torch.equal(adapter.values(site)["A"], A[site])
        place, module = adapter.layout.places[site]["B"], f"base_model.model.{site}.lora"
        found = own.tensors()["exp_avg"][place.offset : place.offset + place.size].view(place.shape)
        their_gradient = gradients[f"{module}_B.default.weight"]
        assert their_gradient is not None
        expected = optimizer.state[module]["exp_avg_B"] if correct else 0.1 * their_gradient
        size = float(expected.abs().max())
        close(found / size, expected / size, 1e-2 if correct else 1e-5)


EXTRAS: dict[str, tuple[str, Any]] = {
    "biases": ("gpt2", lora("c_attn", bias="all")),
    "a head": ("llama", lora("q_proj", modules_to_save=["lm_head"])),
    "a classifier": ("vit", lora("q_proj", modules_to_save=["classifier"], task_type=None)),
    "both experts": ("qwen3-moe", lora(target_parameters=["experts.gate_up_proj", "experts.down_proj"])),
    "VeRA drawn again": ("llama", peft.VeraConfig(r=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")),
}


@pytest.mark.parametrize("row", EXTRAS)
def test_an_imported_adapter_goes_on_where_peft_would(row: str, tmp_path: Path) -> None:
    """One step of gradient descent on what PEFT saved, biases and whole modules included, gives PEFT's next loss.

    A bias at a LoRA site is `lora_bias` here, whose step is scaled by s² and not by 1, so that row is of other sites.
    """
    family, config = EXTRAS[row]
    make = of_family(family, dtype=torch.float64)
    theirs = peft_model(config, make)
    theirs.save_pretrained(str(tmp_path))
    host = loaded(tmp_path, make)
    base, found = host.backbone, []
    for model, parameters in (
        (host, host.parameters()),
        (theirs, [p for p in theirs.parameters() if p.requires_grad]),
    ):
        if row == "biases":
            parameters = [p for p in parameters if p.shape != (96,)]  # c_attn's own
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        optimizer.zero_grad()
        before = backward(model, base)
        optimizer.step()
        with torch.no_grad():
            found.append((before, float(loss(run(model, base)))))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert abs(found[0][0] - found[0][1]) > 1e-5
