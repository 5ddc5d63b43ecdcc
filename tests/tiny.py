"""Tiny backbones, made once in a process and copied for each test: a copy takes a third of the time.

In: what `lorica.models.tiny` takes. Out: a backbone of one's own, or the original, which is to be looked at only.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch

from lorica import models
from lorica.models import Backbone


def tiny(family: str, *, dtype: torch.dtype | None = None, **overrides: Any) -> Backbone:
    """A backbone that nobody else has."""
    if any(isinstance(value, dict | list) for value in overrides.values()):  # which have no hash
        return models.tiny(family, dtype=dtype, **overrides)
    return copy.deepcopy(original(family, dtype=dtype, **overrides))


@cache
def original(family: str, *, dtype: torch.dtype | None = None, **overrides: Any) -> Backbone:
    """The backbone that others copy."""
    base = models.tiny(family, dtype=dtype, **overrides)
    base.fingerprint()  # copies remember it
    return base
