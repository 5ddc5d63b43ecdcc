"""Where an adapter comes from: its parents, base, data and recipe, and the hash that tells an adapter's folder.

In: folders, or an adapter's `meta`. Out: a `Lineage`, kept under `meta["lineage"]`, and hashes. A parent is named by
its folder and the hash of what was in it: one that was moved is found, one that was changed is noticed.
Refuses to know who writes it, and graphs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError

from lorica.adapters.folder import CONFIG, OWN, WEIGHTS, read_json
from lorica.core.errors import FormatError, MissingError, StorageError

KEY = "lineage"
"""Where an adapter's `meta` has it."""
Relation = Literal["trained-from", "continued-from", "merged-from", "stacked-on", "derived-from"]
RELATIONS: tuple[Relation, ...] = get_args(Relation)
BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Parent:
    """An adapter that went into another one.

    Attributes:
        relation: `trained-from`: it was folded into the weights that the child was trained beside; `continued-from`:
            the child started from its values; `merged-from`: the child was computed from it and others; `derived-from`:
            from it alone (an export, a pruned or rescaled one); `stacked-on`: it acted, frozen, in every pass that the
            child was trained in, so the child means what it learnt only above it.
        path: its folder when the child was made, absolute; the `tinker://` path of one that a server holds; empty
            where it was never saved.
        sha256: `sha256_of` that folder then; empty where there was none.
        method: its method. weight: its share in a merge, None where there is none or it differs by site.
        base: fingerprint of the backbone that it acts on.
    """

    relation: Relation
    path: str
    sha256: str
    method: str
    weight: float | None = None
    base: str = ""


@dataclass(frozen=True, slots=True)
class Base:
    """The backbone that an adapter acts on: the name that it was loaded as, and its fingerprint."""

    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Data:
    """The rows that it was trained on: their file, at least sixteen digits of its SHA-256, how many rows there were."""

    path: str
    sha256: str
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class Lineage:
    """Everything that is known of where an adapter comes from.

    Attributes:
        parents: in the order that they act or were given in.
        base: that it acts on; None where nobody said.
        recipe: what trained it: `{"name": "sft", …settings}`; None where nothing did, or nobody said.
        data: that it was trained on, None where there was none or it is not known.
        how: what made it from its parents, `ties` or `export lora`; None where training alone did.
        settings: of `how`.
    """

    parents: tuple[Parent, ...] = ()
    base: Base | None = None
    recipe: dict[str, Any] | None = None
    data: Data | None = None
    how: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def to_meta(self) -> dict[str, Any]:
        """As JSON holds it: `adapter.meta[KEY] = lineage.to_meta()`."""
        return {**asdict(self), "parents": [asdict(parent) for parent in self.parents]}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], where: str = "The adapter") -> Lineage:
        """What an adapter's `meta` says; an empty one where it says nothing. Raises FormatError naming `where`."""
        record = meta.get(KEY)
        if record is None:
            return _of_old(meta)
        try:
            return _READ.validate_python(record)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, (KEY, *first["loc"])))
            raise FormatError(f"{where} has a broken lineage: {place} is {first['input']!r}: {first['msg']}.") from None

    def of(self, relation: Relation) -> tuple[Parent, ...]:
        """The parents of one relation."""
        return tuple(parent for parent in self.parents if parent.relation == relation)

    def replace(self, **changes: Any) -> Lineage:
        """A copy with some fields changed."""
        return replace(self, **changes)


_READ = TypeAdapter(Lineage)


def _of_old(meta: Mapping[str, Any]) -> Lineage:
    """What folders say that were written before there was a lineage."""
    data, came = meta.get("data"), meta.get("exported_from")
    return Lineage(
        recipe={"name": str(meta["recipe"])} if "recipe" in meta else None,
        data=Data(str(data["path"]), str(data["fingerprint"]))
        if isinstance(data, Mapping) and "path" in data
        else None,
        how=None if came is None else "export lora",
        settings={} if came is None else {"method": came},
    )


def sha256_of(folder: str | Path) -> str:
    """The hash of an adapter folder: 64 hex digits over its weights, its PEFT config and, where Lorica wrote it, its
    record less the provenance and the version of Lorica.

    A copy and a moved folder have the same one, and what is known of its ancestors does not change it. Raises
    MissingError where there is no adapter, FormatError, StorageError for a file that cannot be read.
    """
    place = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (place / name).is_file():
            raise MissingError(f"There is no adapter at {folder}: {name} is missing.")
    digest = hashlib.sha256()
    for name in (WEIGHTS, CONFIG):
        digest.update(name.encode())
        _update(digest, place / name)
    if (place / OWN).is_file():
        record = {key: value for key, value in read_json(place / OWN).items() if key not in ("meta", "lorica")}
        digest.update(json.dumps(record, sort_keys=True).encode())
    return digest.hexdigest()


def _update(digest: Any, file: Path) -> None:
    try:
        with file.open("rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
    except OSError as error:
        raise StorageError(f"Cannot read {file}: {error.strerror or error}.") from error


def parent_at(folder: str | Path, relation: Relation, weight: float | None = None) -> Parent:
    """The parent that lies in a folder, Lorica's or PEFT's. Raises as `sha256_of`."""
    place = Path(folder).expanduser().resolve()
    digest = sha256_of(place)
    own: dict[str, Any] = read_json(place / OWN) if (place / OWN).is_file() else {}
    method = own.get("method") or str(read_json(place / CONFIG).get("peft_type", "?")).lower()
    base = own.get("base")
    return Parent(relation, str(place), digest, str(method), weight, str((base or {}).get("fingerprint", "")))


def lineage_at(folder: str | Path) -> Lineage:
    """What an adapter's folder says of where it comes from; an empty one for a folder of PEFT's. Raises FormatError."""
    file = Path(folder) / OWN
    return Lineage.from_meta(read_json(file).get("meta") or {}, str(file)) if file.is_file() else Lineage()
