"""`adapter_config.json`: which settings of PEFT are understood, which are without effect, and which are refused.

In: the JSON object of a PEFT folder. Out: a class of method, and the sites that the file must hold tensors for; an
error for every setting that would change what the adapter computes. Refuses to know tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from lorica.adapters.peft_keys import experts_module, is_named
from lorica.adapters.peft_settings import ANY, PEFT_TYPES, PLAIN_INITS, READ, SHAPES, WHY
from lorica.core.errors import FormatError, MethodError, did_you_mean
from lorica.core.site import Site
from lorica.methods import all_methods
from lorica.methods.base import Method
from lorica.models.backbone import Backbone


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
    # AdaLoRA's patterns hold which triplets are left
    _check_shapes({**config, "rank_pattern": None} if kind == "ADALORA" else config, file)
    _refuse_settings(config, kind, file)
    _check_patterns(config, file)
    if kind == "LORA":
        return all_methods()[_lora_method(config, file)]
    return known[kind]


def _lora_method(config: Mapping[str, Any], file: object) -> str:
    """`lora`, `dora`, or `pissa` where PEFT took the leading directions out of the base."""
    init = config.get("init_lora_weights", True)
    init = init.lower() if isinstance(init, str) else init
    if init == "pissa":
        if config.get("use_dora") or config.get("lora_bias") or config.get("bias", "none") != "none":
            raise FormatError(
                f"{file} combines init_lora_weights 'pissa' with DoRA or a bias, which Lorica cannot read."
            )
        return "pissa"
    if init not in PLAIN_INITS:
        raise FormatError(
            f"{file} says init_lora_weights {init!r}: its tensors fit a base whose weights were changed "
            "when it was made.",
            hint="Save it with PEFT's `path_initial_model_for_weight_conversion`; the result is a plain LoRA."
            if init != "loftq"
            else "Merge it with PEFT into the base that it was made with, and load the merged model.",
        )
    return "dora" if config.get("use_dora") else "lora"


def _refuse_settings(config: Mapping[str, Any], kind: str, file: object) -> None:
    """Raises FormatError for the first setting that Lorica would have to ignore."""
    known = ANY | READ.get(kind, frozenset())
    for field, value in config.items():
        if field in known or value in (None, False, "", "none") or value == {} or value == []:
            continue
        if kind != "LORA" and field in ("bias",):
            raise FormatError(f"{file} says bias {value!r}, which Lorica reads for LoRA only.")
        if field in WHY:
            raise FormatError(f"{file} sets {field!r}: {WHY[field]}, which Lorica does not compute.")
        near = did_you_mean(field, known | WHY.keys())
        raise FormatError(f"{file} sets {field!r}, which Lorica does not know and so cannot honour.{near}")
    submodules = config.get("num_transformer_submodules")
    if submodules not in (None, 1):
        raise FormatError(f"{file} is for an encoder-decoder ({submodules} submodules), which Lorica does not adapt.")


def _check_shapes(config: Mapping[str, Any], file: object) -> None:
    """Raises FormatError for the first setting that is not made as PEFT makes it."""
    for shape, fields in SHAPES.items():
        of: type | tuple[type, ...] = str if "name" in shape else (int, float)
        for field in fields:
            value = config.get(field)
            alone = isinstance(value, of) and (" or " in shape or shape == "a number")
            listed = isinstance(value, list) and "list" in shape and all(isinstance(item, of) for item in value)
            by_name = isinstance(value, dict) and "object" in shape and all(isinstance(v, of) for v in value.values())
            if value is not None and not (alone or listed or by_name):
                raise FormatError(f"{file} has {value!r} for {field!r}; {shape} is right.")


def _check_patterns(config: Mapping[str, Any], file: object) -> None:
    """Raises FormatError for the first pattern that is no regular expression."""
    for field in ("rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save"):
        _compile(config.get(field) or (), field, file)
    for field in ("target_modules", "exclude_modules", "feedforward_modules"):
        if isinstance(config.get(field), str):  # names in a list are no patterns
            _compile(config[field], field, file)


def _compile(patterns: Iterable[str] | str, field: str, file: object) -> None:
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise FormatError(f"{file} has {field} {pattern!r}, which is no regular expression: {error}.") from None


def check_rank(config: Mapping[str, Any], name: str, rank: int, file: object) -> None:
    """Raises FormatError unless the settings give a module the rank that its tensors have.

    Where several patterns match, PEFT takes the first, but writes them in alphabetical order; the tensors tell.
    """
    told = _values(config, "rank_pattern", name) or [config.get("r", 8)]
    if rank not in told:
        said = " or ".join(str(value) for value in told)
        raise FormatError(f"{file} has rank {rank} at {name!r}, where its settings say {said}.")


def alpha_of(config: Mapping[str, Any], name: str, file: object) -> float:
    """The alpha of a module. Raises FormatError where patterns disagree: their order, which decided, is lost."""
    told = _values(config, "alpha_pattern", name)
    if len(told) > 1:
        said = " and ".join(str(value) for value in told)
        raise FormatError(
            f"{file} gives {name!r} several alphas by alpha_pattern ({said}), and not which of them came first.",
            hint="Leave the pattern that was meant: in a pattern that begins with ^, the name is the whole path.",
        )
    return float(told[0] if told else config.get("lora_alpha", 8))


def _values(config: Mapping[str, Any], field: str, name: str) -> list[Any]:
    """The different values that patterns give a module."""
    patterns = config.get(field) or {}
    return list(dict.fromkeys(value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)))


def targeted(
    config: Mapping[str, Any], backbone: Backbone, kinds: Collection[str], as_written: Callable[[str], str]
) -> list[str]:
    """Sites that `target_modules`, `exclude_modules`, `layers_to_transform` and `target_parameters` select, in backbone
    order. `as_written` gives the names that the config speaks of.
    """
    parameters = config.get("target_parameters") or []
    found = []
    for site in backbone.sites.values():
        if site.kind not in kinds or site.kind in ("input", "attention"):
            continue
        name = written_name(site, as_written)
        if site.expert is not None:
            hit = is_named(name, parameters)
        else:
            parameter = name if site.router else f"{name}.weight"
            hit = (not site.router and _selects(config, site, name)) or is_named(parameter, parameters)
        if hit:
            found.append(site.name)
    return found


def written_name(site: Site, as_written: Callable[[str], str]) -> str:
    """What the config's patterns call a site's module; for an expert or a router, the parameter."""
    if site.expert is not None:
        return f"{as_written(experts_module(site))}.{site.role}"
    return f"{as_written(site.name)}.weight" if site.router else as_written(site.name)


def _selects(config: Mapping[str, Any], site: Site, name: str) -> bool:
    """Whether PEFT adapts a module that its model calls `name`."""
    targets, layers = config.get("target_modules") or [], config.get("layers_to_transform")
    if targets == "all-linear":
        hit = site.kind == "linear" and not site.head
    else:
        hit = is_named(name, targets)
        # layers narrow what a suffix selects; whole names and patterns say it themselves
        wanted = {layers} if isinstance(layers, int) else set(layers or ())
        if wanted and not isinstance(targets, str) and name not in targets:
            hit = hit and _layer(name, config.get("layers_pattern")) in wanted
    saved = config.get("modules_to_save") or []
    return hit and not is_named(name, config.get("exclude_modules") or []) and not any(_below(e, name) for e in saved)


def _below(entry: str, name: str) -> bool:
    """Whether a module is one of `modules_to_save` or inside one."""
    return re.match(rf"(^|.*\.){entry}($|\..*)", name) is not None


def _layer(name: str, patterns: list[str] | str | None) -> int | None:
    """A module's layer, as PEFT counts: the first number inside the path, or the one behind a pattern."""
    given = [patterns] if isinstance(patterns, str) else list(patterns or ())
    tries = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in given] or [r".*?\.[^.]*\.(\d+)\."]
    for pattern in tries:
        match = re.match(pattern, name)
        if match:
            return int(match[1])
    return None
