"""The model that benchmarks run on, and HF PEFT over it: random weights of Qwen3's shape.

In: a width, a dtype. Out: a frozen transformers model, further instances over the same weights, PEFT's training step.
Refuses to know what is timed.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.methods import all_methods

RANK = 16
PLANNED = 1000
"""Steps of a run, for methods whose schedule asks."""
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


REAL = {
    "qwen3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "tie_word_embeddings": False,
    }
}
"""Shapes of published models, by a name."""


def qwen3(
    width: int = 1024,
    layers: int = 8,
    vocabulary: int = 32_000,
    dtype: torch.dtype = torch.float32,
    shape: str = "",
) -> nn.Module:
    """A random Qwen3 with tied embeddings; of width 1024 and 8 layers it has 133 million weights. `shape` names one of
    `REAL` instead.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 128,
        "head_dim": 64,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }
    config = Qwen3Config(**(REAL[shape] if shape else sizes), max_position_embeddings=32_768)
    torch.manual_seed(0)
    with torch.device(device()):  # eight billion weights are drawn where they will be
        model: nn.Module = Qwen3ForCausalLM._from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def another(module: nn.Module) -> nn.Module:
    """Another instance over the same weights. Hooks are copied too, so copy before anything is attached."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": RANK, "alpha": 2 * RANK}),
    "dora": ("dora", {"rank": RANK, "alpha": 2 * RANK}),
    "vera": ("vera", {"rank": RANK}),
    "vera-256": ("vera", {"rank": 256}),
}
"""What is trained, by a name: the method and its settings. VeRA's usual rank is 256."""


def variant_of(name: str) -> tuple[str, dict[str, Any]]:
    """The method and the settings of one of `VARIANTS`; `default:NAME` is a registered method with its defaults, told
    how many steps are planned where it asks, and `rank-16:NAME` one of this rank where it has any.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    how, _, method = name.partition(":")
    fields = all_methods()[method].model_fields
    settings: dict[str, Any] = {"steps": PLANNED} if "steps" in fields else {}
    if how.startswith("rank-") and "rank" in fields:
        settings["rank"] = int(how.removeprefix("rank-"))
    return method, settings


class PeftTrainer:
    """PEFT as its documentation shows it: its defaults, the model's own loss, torch's fused AdamW.

    `variant` names one of `VARIANTS`; with `folder`, it is the adapter that was saved there.
    """

    def __init__(self, base: nn.Module, variant: str = "lora", folder: Path | None = None) -> None:
        import peft

        if folder is None:
            self.model: Any = peft.get_peft_model(another(base), self._config(variant))
        elif (config := peft.PeftConfig.from_pretrained(folder)).is_prompt_learning:  # PEFT loads these only to serve
            config.inference_mode = False
            self.model = peft.get_peft_model(another(base), config)
        else:
            self.model = peft.PeftModel.from_pretrained(another(base), folder, is_trainable=True)
        self.model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)

    @staticmethod
    def _config(variant: str) -> Any:
        import peft

        method, settings = VARIANTS[variant]
        rank = settings["rank"]
        if method == "vera":
            return peft.VeraConfig(r=rank, target_modules=LINEARS)
        return peft.LoraConfig(r=rank, lora_alpha=settings["alpha"], target_modules=LINEARS, use_dora=method == "dora")

    def loss(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        labels_BT = ids_BT if mask_BT is None else ids_BT.masked_fill(mask_BT == 0, -100)
        loss: Tensor = self.model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT, use_cache=False).loss
        return loss

    def step(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> float:
        loss = self.loss(ids_BT, mask_BT)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
