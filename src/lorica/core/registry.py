"""A registry without an import list: the classes that the files of a package define, and those of other packages.

In: a package's name and path, an entry-point group. Out: classes that are not abstract. Refuses to know what they are
for: the caller picks its own.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator
from importlib.metadata import entry_points
from typing import Any


def classes_in(package: str, path: Iterable[str], group: str | None = None) -> Iterator[type[Any]]:
    """Every concrete class of the entry points, then those that a file of the package defines: of two with one name
    in a mapping the package's own stays.
    """
    if group is not None:
        yield from (item for entry in entry_points(group=group) if not inspect.isabstract(item := entry.load()))
    for info in pkgutil.iter_modules(path):
        module = importlib.import_module(f"{package}.{info.name}")
        for item in vars(module).values():
            if inspect.isclass(item) and item.__module__ == module.__name__ and not inspect.isabstract(item):
                yield item
