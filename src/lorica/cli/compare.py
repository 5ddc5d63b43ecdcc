"""`lorica compare`: several methods on one base in the same batches, each with its best learning rate, side by side.

In: methods, data, settings. Out: a table on stdout, and files where `--out` says so. Refuses to know how it is done:
`recipes.compare` does it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorica.cli.output import duration, emit, json_option, table, wants_colour

if TYPE_CHECKING:
    from lorica.recipes.compare.report import Comparison

FLAGS = {
    "model": "model",
    "data": "data.path",
    "validation": "data.eval_path",
    "test": "test_path",
    "targets": "targets",
    "quantize": "quantize",
    "steps": "steps",
    "batch_size": "batch_size",
    "lr_grid": "lr_grid",
    "seeds": "seeds",
    "together": "together",
}
"""Flag → field of `CompareConfig`. Everything else is set as KEY=VALUE."""
LISTS = ("lr_grid", "seeds", "targets")


@click.command()
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--methods", required=True, help="`lora,lora:rank=16,dora`; `all` is every method, `all,-delta` all but one."
)
@click.option("--data", required=True, help="JSONL, JSON, parquet or text file, or everyday:train.")
@click.option("--validation", help="File whose loss chooses learning rates; without it, rows of --data are held out.")
@click.option("--test", help="File that the table is measured on; without it, rows of --data are held out.")
@click.option("--model", help="Built-in name, local directory or hub id.")
@click.option("--targets", help="Sites that every method adapts: `q_proj,v_proj`; without it, each method's own.")
@click.option(
    "--quantize", metavar="KIND[,KEY=VALUE]", help="Pack the base's linear weights: nf4 (QLoRA), nvfp4, nf3, …"
)
@click.option("--steps", type=int, help="Optimiser steps of a whole run.")
@click.option("--batch-size", type=int, help="Examples of one optimiser step.")
@click.option(
    "--lr-grid", help="Learning rates to try for every method: `1e-3,3e-3`; without it, around each one's own."
)
@click.option("--seeds", help="`0,1,2`: the first tunes, the winners run with all of them.")
@click.option("--together", type=int, help="Candidates in memory at a time; the result does not depend on it.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to make: results.json, table.md, plot.png.")
@click.option("--save-adapters", is_flag=True, help="Keep each method's best adapter in the folder of --out.")
@json_option
def command(
    settings: tuple[str, ...], methods: str, out: Path | None, save_adapters: bool, as_json: bool, **flags: Any
) -> None:
    """Train several methods in the same batches, and show what each gains and costs.

    Every method tries several learning rates; the worse half is given up twice on the way, by the loss of validation
    rows. The best is measured on test rows: loss, exact match, parameters, memory, time of a step. KEY=VALUE sets any
    other field (halvings=0, optimizer.schedule=linear).

    \b
    lorica compare --methods lora,dora,vera --data everyday:train --test everyday:test --out compared
    lorica compare --methods lora:rank=4,lora:rank=16 --data rows.jsonl --seeds 0,1,2
    lorica compare --methods all,-delta --data rows.jsonl --steps 100 --json
    """
    if save_adapters and out is None:
        raise click.UsageError("--save-adapters needs --out: adapters are kept in its folder.")
    wrong = next((part for part in settings if "=" not in part), None)
    if wrong is not None:
        raise click.UsageError(f"{wrong!r} is not of the form KEY=VALUE; methods are given with --methods.")
    config = _config(settings, methods, flags)
    from lorica.cli.stages import StageObserver
    from lorica.recipes import compare

    with StageObserver(quiet=as_json) as observer:
        found = compare.run(config, out, observer, save_adapters=save_adapters)
    emit(found.to_dict(), "" if as_json else _render(found), as_json=as_json)


def _config(settings: tuple[str, ...], methods: str, flags: dict[str, Any]) -> Any:
    from lorica.recipes.compare.config import CompareConfig, split
    from lorica.recipes.config import override

    given = {key: value for key, value in flags.items() if value is not None}
    values: dict[str, Any] = {"methods": split(methods, ",")}
    for key, value in given.items():
        listed = [part.strip() for part in value.split(",")] if key in LISTS else value
        text = {"include": listed} if key == "targets" else listed
        values = override(values, [f"{FLAGS[key]}={json.dumps(text)}"])
    return CompareConfig.parse(override(values, settings))


def _render(found: Comparison) -> str:
    from lorica.recipes.compare.report import HEADERS, cells, conditions, remarks

    lines = cells(found)
    parts = [_rich(HEADERS, lines) if sys.stdout.isatty() else table(HEADERS, lines), "", conditions(found)]
    parts += ["", *remarks(found)]
    phases = ", ".join(f"{name} {duration(spent)}" for name, spent in found.seconds.items() if name != "total")
    parts += ["", f"Done in {duration(found.seconds['total'])} ({phases})."]
    if found.path is not None:
        parts.append(f"results.json, table.md and plot.png are in {found.path}.")
    return "\n".join(parts)


def _rich(headers: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """The table for a terminal: headers wrap, numbers stand to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(no_color=None if wants_colour(sys.stdout) else True)
    shown = Table(box=box.SIMPLE_HEAD)
    for number, header in enumerate(headers):
        shown.add_column(header, justify="left" if number in (0, len(headers) - 1) else "right")
    for line in lines:
        shown.add_row(*line)
    with console.capture() as kept:
        console.print(shown)
    return kept.get().rstrip()
