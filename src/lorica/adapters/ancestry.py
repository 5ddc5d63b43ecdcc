"""The graph that an adapter stands in: parents by recorded path or by hash, their parents, and what became of them.

In: folders of adapters or models, and folders to look in. Out: nodes and edges, child to parent, as far as files tell.
A parent whose folder is gone is missing, one whose hash differs has changed; neither is followed further.
Refuses to know weights' values, and how a graph is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorica.adapters.folder import CONFIG, OWN, WEIGHTS, read_json
from lorica.adapters.lineage import KEY, Lineage, Parent, lineage_at, parent_at, sha256_of
from lorica.core.errors import LoricaError, MissingError
from lorica.models.directory import CONFIG as MODEL
from lorica.models.directory import read_lineage

Status = Literal["here", "moved", "changed", "missing", "unsaved", "served"]
SHORT = 8
"""Digits of a hash that are shown."""


@dataclass(frozen=True, slots=True)
class Node:
    """An adapter, or a model directory that Lorica wrote.

    Attributes:
        key: of this node in the graph. kind: which of the two.
        path: where it is, absolute; of a missing one, where it was.
        sha256: its hash; of a changed or missing one, as it was.
        method: of an adapter; of a model, how it was made. rank: where the method has one.
        base: name and fingerprint of the backbone that it acts on or was made from.
        lineage: what it says of itself; empty where it was not read.
        status: `here`; `moved`: found by its hash elsewhere than recorded; `changed`: what lies at the recorded path
            has another hash; `missing`: nothing lies there; `unsaved`: it was in no folder; `served`: it is a server's.
    """

    key: str
    kind: Literal["adapter", "model"]
    path: str
    sha256: str
    method: str
    base: tuple[str, str]
    lineage: Lineage
    status: Status = "here"
    rank: int | None = None

    @property
    def name(self) -> str:
        """The end of its path: `runs/first/adapter` is long enough as `first/adapter`."""
        parts = Path(self.path).parts
        return "/".join(parts[-2:]) if self.path and "://" not in self.path else self.path or "never saved"

    @property
    def short(self) -> str:
        """The first digits of its hash."""
        return self.sha256[:SHORT]


@dataclass(frozen=True, slots=True)
class Edge:
    """`child` comes from `parent`: keys of nodes; `base` where the child stands on a model directory."""

    child: str
    parent: str
    relation: str
    weight: float | None = None


@dataclass(slots=True)
class Ancestry:
    """Nodes by key, in the order that they were found; edges; and the keys of what was asked for."""

    roots: list[str] = field(default_factory=list)
    nodes: dict[str, Node] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)

    def parents(self, key: str) -> list[tuple[Edge, Node]]:
        """The parents of a node, in the order that they act."""
        return [(edge, self.nodes[edge.parent]) for edge in self.edges if edge.child == key]

    def depths(self) -> dict[str, int]:
        """The longest way from a root to each node."""
        found: dict[str, int] = {}

        def visit(key: str, depth: int) -> None:
            if found.get(key, -1) < depth:
                found[key] = depth
                for edge, _ in self.parents(key):
                    visit(edge.parent, depth + 1)

        for root in self.roots:
            visit(root, 0)
        return found

    def problems(self) -> list[str]:
        """One sentence for each parent that is not as it was."""
        said = []
        for node in self.nodes.values():
            child = next((self.nodes[edge.child].name for edge in self.edges if edge.parent == node.key), "")
            what = {"missing": "is not there", "changed": "has changed since: its hash differs"}.get(node.status)
            if what:
                said.append(f"{node.path} ({node.short}), which {child} comes from, {what}.")
        return said

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        nodes = [
            {
                "key": n.key,
                "kind": n.kind,
                "path": n.path,
                "sha256": n.sha256,
                "method": n.method,
                "rank": n.rank,
                "base": {"name": n.base[0], "fingerprint": n.base[1]},
                "status": n.status,
                KEY: n.lineage.to_meta(),
            }
            for n in self.nodes.values()
        ]
        edges = [{"child": e.child, "parent": e.parent, "relation": e.relation, "weight": e.weight} for e in self.edges]
        return {"roots": self.roots, "nodes": nodes, "edges": edges, "problems": self.problems()}


def trace(places: Sequence[str | Path], search: Iterable[str | Path] = ()) -> Ancestry:
    """The ancestry of adapters and models: folders of them, or folders that hold some (all of those then, and only the
    youngest are roots).

    Parents are looked for at the path that is recorded, else by hash in `places` and `search`. Raises MissingError for
    a folder that is not there or holds none, FormatError where a file is broken.
    """
    asked: list[Path] = []
    looked: list[Path] = []
    given = [Path(place).expanduser() for place in places]
    for place in given:
        found = [place] if _is_adapter(place) or _is_model(place) else list(_within(place))
        if not found:
            what = "holds no adapter and no model" if place.is_dir() else "is not there"
            raise MissingError(f"{place} {what}.", hint=f"An adapter folder holds {CONFIG}.")
        asked += found
    for place in (*given, *map(Path, search)):
        looked += [place] if _is_adapter(place) else list(_within(place))
    tracer = _Tracer(looked)
    keys = list(dict.fromkeys(tracer.add(place) for place in asked))
    graph = tracer.graph
    inner = {edge.parent for edge in graph.edges}
    named = {tracer.add(place) for place in given if _is_adapter(place) or _is_model(place)}
    graph.roots = [key for key in keys if key in named or key not in inner]
    return graph


class _Tracer:
    """Follows lineages, each node once. `_open` are the nodes whose parents are being followed: a folder that was
    written over by its own descendant would lead back to them, and is no parent then.
    """

    def __init__(self, looked: Iterable[Path]) -> None:
        self.graph = Ancestry()
        self._looked = list(looked)
        self._by_hash: dict[str, list[Path]] | None = None
        self._open: list[str] = []

    def add(self, place: Path) -> str:
        """A folder and all that it comes from. Returns its key."""
        return self._model(place) if not _is_adapter(place) else self._adapter(place, "here")

    def _adapter(self, place: Path, status: Status) -> str:
        key = _key(place)
        if key not in self.graph.nodes:
            itself, lineage = parent_at(place, "derived-from"), lineage_at(place)
            config = read_json(place / CONFIG)
            own = read_json(place / OWN) if (place / OWN).is_file() else {}
            name = (own.get("base") or {}).get("name") or config.get("base_model_name_or_path") or ""
            rank = own.get("config", {}).get("rank", config.get("r"))
            self._follow(
                Node(
                    key,
                    "adapter",
                    key,
                    itself.sha256,
                    itself.method,
                    (lineage.base.name if lineage.base else str(name), itself.base),
                    lineage,
                    status,
                    rank if isinstance(rank, int) else None,
                )
            )
        return key

    def _model(self, place: Path) -> str:
        key = _key(place)
        if key not in self.graph.nodes:
            lineage = Lineage.from_meta({KEY: read_lineage(place)}, str(place))
            base = (lineage.base.name, lineage.base.fingerprint) if lineage.base else ("", "")
            self._follow(Node(key, "model", key, "", lineage.how or "", base, lineage))
        return key

    def _follow(self, node: Node) -> None:
        self.graph.nodes[node.key] = node
        self._open.append(node.key)
        model = self._base(node)
        folded = {parent.sha256 for parent in model.lineage.parents} if model else set()
        for parent in node.lineage.parents:
            if parent.relation != "trained-from" or parent.sha256 not in folded:  # else the way leads over the model
                self.graph.edges.append(Edge(node.key, self._found(parent), parent.relation, parent.weight))
        if model:
            self.graph.edges.append(Edge(node.key, model.key, "base"))
        self._open.pop()

    def _base(self, node: Node) -> Node | None:
        """The model directory that a node stands on, where Lorica made it."""
        place = Path(node.base[0]).expanduser()
        if not node.base[0] or not _is_model(place) or read_lineage(place) is None or _key(place) in self._open:
            return None
        return self.graph.nodes[self._model(place)]

    def _found(self, parent: Parent) -> str:
        """The key of a parent's node, wherever it is now."""
        place, there = (
            Path(parent.path),
            bool(parent.path) and "://" not in parent.path and _is_adapter(Path(parent.path)),
        )
        if there and parent.sha256 and _hash(place) == parent.sha256 and _key(place) not in self._open:
            return self._adapter(place, "here")
        same = self._hashes().get(parent.sha256, []) if parent.sha256 else []
        elsewhere = next((found for found in same if _key(found) not in self._open), None)
        if elsewhere is not None:
            return self._adapter(elsewhere, "moved")
        status: Status = "changed" if there else "missing"
        if not parent.sha256:
            status = "unsaved"
        elif "://" in parent.path or not parent.path:
            status = "served"
        key = f"{status} {parent.sha256 or len(self.graph.nodes)}"
        if key not in self.graph.nodes:
            self.graph.nodes[key] = Node(
                key, "adapter", parent.path, parent.sha256, parent.method, ("", parent.base), Lineage(), status
            )
        return key

    def _hashes(self) -> dict[str, list[Path]]:
        if self._by_hash is None:
            self._by_hash = {}
            for place in filter(_is_adapter, self._looked):
                self._by_hash.setdefault(_hash(place), []).append(place)
        return self._by_hash


def _key(place: Path) -> str:
    return str(place.resolve())


def _hash(place: Path) -> str:
    """An adapter's hash; empty where it cannot be read."""
    try:
        return sha256_of(place)
    except LoricaError:
        return ""


def _is_adapter(place: Path) -> bool:
    return (place / CONFIG).is_file() and (place / WEIGHTS).is_file()


def _is_model(place: Path) -> bool:
    return (place / MODEL).is_file()


def _within(place: Path) -> Iterator[Path]:
    """Adapters and models with a lineage below a folder."""
    for file in sorted(place.rglob("*.json")):
        known = file.name == MODEL and read_lineage(file.parent) is not None
        if (file.name == CONFIG and _is_adapter(file.parent)) or known:
            yield file.parent
