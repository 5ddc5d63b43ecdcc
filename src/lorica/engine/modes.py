"""Training and eval mode of a module for a while.

In: modules and a mode. Out: the modules in that mode, and afterwards each in its own again. Refuses to know what runs
inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(modules: Iterable[nn.Module], *, training: bool) -> Iterator[None]:
    """Inside, all of them are in this mode; afterwards each is in its own again."""
    others = [part for part in modules if part.training is not training]
    for part in others:
        vars(part)["training"] = training  # past `nn.Module.__setattr__`, which looks for parameters
    try:
        yield
    finally:
        for part in others:
            vars(part)["training"] = not training
