"""PEFT's initialisations: those that leave the base alone, and those that edit it, read after PEFT's own conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor

from lorica.core.errors import FormatError
from lorica.methods.lora import LoRA
from lorica.models.factory import example_inputs
from tests.parity.both import OLD_CHECKPOINTING, loaded, lora, moved, of_family, peft_model, reads, run

SECOND = pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA|CorDA|LoRA-GA) changes the base weights:UserWarning")
"""PEFT's conversion loads the initial adapter beside the trained one, and warns of that itself."""
HOOKS = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
"""PEFT reads gradients of LoRA-GA's layers with hooks, and the first one's input has none."""
UNUSED = pytest.mark.filterwarnings("ignore:.corda_config. specified but will be ignored:UserWarning")
"""PEFT's conversion leaves CorDA's config in the folder, and warns of that when it reads it."""
pytestmark = [OLD_CHECKPOINTING, SECOND, HOOKS, UNUSED]

MAKE = of_family("llama")
TWO = ("q_proj", "v_proj")


def batch() -> dict[str, Tensor]:
    return example_inputs(MAKE(), rows=8, length=12)


def corda(config: Any) -> Any:
    """A PEFT model whose base lost the directions that CorDA trains."""
    pytest.importorskip("attr", reason="PEFT's CorDA imports attrs, which PEFT does not depend on")
    from peft.tuners.lora.corda import preprocess_corda

    module = MAKE().module
    with torch.no_grad():
        rows = batch()["input_ids"].split(1)  # its statistics are of one row at a time
        preprocess_corda(module, config, run_model=lambda: [module(input_ids=row) for row in rows])
    return peft.get_peft_model(module, config).eval()


def lora_ga(config: Any) -> Any:
    """A PEFT model whose base lost what LoRA-GA's factors start as."""
    module = MAKE().module.requires_grad_(True)

    def step() -> None:
        module(**batch()).logits.square().mean().backward()

    preprocess_loraga(module, config, step)
    return peft.get_peft_model(module, config).eval()


def started(init: str, **fields: Any) -> Any:
    """A PEFT model at its initial values."""
    if init == "corda":
        return corda(lora(*TWO, init_lora_weights=init, corda_config=CordaConfig(), **fields))
    if init == "lora_ga":
        return lora_ga(lora(*TWO, init_lora_weights=init, lora_ga_config=peft.LoraGAConfig(), **fields))
    torch.manual_seed(3)
    return peft.get_peft_model(MAKE().module, lora(*TWO, init_lora_weights=init, **fields)).eval()


EDITING = ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"]
PATTERNS = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}}


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, PATTERNS], ids=["plain", "rslora", "patterns"])
@pytest.mark.parametrize("init", EDITING)
def test_a_converted_folder_is_a_plain_lora_of_twice_the_rank(
    init: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = started(init, **fields)
    model.save_pretrained(str(tmp_path / "start"))
    y = run(moved(model), MAKE()).detach()
    model.save_pretrained(str(tmp_path / "end"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert json.loads((tmp_path / "end" / "adapter_config.json").read_text())["r"] == 8
    adapter = reads(tmp_path / "end", MAKE, y)
    assert {m.rank for m in adapter.layout.methods.values() if isinstance(m, LoRA)} <= {6, 8}


@pytest.mark.parametrize("init", [init for init in EDITING if init != "pissa"])
def test_a_folder_that_fits_an_edited_base_alone_is_refused_with_the_way_out(init: str, tmp_path: Path) -> None:
    """PEFT's own reading of `pissa_niter_N` and `lora_ga` is wrong (defect 9), and CorDA needs its statistics."""
    moved(started(init)).save_pretrained(str(tmp_path))
    with pytest.raises(FormatError, match=f"{init!r}: its tensors fit a base whose weights were changed") as caught:
        loaded(tmp_path, MAKE)
    assert "path_initial_model_for_weight_conversion" in str(caught.value.hint)


def test_pissa_is_read_without_its_residual_base_and_its_own_start_is_the_base(tmp_path: Path) -> None:
    model = started("pissa")
    model.save_pretrained(str(tmp_path))
    host = loaded(tmp_path, MAKE)
    with torch.no_grad(), host.disabled():
        base = run(host, host.backbone)
    host.activate("theirs")
    with torch.no_grad():
        assert float((run(host, host.backbone) - base).abs().max()) < 1e-5
    assert host.adapter().method.name == "pissa"


@pytest.mark.parametrize("rho", [1.0, 2.0], ids=["equal ranks", "redistributed ranks"])
@pytest.mark.filterwarnings("ignore:lora with eva initialization used with:UserWarning")  # advice about memory
def test_eva_changes_where_factors_start_and_nothing_else(rho: float, tmp_path: Path) -> None:
    config = lora(*TWO, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=rho))
    torch.manual_seed(3)
    model = peft.get_peft_model(MAKE().module, config).eval()
    rows = {**batch(), "attention_mask": torch.ones(8, 12, dtype=torch.long)}
    initialize_lora_eva_weights(model, [rows] * 4, show_progress_bar=False)
    moved(model).save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["eva_config"] and written["init_lora_weights"] == "eva"
    assert bool(written["rank_pattern"]) == (rho > 1)
    reads(tmp_path, MAKE, run(model, MAKE()).detach())


def test_a_config_of_an_init_that_was_not_used_is_without_effect(tmp_path: Path) -> None:
    """PEFT ignores it too, and its converted CorDA folders hold one."""
    model = peft_model(lora(*TWO), MAKE)
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text())
    for field in ("eva_config", "corda_config", "lora_ga_config", "loftq_config"):
        file.write_text(json.dumps({**written, field: {"rho": 2.0}}))
        assert loaded(tmp_path, MAKE).adapter().method.name == "lora"
