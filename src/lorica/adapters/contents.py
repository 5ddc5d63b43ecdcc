"""What an adapter folder holds, read without the base that it belongs to.

In: a folder. Out: plain records: method, settings, base, groups of tensors, values that are not finite included.
Refuses to know how they are shown and what the values do, and never changes a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorica.adapters.folder import WEIGHTS, read_folder
from lorica.adapters.peft_keys import OWN, PREFIX

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors whose names differ in layer and expert numbers alone.

    Attributes: `name` has `*` for each number; `shapes` are those that occur; `rms` is the root mean square of all
    finite values and `largest` the largest magnitude; `not_finite` counts NaN and infinity.
    """

    name: str
    count: int
    shapes: tuple[tuple[int, ...], ...]
    values: int
    rms: float
    largest: float
    not_finite: int


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
    """Read a folder that Lorica or PEFT wrote. Values that are not finite are counted. Raises MissingError, FormatError
    as loading it does.
    """
    folder = Path(path)
    tensors, config, own = read_folder(folder, finite=False)
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
    for key in sorted(tensors, key=natural):
        gathered.setdefault(_INDEX.sub("*", _short(key)), []).append(tensors[key])
    for name, members in gathered.items():
        values = sum(t.numel() for t in members)
        finite = [t.double()[t.isfinite()] for t in members]
        kept = sum(t.numel() for t in finite)
        square = sum(float(t.square().sum()) for t in finite)
        yield TensorGroup(
            name=name,
            count=len(members),
            shapes=tuple(sorted({tuple(t.shape) for t in members})),
            values=values,
            rms=(square / kept) ** 0.5 if kept else 0.0,
            largest=max((float(t.abs().max()) for t in finite if t.numel()), default=0.0),
            not_finite=values - kept,
        )


def _short(key: str) -> str:
    for prefix in (PREFIX, f"{OWN}site.", OWN):
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def natural(key: str) -> list[tuple[int, str]]:
    """Layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]
