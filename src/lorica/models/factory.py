"""Tiny random backbones of every family, for tests and dry runs, and inputs that fit them.

In: a family, a seed, config overrides. Out: a backbone of the real transformers class (or a plain torch module), the
same for the same seed in every process. Norms and biases are moved off 1 and 0, so that nothing is invisible to a
test. Refuses to touch torch's global random state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorica.core.errors import ConfigError, MethodError, MissingError, did_you_mean
from lorica.models.backbone import Backbone
from lorica.models.builtin import FAMILIES
from lorica.models.positions import check_scaled, scale_positions

_DECODER: dict[str, Any] = {
    "vocab_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN: dict[str, Any] = {**_DECODER, "hidden_size": 32, "tie_word_embeddings": True}

RECIPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_DECODER, "hidden_size": 64, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _QWEN),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            **_QWEN,
            "tie_word_embeddings": False,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**_DECODER, "hidden_size": 32, "pad_token_id": 0}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**_DECODER, "hidden_size": 32, "pad_token_id": 0, "sliding_window": 64},
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": 128,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "bert": (
        "BertConfig",
        "BertForMaskedLM",
        {
            "vocab_size": 128,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        }
        | {"max_position_embeddings": 128, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "vit": (
        "ViTConfig",
        "ViTForImageClassification",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32}
        | {"patch_size": 8, "num_labels": 5, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
}
"""Family → config class, model class, fields. `gemma2` (soft-capped logits) is not advertised, but works."""


class TinyMLP(nn.Module):
    """A plain module: `ids [B, T] → logits [B, T, classes]`."""

    def __init__(self, tokens: int = 50, width: int = 16, hidden: int = 24, classes: int = 7) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width, bias=False)
        self.out = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor) -> Tensor:
        x_BTD = self.embed(input_ids)
        x_BTD = x_BTD + self.fc2(torch.tanh(self.fc1(self.norm(x_BTD))))
        logits: Tensor = self.out(x_BTD)
        return logits


def tiny_conv(classes: int = 7) -> nn.Sequential:
    """A plain sequential: `x [B, 4, 24] → [B, classes]` through every convolution geometry."""
    return nn.Sequential(
        nn.Conv1d(4, 8, 3, stride=2, padding=1),
        nn.GroupNorm(2, 8),
        nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=4),
        nn.Tanh(),
        nn.Unflatten(2, (3, 4)),
        nn.Conv2d(8, 12, 3, padding=1, groups=2, padding_mode="circular"),
        nn.Tanh(),
        nn.Conv2d(12, 6, (2, 3), stride=(1, 1), bias=False),
        nn.Flatten(),
        nn.Linear(24, classes),
    )


_PLAIN: dict[str, Callable[..., nn.Module]] = {"mlp": TinyMLP, "conv": tiny_conv}


def make_tiny(
    family: str, *, seed: int = 0, dtype: torch.dtype | None = None, position_scale: float = 1.0, **overrides: Any
) -> Backbone:
    """See `lorica.models.tiny`."""
    if family not in FAMILIES and family not in RECIPES:
        raise MissingError(f"There is no tiny backbone {family!r}.{did_you_mean(family, FAMILIES)}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # plain modules start their biases at random; other devices' stay
        if family in _PLAIN:
            if position_scale != 1:
                raise MethodError(f"{family!r} has no rotary positions, so position_scale cannot stretch them.")
            module = _plain(family, overrides)
        else:
            module = _transformers(family, overrides, position_scale)
    _fill(module, torch.Generator().manual_seed(seed))
    for parameter in module.parameters():
        # not module.to(): that would round the rotary frequencies too, which from_pretrained keeps in float32
        parameter.data = parameter.data.to(dtype or torch.float32)
    return Backbone(module, name=f"tiny-{family}")


def _plain(family: str, overrides: dict[str, Any]) -> nn.Module:
    try:
        return _PLAIN[family](**overrides)
    except TypeError as error:
        raise ConfigError(f"Tiny backbone {family!r} cannot be made: {error}.") from None


def _transformers(family: str, overrides: dict[str, Any], position_scale: float) -> nn.Module:
    import transformers

    config_name, model_name, fields = RECIPES[family]
    config_class = getattr(transformers, config_name)
    known = set(config_class().to_dict()) | set(config_class.attribute_map)
    for key in overrides:
        if key not in known:
            raise ConfigError(f"{config_name} has no field {key!r}.{did_you_mean(key, known)}")
    config = config_class(**{**fields, **overrides})
    if position_scale != 1:
        scale_positions(config, position_scale, f"tiny-{family}")
    model: nn.Module = getattr(transformers, model_name)(config)
    if position_scale != 1:
        check_scaled(model, position_scale, f"tiny-{family}")
    return model


def _fill(module: nn.Module, rng: torch.Generator) -> None:
    """Matrices: N(0, 1/last axis); vectors: what the class starts with, plus 0.1 N(0, 1)."""
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            if parameter.ndim >= 2:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * noise)
        for part in module.modules():
            if isinstance(part, nn.Embedding) and part.padding_idx is not None:
                part.weight[part.padding_idx] = 0.0


def example_inputs(backbone: Backbone, *, rows: int = 2, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Random keyword arguments that `backbone.module(**inputs)` takes: ids [rows, length], or pixels, or a signal."""
    rng = torch.Generator().manual_seed(seed)
    config = getattr(backbone.module, "config", None)
    if isinstance(backbone.module, nn.Sequential):
        return {"input": torch.randn(rows, 4, 24, generator=rng).to(backbone.device, backbone.dtype)}
    if backbone.family == "vit":
        shape = (rows, 3, config.image_size, config.image_size)  # type: ignore[union-attr]
        return {"pixel_values": torch.randn(shape, generator=rng).to(backbone.device, backbone.dtype)}
    tokens = 50 if config is None else config.vocab_size
    return {"input_ids": torch.randint(3, tokens, (rows, length), generator=rng).to(backbone.device)}
