"""The outline of a backbone: the names and shapes of the sites that an adapter's files speak of, and no weights.

In: what an adapter folder holds. Out: a backbone on which the adapter can be loaded, so that a change that needs no
base (factors, dense differences) can be looked at without it. Where a weight is asked for, it says that the base is
needed. Refuses to know what is measured, and to guess shapes that the files do not tell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lorica.adapters.adapter import Adapter
from lorica.adapters.contents import natural
from lorica.adapters.files import load_adapter
from lorica.adapters.folder import WEIGHTS, read_folder
from lorica.adapters.peft_keys import Tensors
from lorica.core.errors import MismatchError, MissingError
from lorica.models.backbone import Backbone, wrap
from lorica.models.frozen import FrozenWeight

LEFT = re.compile(r"(?P<site>.+)\.(?:lora_A\.weight|lora_A)")
EMBEDDED = re.compile(r"(?P<site>.+)\.lora_embedding_A")
OWN_LEFT = re.compile(r"lorica\.site\.(?P<site>.+)\.(?P<param>A|delta)")
"""Tensors whose last axis is a site's inputs."""
HINT = "Give the base (`--base`)."


class AbsentWeight(FrozenWeight):
    """A weight of which only the shape is known. Raises MissingError for everything else."""

    @property
    def packed(self) -> None:
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        return self._place.site.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def _absent(self) -> NoReturn:
        raise MissingError(f"The change of {self._place.site.name!r} depends on the base's weight.", hint=HINT)

    def matrix(self) -> Tensor:
        self._absent()

    def residual(self) -> Tensor | None:
        self._absent()

    def row_square_norm(self) -> Tensor:
        self._absent()

    def bias(self) -> Tensor | None:
        return None


class Outline(Backbone):
    """A backbone of shapes alone. It says of itself what the adapter's record says of the base."""

    def __init__(self, module: nn.Module, record: Mapping[str, Any]) -> None:
        super().__init__(module, name=str(record.get("name") or "unknown"))
        self._record = record

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def position_scale(self) -> float:
        return float(self._record.get("position_scale", 1.0))

    def fingerprint(self) -> str:
        return str(self._record.get("fingerprint", ""))

    def weight(self, site: str) -> FrozenWeight:
        if site not in self._weights:
            self._weights[site] = AbsentWeight(self._place(site), self.original)
        return self._weights[site]


def load_without_base(path: Path, name: str) -> tuple[Adapter, Outline]:
    """An adapter on the outline that its own files draw, values that are not finite included.

    Raises MissingError where the files do not tell the shapes of its sites, or where reading them needs the base's
    weights; and as `load_adapter` for a folder that Lorica cannot read.
    """
    tensors, config, own = read_folder(path, finite=False)
    record: Mapping[str, Any] = (own or {}).get("base") or {"name": config.get("base_model_name_or_path")}
    held = Tensors(tensors, wrap(nn.Module()), path / WEIGHTS)
    named = {key: held.peek(key) for key in held}
    modules = _modules(named)
    told = set((own or {}).get("sites") or modules)
    if not modules or told != set(modules) or config.get("target_parameters"):
        raise MissingError(f"The files in {path} do not tell the shapes of the weights that it changes.", hint=HINT)
    outline = Outline(_tree(dict(sorted(modules.items(), key=lambda item: natural(item[0])))), record)
    try:
        return load_adapter(path, outline, name, finite=False), outline
    except MismatchError:
        raise MissingError(
            f"The files in {path} do not tell the shapes of the weights that it changes.", hint=HINT
        ) from None


def _modules(named: Mapping[str, Tensor]) -> dict[str, Callable[[], nn.Module]]:
    """For each site that factors or a dense difference tell the shape of, what makes its module; on the meta device."""
    found: dict[str, Callable[[], nn.Module]] = {}
    for key, tensor in named.items():
        left, embedded, own = LEFT.fullmatch(key), EMBEDDED.fullmatch(key), OWN_LEFT.fullmatch(key)
        match = left or embedded or own
        if match is None or tensor.ndim != 2:
            continue
        site = match["site"]
        if own is not None and own["param"] == "delta":
            found[site] = _linear(tensor.shape[1], tensor.shape[0])
            continue
        right = next((named[r] for r in _partners(key, site) if r in named), None)
        if right is None or right.ndim != 2:
            continue
        make = _embedding if embedded else _linear
        found[site] = make(tensor.shape[1], right.shape[0])
    return found


def _partners(key: str, site: str) -> tuple[str, ...]:
    return (
        f"{site}.lora_B.weight",
        f"{site}.lora_B",
        f"{site}.lora_embedding_B",
        f"lorica.site.{site}.B",
        key.removesuffix("A") + "B",
    )


def _linear(inputs: int, outputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(inputs, outputs, bias=False, device="meta")


def _embedding(tokens: int, width: int) -> Callable[[], nn.Module]:
    return lambda: nn.Embedding(tokens, width, device="meta")


def _tree(modules: Mapping[str, Callable[[], nn.Module]]) -> nn.Module:
    """A module tree with a module at each dotted path."""
    root = nn.Module()
    for path, make in modules.items():
        *parents, last = path.split(".")
        here = root
        for part in parents:
            if part not in here._modules:
                here.add_module(part, nn.Module())
            here = here.get_submodule(part)
        here.add_module(last, make())
    return root
