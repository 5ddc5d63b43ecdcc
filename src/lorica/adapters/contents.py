"""What an adapter folder holds, read without the base that it belongs to; and how far it moves a base that is at hand.

In: a folder, and perhaps a loaded adapter with its backbone. Out: plain records: method, settings, base, groups of
tensors, relative change of each group of weights. Refuses to know how they are shown, and never changes a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.fold import blocks, doubled, fold_weight, rows_of, work_device
from lorica.adapters.folder import WEIGHTS, read_folder
from lorica.adapters.peft_keys import OWN, PREFIX
from lorica.core.update import LinearUpdate
from lorica.models.backbone import Backbone

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors whose names differ in layer and expert numbers alone.

    Attributes: `name` has `*` for each number; `shapes` are those that occur; `rms` is the root mean square of all
    values and `largest` the largest magnitude.
    """

    name: str
    count: int
    shapes: tuple[tuple[int, ...], ...]
    values: int
    rms: float
    largest: float


@dataclass(frozen=True, slots=True)
class Contents:
    """One adapter folder.

    Attributes:
        path: the folder. bytes: size of its weights file.
        method: Lorica's method, None in a folder that another program wrote.
        peft_type: the type that PEFT reads, None where PEFT cannot hold the adapter; `not_peft` then says why.
        settings: of the method where Lorica wrote it, else all of `adapter_config.json` that is set.
        base: name, and where Lorica wrote it family and fingerprint.
        sites: adapted sites where Lorica wrote them down, else None.
        meta: provenance. seed: of the initial values, None where it is unknown.
        groups: the tensors of the file.
    """

    path: str
    bytes: int
    method: str | None
    peft_type: str | None
    not_peft: str | None
    settings: dict[str, Any]
    base: dict[str, Any]
    sites: int | None
    seed: int | None
    meta: dict[str, Any]
    groups: tuple[TensorGroup, ...]

    @property
    def values(self) -> int:
        """Values in the file, trained or not."""
        return sum(group.values for group in self.groups)


def read_contents(path: str | Path) -> Contents:
    """Read a folder that Lorica or PEFT wrote. Raises MissingError, FormatError as loading it does."""
    folder = Path(path)
    tensors, config, own = read_folder(folder)
    record: Mapping[str, Any] = own or {}
    not_peft = record.get("not_peft")
    found = {key: value for key, value in config.items() if value not in (None, False, "", [], {})}
    base = record.get("base") or {"name": config.get("base_model_name_or_path")}
    sites = record.get("sites")
    return Contents(
        path=str(path),
        bytes=(folder / WEIGHTS).stat().st_size,
        method=record.get("method"),
        peft_type=None if not_peft else config.get("peft_type"),
        not_peft=not_peft,
        settings=dict(record.get("config") or found),
        base=dict(base),
        sites=None if sites is None else len(sites),
        seed=record.get("seed"),
        meta=dict(record.get("meta") or {}),
        groups=tuple(_groups(tensors)),
    )


def _groups(tensors: Mapping[str, Tensor]) -> Iterable[TensorGroup]:
    gathered: dict[str, list[Tensor]] = {}
    for key in sorted(tensors, key=_natural):
        gathered.setdefault(_INDEX.sub("*", _short(key)), []).append(tensors[key])
    for name, members in gathered.items():
        values = sum(t.numel() for t in members)
        square = sum(float(t.double().square().sum()) for t in members)
        yield TensorGroup(
            name=name,
            count=len(members),
            shapes=tuple(sorted({tuple(t.shape) for t in members})),
            values=values,
            rms=(square / values) ** 0.5 if values else 0.0,
            largest=max((float(t.abs().max()) for t in members if t.numel()), default=0.0),
        )


def _short(key: str) -> str:
    for prefix in (PREFIX, f"{OWN}site.", OWN):
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def _natural(key: str) -> list[tuple[int, str]]:
    """Layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]


@dataclass(frozen=True, slots=True)
class Change:
    """How far sites of one role are moved: the mean and the largest `‖W' − W‖ / ‖W‖` (Frobenius norms)."""

    role: str
    sites: int
    mean: float
    largest: float


@torch.no_grad()
def relative_changes(adapter: Adapter, backbone: Backbone) -> tuple[Change, ...]:
    """The change that merging would make to each role's weights; roles without weights (prompts, prefixes) are absent.

    Computed in float64, by blocks of rows: time and memory of a merge, and the base is not written to.
    """
    found: dict[str, list[float]] = {}
    for name, site in adapter.layout.sites.items():
        update = adapter.update(name, backbone.weight(name))
        if not isinstance(update, LinearUpdate):
            continue
        weight = backbone.weight(name).matrix()
        exact = doubled(update, work_device(weight))
        moved = whole = 0.0
        for rows in blocks(weight.shape):
            old = weight[rows].to(device=work_device(weight), dtype=torch.float64)
            moved += float((fold_weight(old, [rows_of(exact, rows)]) - old).square().sum())
            whole += float(old.square().sum())
        found.setdefault(site.role, []).append((moved / whole) ** 0.5 if whole else 0.0)
    return tuple(Change(role, len(all_), sum(all_) / len(all_), max(all_)) for role, all_ in found.items())
