"""Models that bound their logits, by whatever name their config has for the bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from lorica.models import wrap

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("scale", [1.0, 50.0])
@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("Gemma2", {"final_logit_softcapping": 30.0, "num_key_value_heads": 1, "head_dim": 16}),
        ("RecurrentGemma", {"logits_soft_cap": 30.0, "lru_width": 32}),
    ],
)
def test_logits_are_those_of_the_model_however_small_its_first_tokens_are(
    model: str, fields: dict[str, Any], scale: float
) -> None:
    config = getattr(transformers, f"{model}Config")(**SIZES, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = getattr(transformers, f"{model}ForCausalLM")(config).eval()
    with torch.no_grad():
        module.get_output_embeddings().weight.mul_(scale)
        base = wrap(module)
        ids = torch.tensor([[5, 9, 20, 7]])
        assert base.trunk is not None and base.head is not None and base.transforms_logits
        logits = base.logits_transform(base.head(base.trunk(input_ids=ids, use_cache=False)[0]))
        expected = module(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected.abs().max() > 20) == (scale > 1)
