"""`adapter_config.json`: which settings of PEFT are understood, which are without effect, and which are refused.

In: the JSON object of a PEFT folder. Out: a class of method, and the sites that the file must hold tensors for; an
error for every setting that would change what the adapter computes. Refuses to know tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from lorica.adapters.peft_keys import is_named
from lorica.core.errors import FormatError, MethodError, did_you_mean
from lorica.methods import all_methods
from lorica.methods.base import Method
from lorica.models.backbone import Backbone

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

_ANY = frozenset(
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
_READ: dict[str, frozenset[str]] = {
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
_WHY: dict[str, str] = {
    "alora_invocation_tokens": "the adapter acts only behind certain tokens (aLoRA)",
    "use_qalora": "the input is pooled before A (QALoRA)",
    "layer_replication": "layers of the base are repeated, and Lorica does not change the base",
    "trainable_token_indices": "rows of the embedding are replaced",
    "use_bdlora": "its factors are block-diagonal (BD-LoRA)",
    "arrow_config": "a router mixes several adapters (Arrow)",
    "kasa_config": "the base weights are truncated by an SVD (KaSA)",
    "velora_config": "the input is compressed (VeLoRA)",
    "monteclora_config": "the factors are sampled (MonteCLoRA)",
    "loftq_config": "the base weights are replaced by quantised ones (LoftQ)",
    "corda_config": "the base weights were changed when it was made (CorDA)",
    "lora_ga_config": "the base weights were changed when it was made (LoRA-GA)",
}
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")


def method_class(config: Mapping[str, Any], file: object) -> type[Method]:
    """The method that computes what a PEFT config describes. Raises FormatError, MethodError."""
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise FormatError(f"{file} names no peft_type, so the method is unknown.")
    known = {cls.peft.peft_type: cls for cls in all_methods().values() if cls.peft is not None}
    if kind not in known:
        if kind in PEFT_TYPES:
            raise MethodError(
                f"{file} holds a {kind} adapter; of PEFT's types Lorica reads {', '.join(sorted(known))}."
            )
        raise FormatError(f"{file} names the peft_type {kind!r}, which does not exist.{did_you_mean(kind, PEFT_TYPES)}")
    _refuse_settings(config, kind, file)
    if kind == "LORA":
        return all_methods()[_lora_method(config, file)]
    return known[kind]


def _lora_method(config: Mapping[str, Any], file: object) -> str:
    """`lora`, `dora`, or `pissa` where PEFT took the leading directions out of the base."""
    init = config.get("init_lora_weights", True)
    if init == "pissa":
        if config.get("use_dora") or config.get("lora_bias") or config.get("bias", "none") != "none":
            raise FormatError(
                f"{file} combines init_lora_weights 'pissa' with DoRA or a bias, which Lorica cannot read."
            )
        return "pissa"
    if init not in _PLAIN_INITS:
        raise FormatError(
            f"{file} says init_lora_weights {init!r}: its tensors fit a base whose weights were changed "
            "when it was made.",
            hint="Save it with PEFT's `path_initial_model_for_weight_conversion`; the result is a plain LoRA.",
        )
    return "dora" if config.get("use_dora") else "lora"


def _refuse_settings(config: Mapping[str, Any], kind: str, file: object) -> None:
    """Raises FormatError for the first setting that Lorica would have to ignore."""
    known = _ANY | _READ.get(kind, frozenset())
    for field, value in config.items():
        if field in known or value in (None, False, "", "none") or value == {} or value == []:
            continue
        if kind != "LORA" and field in ("bias",):
            raise FormatError(f"{file} says bias {value!r}, which Lorica reads for LoRA only.")
        if field in _WHY:
            raise FormatError(f"{file} sets {field!r}: {_WHY[field]}, which Lorica does not compute.")
        near = did_you_mean(field, known | _WHY.keys())
        raise FormatError(f"{file} sets {field!r}, which Lorica does not know and so cannot honour.{near}")
    submodules = config.get("num_transformer_submodules")
    if submodules not in (None, 1):
        raise FormatError(f"{file} is for an encoder-decoder ({submodules} submodules), which Lorica does not adapt.")


def pattern_value(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first key that matches, as PEFT reads `rank_pattern` and `alpha_pattern`."""
    for key, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        except re.error as error:
            raise FormatError(f"Pattern {key!r} is not a regular expression: {error}.") from None
    return default


def targeted(config: Mapping[str, Any], backbone: Backbone, kinds: Collection[str]) -> list[str]:
    """Sites that `target_modules`, `exclude_modules` and `layers_to_transform` select, in backbone order."""
    targets, excluded = config.get("target_modules") or [], config.get("exclude_modules") or []
    saved = config.get("modules_to_save") or []
    layers = config.get("layers_to_transform")
    wanted = {layers} if isinstance(layers, int) else set(layers or ())
    found = []
    for site in backbone.sites.values():
        if site.kind not in kinds or site.expert is not None or site.kind in ("input", "attention"):
            continue
        every = targets == "all-linear"
        hit = site.kind == "linear" and not site.head if every else is_named(site.name, targets)
        if not hit or is_named(site.name, excluded) or any(f".{name}." in f".{site.name}." for name in saved):
            continue
        if wanted and _layer(site.name, config.get("layers_pattern")) not in wanted:
            continue
        found.append(site.name)
    return found


def _layer(name: str, patterns: list[str] | str | None) -> int | None:
    """A module's layer, as PEFT counts: the first number inside the path, or the one behind a pattern."""
    given = [patterns] if isinstance(patterns, str) else list(patterns or ())
    tries = [rf".*\.{pattern}\.(\d+)\." for pattern in given] or [r".*?\.[^.]*\.(\d+)\.", r".*?(?:^|\.)(\d+)\."]
    for pattern in tries:
        match = re.match(pattern, name)
        if match:
            return int(match[1])
    return None
