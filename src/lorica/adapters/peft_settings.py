"""The settings of PEFT's configs: which Lorica reads, which are without effect, and why others are refused.

In: nothing. Out: tables. Refuses to know what is done with them (`peft_config`).
"""

from __future__ import annotations

PEFT_TYPES = frozenset(
    (
        "LORA",
        "ADALORA",
        "ADAMSS",
        "ADAPTION_PROMPT",
        "BEFT",
        "BOFT",
        "C3A",
        "CARTRIDGE",
        "CPT",
        "DEFT",
        "DELORA",
        "FOURIERFT",
        "FROD",
        "GLORA",
        "GRALORA",
        "HIRA",
        "HRA",
        "IA3",
        "LILY",
        "LN_TUNING",
        "LOHA",
        "LOKR",
        "MISS",
        "OFT",
        "SHIRA",
        "PROMPT_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "OSF",
        "P_TUNING",
        "PEANUT",
        "POLY",
        "PREFIX_TUNING",
        "PSOFT",
        "PVERA",
        "RANDLORA",
        "ROAD",
        "SHADOW",
        "SUPERTUNING",
        "TINYLORA",
        "TRAINABLE_TOKENS",
        "UNILORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
        "XLORA",
    )
)
"""Types of PEFT 0.21.2."""

ANY = frozenset(
    (
        "peft_type",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "fan_in_fan_out",
        "modules_to_save",
        "runtime_config",
        "megatron_core",
        "ensure_weight_tying",
        "init_weights",
    )
)
"""Settings of every type that are read elsewhere or change nothing after training."""
READ: dict[str, frozenset[str]] = {
    "LORA": frozenset(
        (
            "r",
            "lora_alpha",
            "lora_dropout",
            "use_rslora",
            "use_dora",
            "lora_bias",
            "bias",
            "rank_pattern",
            "alpha_pattern",
            "target_parameters",
            "init_lora_weights",
            "qalora_group_size",
            # how factors were initialised: `init_lora_weights` says whether that changed the base
            "loftq_config",
            "eva_config",
            "corda_config",
            "lora_ga_config",
        )
    ),
    "ADALORA": frozenset(
        (
            # without effect: AdaLoRA's rank is init_r, it has one alpha, and it pools no input
            "r",
            "alpha_pattern",
            "qalora_group_size",
            "target_parameters",
            "init_r",
            "target_r",
            "tinit",
            "tfinal",
            "deltaT",
            "beta1",
            "beta2",
            "orth_reg_weight",
            "total_step",
            "rank_pattern",
            "lora_alpha",
            "lora_dropout",
            "bias",
            "init_lora_weights",
        )
    ),
    "VERA": frozenset(
        (
            "r",
            "projection_prng_key",
            "save_projection",
            "vera_dropout",
            "d_initial",
            "bias",
        )
    ),
    "IA3": frozenset(
        (
            "feedforward_modules",
            "init_ia3_weights",
        )
    ),
    "LN_TUNING": frozenset(),
    "GLORA": frozenset(
        (
            "r",
            "config_A_B",
            "config_C",
            "config_D_E",
            "bias",
        )
    ),
    "MISS": frozenset(
        (
            "r",
            "mini_r",
            "miss_dropout",
            "bias",
        )
    ),
    "PROMPT_TUNING": frozenset(
        (
            "num_virtual_tokens",
            "token_dim",
            "num_layers",
            "num_attention_heads",
            "num_transformer_submodules",
            "prompt_tuning_init",
            "prompt_tuning_init_text",
            "tokenizer_name_or_path",
            "tokenizer_kwargs",
        )
    ),
    "PREFIX_TUNING": frozenset(
        (
            "num_virtual_tokens",
            "token_dim",
            "num_layers",
            "num_attention_heads",
            "num_transformer_submodules",
            "encoder_hidden_size",
            "prefix_projection",
        )
    ),
}
WHY: dict[str, str] = {
    "alora_invocation_tokens": "the adapter acts only behind certain tokens (aLoRA)",
    "use_qalora": "the input is pooled before A (QALoRA)",
    "layer_replication": "layers of the base are repeated, and Lorica does not change the base",
    "trainable_token_indices": "rows of the embedding are replaced",
    "use_bdlora": "its factors are block-diagonal (BD-LoRA)",
    "arrow_config": "a router mixes several adapters (Arrow)",
    "kasa_config": "the base weights are truncated by an SVD (KaSA)",
    "velora_config": "the input is compressed (VeLoRA)",
    "monteclora_config": "the factors are sampled (MonteCLoRA)",
}
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
SHAPES: dict[str, tuple[str, ...]] = {
    "a name or a list of names": ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern"),
    "a list of names": ("modules_to_save", "target_parameters"),
    "a number or a list of numbers": ("layers_to_transform",),
    "a number": ("r", "lora_alpha", "num_virtual_tokens"),
    "an object of numbers": ("rank_pattern", "alpha_pattern"),
}
"""What a setting must be, where it is set."""
