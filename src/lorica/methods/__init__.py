"""The registry of methods: every file of this package and every `lorica.methods` entry point. No import list exists."""

from __future__ import annotations

from functools import cache
from typing import Any

from lorica.core.errors import MethodError, did_you_mean
from lorica.core.registry import classes_in
from lorica.methods.base import Method, Paper

__all__ = ["Method", "Paper", "all_methods", "get_method", "make_method"]


@cache
def all_methods() -> dict[str, type[Method]]:
    """Every registered method class by name, sorted."""
    found = [item for item in classes_in(__name__, __path__, "lorica.methods") if issubclass(item, Method)]
    return {item.name: item for item in sorted(found, key=lambda item: item.name)}


def get_method(name: str) -> type[Method]:
    """The method class called `name`. Raises MethodError with the nearest names."""
    known = all_methods()
    if name not in known:
        raise MethodError(
            f"There is no method {name!r}.{did_you_mean(name, known)}", hint="`lorica methods` lists them all."
        )
    return known[name]


def make_method(name: str, **config: Any) -> Method:
    """A configured method: `make_method("lora", rank=8)`. Raises MethodError or ConfigError."""
    return get_method(name)(**config)
