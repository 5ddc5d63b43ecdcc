"""The protobuf classes of the Tinker wire, from the installed `tinker` package.

In: nothing. Out: message classes and enum values. The file is loaded by its path: importing `tinker` would import its
client, and with it torch. Refuses to know what the messages mean.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from lorica.core.errors import MissingError

_NAME = "tinker.proto.tinker_public_pb2"


def _load() -> ModuleType:
    if _NAME in sys.modules:
        return sys.modules[_NAME]
    package = importlib.util.find_spec("tinker")
    places = list(package.submodule_search_locations or ()) if package else []
    path = Path(places[0]) / "proto" / "tinker_public_pb2.py" if places else None
    spec = importlib.util.spec_from_file_location("lorica_tinker_public_pb2", path) if path and path.is_file() else None
    if spec is None or spec.loader is None:
        raise MissingError(
            "The server needs the `tinker` package for the protobuf classes of its wire.",
            hint="pip install 'lorica[serve]'",
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pb: Any = _load()
"""The module of generated classes: `pb.ForwardBackwardRequest`, `pb.SampleResponse` …"""
