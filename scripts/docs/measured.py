"""What was measured about each method, as Markdown between two markers of a page.

In: the results that `measure_methods` keeps in docs/methods/measured.json. Out: text, written into the pages.
Refuses to know how anything was measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.docs.markdown import put, table

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "methods"
RESULTS = FOLDER / "measured.json"
HEADERS = (
    "method",
    "trained parameters",
    "share of the base",
    "loss, first → last steps",
    "exact match",
    "time of a step over LoRA's",
)


def read_results() -> dict[str, Any]:
    """The stored results; empty ones where there are none yet."""
    if not RESULTS.is_file():
        return {"settings": {}, "methods": {}}
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def write_results(results: dict[str, Any]) -> None:
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(RESULTS)


def row(name: str, entry: dict[str, Any]) -> tuple[str, ...]:
    """One method's line of the table."""
    return (
        f"[`{name}`]({name}.md)",
        f"{entry['parameters']:,}",
        f"{entry['share']:.2%}",
        f"{entry['first_loss']:.3f} → {entry['loss']:.3f}",
        f"{entry['exact']} of {entry['rows']}",
        f"{entry['step_time_over_lora']:.2f}",
    )


def conditions(results: dict[str, Any]) -> str:
    """Under which settings the figures hold."""
    s, rank = results["settings"], results["methods"]["lora"]["config"]["rank"]
    return (
        f"{s['steps']} steps of {s['batch_size']} examples of `{s['data']}` on `{s['model']}`, float32, one CPU "
        f"thread, seed {s['seed']}. The losses are means of the first and the last five steps. Exact match counts "
        f"answers of `{s['test']}` that equal the expected text, greedily decoded; before training it was "
        f"{results['before']} of {s['rows']}. The time of a step is CPU time over that of LoRA (rank {rank}, "
        f"every linear layer) on the same batches, in turns, in one process: the median of {s['pairs']} pairs. Lorica "
        f"{s['lorica']}, torch {s['torch']}."
    )


def render(results: dict[str, Any], name: str) -> str:
    """What stands between the markers of one method's page."""
    entry = results["methods"][name]
    if "parameters" not in entry:
        return f"{entry['note']}\n\nFound by `python -m scripts.docs.measure_methods --only {name}`."
    said = [table(HEADERS, [row(name, entry)])]
    said.append(f"Settings: `{json.dumps(entry['config'], ensure_ascii=False)}`, learning rate {entry['lr']:g}.")
    if entry.get("note"):
        said.append(entry["note"])
    said += [conditions(results), f"Measured by `python -m scripts.docs.measure_methods --only {name}`."]
    return "\n\n".join(said)


def render_all(results: dict[str, Any]) -> str:
    """What stands between the markers of the overview."""
    rows = [row(name, entry) for name, entry in sorted(results["methods"].items()) if "parameters" in entry]
    notes = [f"`{name}`: {entry['note']}" for name, entry in sorted(results["methods"].items()) if entry.get("note")]
    return "\n\n".join(
        [table(HEADERS, rows), *notes, conditions(results), "Measured by `python -m scripts.docs.measure_methods`."]
    )


def fill(page: Path, text: str) -> None:
    """Put text between the markers of a page."""
    page.write_text(put(page.read_text(encoding="utf-8"), "measured", text), encoding="utf-8")


def fill_pages(results: dict[str, Any]) -> None:
    """Write the figures into every method's page and into the overview."""
    for name in results["methods"]:
        fill(FOLDER / f"{name}.md", render(results, name))
    fill(FOLDER / "index.md", render_all(results))
