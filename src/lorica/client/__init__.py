"""Clients: what a recipe talks to. `Service` is in this process; `ServiceClient` speaks to a server, as the SDK does.

Both are resolved on use: the one needs torch, the other the `tinker` package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorica.client.local import Service
    from lorica.client.remote import ServiceClient

_LAZY = {"Service": "lorica.client.local", "ServiceClient": "lorica.client.remote"}
__all__ = ["Service", "ServiceClient"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'lorica.client' has no attribute {name!r}")
