"""What a comparison found out, as plain values, as a Markdown table, and as files of a folder.

In: candidates and costs. Out: `Comparison`. Numbers come first; a method that could not be compared stands there with
the reason. Refuses to know how anything was trained.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorica.core.errors import StorageError
from lorica.core.storage import storage, write_file
from lorica.recipes.compare.costs import Costs
from lorica.recipes.rundir import ROOM

RESULTS, TABLE, PLOT = "results.json", "table.md", "plot.png"


@dataclass(frozen=True)
class Rate:
    """One learning rate of one method: validation losses by steps done, the test loss if it ran to the end, why it
    was dropped, and after which step other rates were better.
    """

    lr: float
    validation: dict[int, float]
    test: float | None
    dropped: str | None
    beaten: int | None


@dataclass(frozen=True)
class Row:
    """One method with its best rate. `losses` and `exact` are of the test part, by seed; `notes` are for the reader."""

    label: str
    method: str
    settings: dict[str, Any]
    targets: dict[str, Any]
    lr: float
    losses: dict[int, float]
    exact: dict[int, int | None]
    costs: Costs
    rates: tuple[Rate, ...]
    curve: tuple[float, ...]
    notes: tuple[str, ...]

    @property
    def loss(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.losses.values())

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; None of one."""
        return statistics.stdev(self.losses.values()) if len(self.losses) > 1 else None

    @property
    def right(self) -> float | None:
        """The mean number of right answers; None where nothing could be asked."""
        found = [count for count in self.exact.values() if count is not None]
        return statistics.fmean(found) if found else None


@dataclass(frozen=True, slots=True)
class Absent:
    """A method that could not be compared, and why."""

    label: str
    reason: str


@dataclass(frozen=True)
class Base:
    """The untrained model on the test part."""

    loss: float
    exact: int | None
    parameters: int


@dataclass(frozen=True)
class Comparison:
    """Everything that was found out; `rows` from the best test loss to the worst. `rows_of` counts rows by part."""

    config: dict[str, Any]
    base: Base
    rows: tuple[Row, ...]
    absent: tuple[Absent, ...]
    rows_of: dict[str, int]
    said: tuple[str, ...]
    environment: dict[str, Any]
    seconds: dict[str, float]
    path: str | None = field(default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        rows = [{**asdict(row), "loss": row.loss, "spread": row.spread, "right": row.right} for row in self.rows]
        return {**asdict(self), "rows": rows}


HEADERS = (
    "method",
    "test loss",
    "exact match",
    "trained",
    "of base",
    "frozen extra",
    "adapter + optimiser",
    "saved for backward",
    "step time / LoRA",
    "best rate",
    "note",
)


def cells(found: Comparison) -> list[tuple[str, ...]]:
    """The table's rows as texts, the untrained base first."""
    asked, blank = found.rows_of["answered"], ("",) * (len(HEADERS) - 3)
    lines = [("(base)", f"{found.base.loss:.4f}", _share(found.base.exact, asked), *blank)]
    number = 0
    for row in found.rows:
        number += bool(row.notes)
        spread = "" if row.spread is None else f" ± {row.spread:.4f}"
        ratio = row.costs.step_time_over_lora
        lines.append(
            (
                row.label,
                f"{row.loss:.4f}{spread}",
                _share(row.right, asked),
                f"{row.costs.parameters:,}",
                f"{row.costs.share:.2%}",
                f"{row.costs.frozen:,}",
                f"{row.costs.adapter_bytes / 1e6:.2f} MB",
                f"{row.costs.saved_bytes / 1e6:.2f} MB",
                "-" if ratio is None else f"{ratio:.2f}",
                f"{row.lr:g}",
                f"[{number}]" if row.notes else "",
            )
        )
    return lines


def _share(right: float | None, asked: int) -> str:
    return "-" if right is None or not asked else f"{right / asked:.1%}"


def remarks(found: Comparison) -> list[str]:
    """What must be read with the table, one sentence each."""
    noted = [row for row in found.rows if row.notes]
    said = [f"[{number}] {row.label}: {' '.join(row.notes)}" for number, row in enumerate(noted, 1)]
    said += [f"Not compared: {one.label}. {one.reason}" for one in found.absent]
    if found.rows and all(len(row.losses) == 1 for row in found.rows):
        said.append("One seed: a small difference between two methods may be chance; more `seeds` tell.")
    return said


def conditions(found: Comparison) -> str:
    """Under which settings the figures hold, in a paragraph."""
    c, n, e = found.config, found.rows_of, found.environment
    tuned = "every rate ran to the end" if not c["halvings"] else f"halved {c['halvings']} ×"
    return (
        f"{c['steps']} steps of {c['batch_size']} examples on `{c['model']}` ({e['dtype']}, {e['device']}), "
        f"{n['train']} training rows of `{c['data']['path']}`. The learning rate of each method was chosen by the loss "
        f"of {n['validation']} validation rows ({tuned}, seed {c['seeds'][0]}); the losses shown are nats per trained "
        f"token on {n['test']} test rows, mean{' ± standard deviation' if len(c['seeds']) > 1 else ''} over "
        f"{len(c['seeds'])} seed{'s' if len(c['seeds']) > 1 else ''}; exact match counts greedy answers to "
        f"{n['answered']} of them. All methods read the same examples in the same order. Memory and time are of each "
        f"method alone: {e['timing']}. Lorica {e['lorica']}, torch {e['torch']}."
    )


def markdown(found: Comparison) -> str:
    """The table with its remarks as a page."""
    lines = [HEADERS, ("---",) * len(HEADERS), *cells(found)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    notes = "\n".join(f"- {text}" for text in remarks(found))
    parts = [f"# {', '.join(found.config['methods'])} on {found.config['model']}", table, conditions(found)]
    return "\n\n".join([*parts, *([notes] if notes else []), f"![quality against parameters]({PLOT})"]) + "\n"


def reserve(folder: Path) -> None:
    """Refuse a folder that holds a comparison already. Raises StorageError."""
    if (folder / RESULTS).exists():
        raise StorageError(f"{folder} holds a comparison already.", hint="Choose another --out.")
    with storage(folder, hint=ROOM):
        folder.mkdir(parents=True, exist_ok=True)


def write(found: Comparison, folder: Path) -> None:
    """results.json, table.md and plot.png. Raises StorageError."""
    from lorica.recipes.compare.plot import comparison_plot

    document = json.dumps(finite(found.to_dict()), indent=1, ensure_ascii=False, allow_nan=False)
    with storage(folder, hint=ROOM):
        write_file(folder / PLOT, comparison_plot(found))
        write_file(folder / TABLE, markdown(found).encode())
        write_file(folder / RESULTS, (document + "\n").encode())


def finite(value: Any) -> Any:
    """JSON has no infinities and no NaN: they are null there."""
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def edge_note(rates: Sequence[float], best: float) -> str | None:
    """A warning where the best rate is at an end of those tried."""
    if len(rates) < 2 or best not in (min(rates), max(rates)):
        return None
    end, way = ("largest", "larger") if best == max(rates) else ("smallest", "smaller")
    return f"The best rate is the {end} of those tried; a {way} one may be better."
