"""What a model's config says about positions: how many there are, where their meaning changes, what a layer sees; and
position interpolation, which stretches them.

In: a transformers model, its config, or one of its attention modules. Out: numbers, or None where there is no limit;
rotations that have forgotten earlier rows; a config whose positions are divided. Refuses to know batches and kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lorica.core.errors import ConfigError, MethodError


def most_positions(module: nn.Module) -> int | None:
    """How many positions the model has vectors for; None where they are computed, as rotations are."""
    config = getattr(module, "config", None)
    if config is None or list(_rope(config)):
        return None
    most = getattr(config, "max_position_embeddings", getattr(config, "n_positions", None))
    return most if isinstance(most, int) else None


def context(module: nn.Module) -> int | None:
    """How many positions the model was made for; None where its config does not say."""
    most = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    return most if isinstance(most, int) else None


def uniform_positions(module: nn.Module) -> int | None:
    """Up to this position rotations do not depend on how long the batch's longest row is; None: at any.

    `dynamic` and `longrope` scale all positions of a pass by its last one.
    """
    config = getattr(module, "config", None)
    limits = []
    for rope in _rope(config):
        kind = rope.get("rope_type", rope.get("type"))
        if kind in ("dynamic", "longrope"):
            own = rope.get("original_max_position_embeddings")
            limit = own or getattr(config, "original_max_position_embeddings", None) or context(module)
            limits.append(int(limit or 0))
    return min(limits, default=None)


def forget_longest(module: nn.Module) -> None:
    """Let `dynamic` rotations of the next pass be its own: transformers keeps those of the longest row seen so far."""
    if uniform_positions(module) is None:
        return
    for part in module.modules():
        for name in [name for name in vars(part) if name.endswith("max_seq_len_cached")]:
            setattr(part, name, 0)


def check_scale(factor: float) -> None:
    """Raises ConfigError for a factor that stretches nothing: below one, or no number."""
    if not (math.isfinite(factor) and factor >= 1):
        raise ConfigError(f"position_scale is {factor}; a number of at least 1 is right, and 1 leaves positions alone.")


def scale_positions(config: Any, factor: float, name: str) -> None:
    """Position interpolation (arXiv 2306.15595): rotations see position p as `p / factor`, so `factor` times as many
    positions stay within those that the model was trained on. Changes the config, before a model is made of it; what
    is saved of the model says so too.

    Raises MethodError for a config without rotations, or whose rotations are scaled already.
    """
    ropes = list(_rope(config))
    if not ropes:
        raise MethodError(
            f"{name!r} ({getattr(config, 'model_type', 'custom')}) has no rotary positions that its config sets, so "
            "position_scale cannot stretch them."
        )
    kinds = {str(rope.get("rope_type", rope.get("type", "default"))) for rope in ropes}
    if kinds != {"default"}:
        raise MethodError(
            f"The rotations of {name!r} are scaled already ({', '.join(sorted(kinds - {'default'}))}); position_scale "
            "is for plain ones.",
            hint="Load it without position_scale, or change rope_parameters in its config.json.",
        )
    own = config.rope_parameters
    if any(isinstance(value, Mapping) for value in own.values()):
        config.rope_parameters = {
            kind: _linear(rope, factor) if isinstance(rope, Mapping) else rope for kind, rope in own.items()
        }
    else:
        config.rope_parameters = _linear(own, factor)
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int):
        config.max_position_embeddings = math.floor(most * factor)


def _linear(rope: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {**rope, "rope_type": "linear", "factor": float(factor)}


def position_scale(module: nn.Module) -> float:
    """What a model divides its positions by: the linear factor that all of its rotations have; 1 where there is none,
    or no single one.
    """
    ropes = list(_rope(getattr(module, "config", None)))
    factors = {float(rope.get("factor", 1.0)) if rope.get("rope_type") == "linear" else 1.0 for rope in ropes}
    return factors.pop() if len(factors) == 1 else 1.0


def check_scaled(module: nn.Module, factor: float, name: str) -> None:
    """Raises MethodError where a model has not taken its config's word for it."""
    kinds = [kind for part in module.modules() if (kind := getattr(part, "rope_type", None)) is not None]
    flat = {word for kind in kinds for word in (kind.values() if isinstance(kind, Mapping) else [kind])}
    if position_scale(module) != factor or flat != {"linear"}:
        raise MethodError(f"{name!r} makes its rotations in a way of its own, which position_scale cannot stretch.")


def _rope(config: Any) -> Iterator[Mapping[str, Any]]:
    """The settings of rotary embeddings: one set, or one for each kind of layer."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if isinstance(found, Mapping) and found:
        nested = [value for value in found.values() if isinstance(value, Mapping)]
        yield from nested or [found]


def window_of(attention: nn.Module) -> int | None:
    """The sliding window of one attention layer, as its config has it; None where it sees everything."""
    config = getattr(attention, "config", None)
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or getattr(config, "use_sliding_window", True) is False:
        return None
    kinds, index = getattr(config, "layer_types", None), getattr(attention, "layer_idx", None)
    if kinds and isinstance(index, int) and index < len(kinds) and kinds[index] != "sliding_attention":
        return None
    return window
