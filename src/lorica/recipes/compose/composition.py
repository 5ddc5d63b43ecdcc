"""What composing gave: the adapter, the rows that it is to be judged by, and the log.

In: adapters, losses, a log. Out: plain records, a table's rows, `compose.json` beside the adapter. Refuses to know how
weights are found and how a table is shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorica.adapters.adapter import Adapter
from lorica.adapters.files import save_adapter
from lorica.adapters.lineage import KEY, Data
from lorica.adapters.merging.combine import CombineReport
from lorica.adapters.parents import lineage_of
from lorica.core.jsonable import plain
from lorica.core.storage import storage, write_file
from lorica.models.backbone import Backbone

LOG = "compose.json"
"""The log's name in the adapter's folder."""


@dataclass(frozen=True, slots=True)
class Row:
    """One way to weigh the same adapters.

    Attributes:
        name: `zero` (the base), `uniform` (1/N each), `best single`, `random search`, and the result's own.
        weights: of each adapter, None where they differ from site to site.
        loss: the objective, of the few examples say.
        value: what was minimised, with the penalty on the weights; None where nothing was searched.
        test: the test objective, None without one.
    """

    name: str
    weights: tuple[float, ...] | None
    loss: float
    value: float | None = None
    test: float | None = None


@dataclass(frozen=True, slots=True)
class Composition:
    """A composed adapter.

    Attributes:
        adapter: the result, resident in the host. report: what `combine` says of it.
        parents: names of the adapters that were weighed. alone: the objective of every adapter that was given.
        rows: zero, uniform, best single, random search where there was a search, and the result, last.
        notes: sentences that a reader should know.
        log: settings, seed, optimiser and every evaluation or step, as JSON.
    """

    adapter: Adapter
    report: CombineReport
    parents: tuple[str, ...]
    alone: Mapping[str, float]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    log: Mapping[str, Any]

    @property
    def row(self) -> Row:
        """The result's own row."""
        return self.rows[-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON; what is not finite is null."""
        found = plain(
            {
                "adapters": self.parents,
                "alone": self.alone,
                "rows": [asdict(row) for row in self.rows],
                "notes": self.notes,
                "report": asdict(self.report),
                **self.log,
            }
        )
        assert isinstance(found, dict)
        return found


def save_composition(found: Composition, backbone: Backbone, folder: str | Path) -> Path:
    """Write the adapter, and the log beside it. Returns the folder. Raises StorageError."""
    path = save_adapter(found.adapter, backbone, Path(folder))
    with storage(path / LOG):
        write_file(path / LOG, (json.dumps(found.to_dict(), indent=1, ensure_ascii=False) + "\n").encode())
    return path


def sign(adapter: Adapter, settings: Mapping[str, Any], data: Data | None) -> None:
    """Add to a merged adapter's lineage how its weights were found, and on which rows."""
    known = lineage_of(adapter)
    adapter.meta[KEY] = known.replace(settings={**known.settings, **settings}, data=data).to_meta()


def acting_notes(parents: Sequence[Adapter]) -> tuple[str, ...]:
    """A sentence for each parent that acts at fewer sites than all together."""
    union = {site for parent in parents for site in parent.layout.sites}
    return tuple(
        f"{parent.name} acts at {len(parent.layout.sites)} of {len(union)} sites, and adds nothing at the others."
        for parent in parents
        if len(parent.layout.sites) < len(union)
    )
