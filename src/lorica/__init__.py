"""Lorica: one frozen base model, many adapters. Importing this package imports neither torch nor transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lorica.engine.host import Host, attach
    from lorica.methods import all_methods, make_method
    from lorica.models import load

_LAZY = {
    "attach": "lorica.engine.host",
    "Host": "lorica.engine.host",
    "load": "lorica.models",
    "make_method": "lorica.methods",
    "all_methods": "lorica.methods",
}
__all__ = ["Host", "__version__", "all_methods", "attach", "load", "make_method"]


def __getattr__(name: str) -> Any:
    """Resolve the public names on first use, so that `import lorica` stays light."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'lorica' has no attribute {name!r}")
