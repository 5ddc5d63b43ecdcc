"""The parts of a causal language model: trunk, head, and what it does to the logits.

In: a transformers model. Out: the parts, so that a loss can be computed without materialising all logits.
Families of `KNOWN` are covered by tests; any other is probed with one token, and without proof it has no parts.
Refuses to know losses and sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorica.models.sites import output_embedding

KNOWN = frozenset({"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "gpt2"})

SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What configs call the bound of `cap · tanh(logits / cap)`; one token's small logits would not show a cap."""


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """`logits = transform(head(trunk(ids)[0]))`; all three None where the model computes them in a way of its own."""

    trunk: nn.Module | None
    head: nn.Linear | None
    transform: Callable[[Tensor], Tensor] | None


def language_model(module: nn.Module) -> LanguageModel | None:
    """The parts of a causal language model, or None for every other module."""
    config = getattr(module, "config", None)
    if config is None or not _is_causal(module, config):
        return None
    trunk, head = getattr(module, "base_model", None), output_embedding(module)
    if trunk is None or trunk is module or head is None:
        return LanguageModel(None, None, None)
    parts = LanguageModel(trunk, head, _transform(config))
    if config.model_type in KNOWN or _holds(module, parts):
        return parts
    return LanguageModel(None, None, None)


def _is_causal(module: nn.Module, config: Any) -> bool:
    generates = getattr(module, "can_generate", None)
    if generates is None or not generates() or getattr(config, "is_encoder_decoder", False):
        return False
    # BERT-type classes with a decoder mode say in their config whether it is on; decoders have no such field
    return bool(getattr(config, "is_decoder", True))


def _transform(config: Any) -> Callable[[Tensor], Tensor] | None:
    caps = (getattr(config, name, None) for name in SOFT_CAPS)
    cap = next((cap for cap in caps if cap is not None), None)
    if cap is not None:
        return lambda logits: torch.tanh(logits / cap) * cap
    divisor, factor = getattr(config, "logits_scaling", None), getattr(config, "logit_scale", None)
    if divisor is not None:
        return lambda logits: logits / divisor
    return None if factor is None else lambda logits: logits * factor


def _holds(module: Any, parts: LanguageModel) -> bool:
    """Whether the parts give the model's own logits, on one token."""
    assert parts.trunk is not None
    assert parts.head is not None
    ids = torch.zeros(1, 1, dtype=torch.long, device=parts.head.weight.device)
    if ids.device.type == "meta":
        return False
    try:
        with torch.no_grad():
            wanted = module(input_ids=ids, use_cache=False).logits
            logits = parts.head(parts.trunk(input_ids=ids, use_cache=False)[0])
        logits = logits if parts.transform is None else parts.transform(logits)
    except Exception:  # a model of an unknown family may want other inputs: then nothing is proved
        return False
    if logits.shape != wanted.shape:
        return False
    return bool(torch.allclose(logits.float(), wanted.float(), rtol=1e-3, atol=1e-5))
