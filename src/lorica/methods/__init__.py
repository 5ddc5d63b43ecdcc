"""The registry of methods: every file of this package and every `lorica.methods` entry point. No import list exists."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from lorica.core.errors import MethodError, did_you_mean
from lorica.methods.base import Method, Paper

__all__ = ["Method", "Paper", "all_methods", "get_method", "make_method"]


@cache
def all_methods() -> dict[str, type[Method]]:
    """Every registered method class by name, sorted."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    classes = [entry.load() for entry in entry_points(group="lorica.methods")]
    for module in modules:
        classes += [
            item for item in vars(module).values() if inspect.isclass(item) and item.__module__ == module.__name__
        ]
    found = [item for item in classes if issubclass(item, Method) and not inspect.isabstract(item)]
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
