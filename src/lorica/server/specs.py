"""What a client's request for a run means: a method, its settings, its targets and a seed.

In: `create_model`'s fields, where `user_metadata` may name any registered method. Out: a run's specification for the
engine, which knows the methods and judges the settings. Refuses to know methods by their fields.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from lorica.client.words import RESERVED
from lorica.core.errors import ConfigError, DataError, TargetError
from lorica.server.bodies import CreateModelBody, LoraConfigBody

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
HEAD = ("lm_head",)
DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "smollm3", "phi3")
EXPERTS = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe")
OPTIMIZERS = ("adamw",)
ALPHA = 32
"""The alpha of every LoRA that a client asks for without naming one, as on the hosted service."""


def spec_of(body: CreateModelBody, family: str) -> dict[str, Any]:
    """The fields of `RunSpec`. Raises ConfigError, TargetError for what no engine has to be asked about."""
    lora = body.lora_config or LoraConfigBody(rank=32)
    told = dict(body.user_metadata or {})
    if body.optimizer_config.type not in OPTIMIZERS:
        raise ConfigError(f"Optimizer {body.optimizer_config.type!r} is not supported here; 'adamw' is.")
    if lora.rank < 1:
        raise ConfigError(f"lora_config.rank is {lora.rank}: a positive number is right.")
    alpha = _number(told.get("alpha", told.get("lora_alpha")))
    seed = secrets.randbits(31) if lora.seed is None else lora.seed
    method = str(told["method"]) if "method" in told else "lora"
    config: dict[str, Any] = {"rank": lora.rank}
    if "method" in told:
        config |= _mapping(told["config"], "config") if "config" in told else _flat(told)
    if alpha is not None:
        config["alpha"] = alpha
    elif "method" not in told:
        config["alpha"] = ALPHA
    return {"method": method, "config": config, "targets": _targets(told, lora, family), "seed": seed}


def flags_of(body: CreateModelBody) -> dict[str, bool]:
    """Which parts of the model a client asked to train."""
    lora = body.lora_config or LoraConfigBody(rank=32)
    return {"train_unembed": lora.train_unembed, "train_mlp": lora.train_mlp, "train_attn": lora.train_attn}


def without_rank(spec: Mapping[str, Any], code: str, message: str) -> dict[str, Any] | None:
    """The specification for a method without a rank (the SDK always sends one); None where that was not the trouble."""
    if spec["method"] == "lora" or code != "config" or "'rank'" not in message or "no setting" not in message:
        return None
    return {**spec, "config": {key: value for key, value in spec["config"].items() if key != "rank"}}


def _targets(told: Mapping[str, Any], lora: LoraConfigBody, family: str) -> dict[str, Any]:
    given = told.get("targets")
    if given is not None:
        given = _maybe_json(given)
        if isinstance(given, Mapping):
            return dict(given)
        return {"include": [given] if isinstance(given, str) else list(given)}
    if not (lora.train_attn or lora.train_mlp or lora.train_unembed):
        raise TargetError("train_attn, train_mlp and train_unembed are all false, so nothing would be trained.")
    everything = lora.train_attn and lora.train_mlp and lora.train_unembed
    if "method" in told and everything:
        return {}
    if family in DENSE or family in EXPERTS:
        mlp = MLP if family in DENSE else ("all-expert",)
        chosen = (*(ATTENTION if lora.train_attn else ()), *(mlp if lora.train_mlp else ()))
        return {"include": [*chosen, *(HEAD if lora.train_unembed else ())]}
    if lora.train_attn != lora.train_mlp:
        raise TargetError(
            f"Which modules of a {family!r} model are attention is not known here; name them: "
            'user_metadata={"targets": ["c_attn"]}.'
        )
    return {"include": [*(("all-linear",) if lora.train_attn else ()), *(HEAD if lora.train_unembed else ())]}


def _flat(told: Mapping[str, Any]) -> dict[str, Any]:
    """Settings written beside `method`: numbers, truth values and lists, also as their JSON text. Other text is
    metadata of the user's own.
    """
    found = {}
    for key, value in told.items():
        if key in RESERVED:
            continue
        value = _maybe_json(value)
        if not isinstance(value, str | Mapping):
            found[key] = value
    return found


def _maybe_json(value: Any) -> Any:
    """What a text holds as JSON, where it does: the SDK's metadata are texts."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _mapping(value: Any, where: str) -> dict[str, Any]:
    value = _maybe_json(value)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise DataError(f"user_metadata[{where!r}] is {value!r}: an object of settings is right.")
    return dict(value)


def _number(value: Any) -> float | None:
    value = _maybe_json(value)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"alpha is {value!r}: a number is right.")
    return value
