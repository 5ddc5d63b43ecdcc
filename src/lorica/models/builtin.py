"""Names that need no download: the nano model inside the package, and one tiny random model for each family.

In: nothing. Out: names with descriptions. Refuses to know torch and transformers, so that a listing is instant.
"""

from __future__ import annotations

FAMILIES: dict[str, str] = {
    "llama": "Llama: grouped-query attention, RMSNorm, untied head",
    "qwen3": "Qwen3: q/k norms, grouped-query attention, tied head",
    "qwen3-moe": "Qwen3-MoE: four fused experts, two for each token",
    "gemma": "Gemma: scaled embedding, (1 + w) norms, tied head",
    "gpt2": "GPT-2: Conv1D weights, learned positions, tied head",
    "bert": "BERT encoder with a masked-language-model head",
    "vit": "ViT image classifier: 32×32 pixels, patches of 8",
    "mlp": "a plain torch module: embedding, layer norm, two linears",
    "conv": "a plain torch module: Conv1d and Conv2d with stride, padding, dilation and groups",
}

BUILTIN: dict[str, str] = {
    "nano": "the trained English model inside the package (Qwen3 architecture, own tokenizer)",
    **{f"tiny-{family}": f"random weights, for tests; {text}" for family, text in FAMILIES.items()},
}
