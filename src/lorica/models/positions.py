"""What a model's config says about positions: how many there are, where their meaning changes, what a layer sees.

In: a transformers model or one of its attention modules. Out: numbers, or None where there is no limit;
rotations that have forgotten earlier rows. Refuses to know batches and kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


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
