"""Runs whose base is made together with the adapter: LoftQ with more than one iteration, or QPiSSA, on packed weights.

In: a run's config. Out: packed base and adapter, the same ones whenever it is asked again. Refuses to know training and
where the base is kept.
"""

from __future__ import annotations

from lorica.adapters.private_base import PrivateBase, private_base
from lorica.methods.loftq import LoftQ
from lorica.models import load
from lorica.models.loading import parse_device
from lorica.recipes.config import SFTConfig


def has_own_base(config: SFTConfig) -> bool:
    """Whether the adapter changes the codes of the base, so that nobody else can share it."""
    method = config.make_method()
    return isinstance(method, LoftQ) and method.private and config.quantize is not None


def own_base(config: SFTConfig) -> PrivateBase | None:
    """Base and adapter of a run that makes both; None for all others, whose base is loaded as it is."""
    method = config.make_method()
    if not has_own_base(config) or not isinstance(method, LoftQ) or config.quantize is None:
        return None
    full = load(config.model, dtype=config.dtype, position_scale=config.position_scale)
    device = parse_device(config.device)
    made = private_base(full, config.quantize, method, config.targets, seed=config.seed, device=device)
    made.backbone.module.to(device)
    made.adapter.to(device=device)
    return made
