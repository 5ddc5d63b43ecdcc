"""What a client's request for a run means: a method, its settings, its targets and a seed.

In: `create_model`'s fields, where `user_metadata` may name any registered method, and what the engine told of the
methods' settings. Out: a run's specification for the engine, which judges the values; a key that may be meant as a
setting and is none is refused, all other keys are notes of the user's own. Imports no method.
"""

from __future__ import annotations

import difflib
import json
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from lorica.client.words import RESERVED
from lorica.core.errors import ConfigError, DataError, TargetError
from lorica.engine.commands import MethodSettings
from lorica.server.bodies import CreateModelBody, LoraConfigBody

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
HEAD = ("lm_head",)
DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "smollm3", "phi3")
EXPERTS = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe")
OPTIMIZERS = ("adamw",)
ALPHA = 32
"""The alpha of every LoRA that a client asks for without naming one, as on the hosted service."""
NEAR = 0.75
"""How alike (difflib's ratio) two words are of which one is taken for a slip of the other: `from` and `form` are,
`tags` and `targets` are not.
"""
KEEP = 'To keep it as a note of your own, write all settings into "config", which may be "{}".'


def spec_of(body: CreateModelBody, family: str, methods: Mapping[str, MethodSettings]) -> dict[str, Any]:
    """The fields of `RunSpec`. Raises ConfigError, DataError, TargetError for what no engine has to be asked about."""
    lora = body.lora_config or LoraConfigBody(rank=32)
    told = dict(body.user_metadata or {})
    if body.optimizer_config.type not in OPTIMIZERS:
        raise ConfigError(f"Optimizer {body.optimizer_config.type!r} is not supported here; 'adamw' is.")
    if lora.rank < 1:
        raise ConfigError(f"lora_config.rank is {lora.rank}: a positive number is right.")
    seed = secrets.randbits(31) if lora.seed is None else lora.seed
    method = str(told["method"]) if "method" in told else "lora"
    known = methods.get(method, MethodSettings())  # one that is not there is refused by the engine
    _check_words(told, known)
    asked = _mapping(told["config"], "config") if "config" in told else _beside(told, method, methods)
    alpha = _alpha(told, asked)
    rank = {"rank": lora.rank} if "rank" in known.fields else {}  # the SDK sends one for every method
    config: dict[str, Any] = {**rank, **asked}
    if alpha is not None:
        config["alpha"] = alpha
    elif "method" not in told:
        config["alpha"] = ALPHA
    return {"method": method, "config": config, "targets": _targets(told, lora, family), "seed": seed}


def flags_of(body: CreateModelBody) -> dict[str, bool]:
    """Which parts of the model a client asked to train."""
    lora = body.lora_config or LoraConfigBody(rank=32)
    return {"train_unembed": lora.train_unembed, "train_mlp": lora.train_mlp, "train_attn": lora.train_attn}


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


def _check_words(told: Mapping[str, Any], known: MethodSettings) -> None:
    """Raises ConfigError for a slip of a key that says what a run is, whatever stands beside it."""
    settings = known.fields if "method" in told and "config" not in told else {}
    for key in told:
        near = None if key in RESERVED or key in settings else _near(key, RESERVED)
        if near is not None:
            raise ConfigError(
                f"user_metadata has {key!r}. Did you mean {near!r}?", hint="A note of your own needs another name."
            )
    if "config" in told and "method" not in told:
        raise ConfigError("user_metadata has 'config' and no 'method'; name the method whose settings they are.")


def _beside(told: Mapping[str, Any], method: str, methods: Mapping[str, MethodSettings]) -> dict[str, Any]:
    """Settings written beside `method`, a text as its field reads it. Raises ConfigError for a key that is none and may
    be meant as one.
    """
    known = methods.get(method)
    if "method" not in told or known is None:
        return {}
    found = {}
    for key in (key for key in told if key not in RESERVED):
        if key in known.fields:
            found[key] = told[key] if known.fields[key] else _maybe_json(told[key])
        else:
            _check_note(key, method, methods)
    return found


def _check_note(key: str, method: str, methods: Mapping[str, MethodSettings]) -> None:
    """Raises ConfigError unless a key can only be a note of the user's own: it is no slip of the method's settings, not
    PEFT's name for one, and no other method has such a setting.
    """
    known = methods[method]
    near = _near(key, known.fields)
    others = [repr(name) for name, other in methods.items() if key in other.fields]
    if near is None and not others and key not in known.peft:
        return
    elsewhere = f" (one of {', '.join(others[:3])}{' and others' if len(others) > 3 else ''})" if others else ""
    if key in known.peft:
        right = f"That is PEFT's name; here it is {known.peft[key]!r}."
    else:
        right = f"Did you mean {near!r}?" if near else f"Its settings are {', '.join(known.fields) or 'none'}."
    raise ConfigError(f"Method {method!r} has no setting {key!r}{elsewhere}. {right}", hint=KEEP)


def _near(key: str, known: Iterable[str]) -> str | None:
    """The known word that a key is taken for a slip of."""
    word = key.casefold().replace("-", "_")
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=NEAR)), None)


def _alpha(told: Mapping[str, Any], asked: Mapping[str, Any]) -> float | None:
    """The alpha that stands beside `method`, by either name. Raises ConfigError where it is told twice."""
    places = [key for key in ("alpha", "lora_alpha") if key in told]
    if len(places) + ("alpha" in asked) > 1:
        raise ConfigError(f"user_metadata tells alpha twice; leave {places[-1]!r} out.")
    return _number(told[places[0]]) if places else None


def _maybe_json(value: Any) -> Any:
    """What a text holds as JSON, where it does: the SDK's metadata are texts."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
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
