"""`lorica search`: GLoRA configurations within a budget, and the intrinsic dimension of a data set.

In: settings as KEY=VALUE. Out: the result on stdout; scores and runs in a folder, so that the same command goes on
where it was stopped. Refuses to know how a search is done: `recipes.glora_search` and `recipes.intrinsic_search` do it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from lorica.cli.output import emit, json_option, say, table

F = TypeVar("F", bound=Callable[..., Any])


def _options(command: F) -> F:
    """What both searches take."""
    for option in (
        json_option,
        click.option("--steps", type=int, help="Optimiser steps of one training run."),
        click.option("--out", help="Folder of the search; what it holds already is used again."),
        click.option("--targets", help="Sites to adapt: `q_proj,v_proj`, `all`."),
        click.option("--model", help="Built-in name, local directory or hub id."),
        click.option("--test", help="File that the result is measured on; without it, rows of --data are held out."),
        click.option("--validation", help="File that scores candidates; without it, rows of --data are held out."),
        click.option("--data", required=True, help="JSONL, JSON, parquet or text file, or everyday:train."),
        click.argument("settings", nargs=-1, metavar="[KEY=VALUE]..."),
    ):
        command = option(command)
    return command


FLAGS = {"data": "path", "validation": "eval_path"}
"""Flag → field of `data`; the other flags are fields of the search."""


def _values(settings: tuple[str, ...], flags: dict[str, Any]) -> dict[str, Any]:
    from lorica.recipes.config import override

    wrong = next((part for part in settings if "=" not in part), None)
    if wrong is not None:
        raise click.UsageError(f"{wrong!r} is not of the form KEY=VALUE.")
    given = {key: value for key, value in flags.items() if value is not None}
    values: dict[str, Any] = {"data": {FLAGS[key]: given.pop(key) for key in FLAGS if key in given}}
    if "test" in given:
        values["test_path"] = given.pop("test")
    if "targets" in given:
        values["targets"] = {"include": [part.strip() for part in given.pop("targets").split(",")]}
    return override({**values, **given}, settings)


@click.group()
def command() -> None:
    """Search GLoRA's configurations, or for an intrinsic dimension."""


@command.command()
@_options
@click.option("--largest", type=int, help="Most parameters that the adapter may train.")
@click.option("--rank", type=int, help="Rank of every low-rank pair.")
def glora(settings: tuple[str, ...], largest: int | None, as_json: bool, **flags: Any) -> None:
    """Train a GLoRA supernet and search the best configuration of each site within a budget.

    Configurations are scored on validation rows. KEY=VALUE sets any other field (evolution.generations=10,
    optimizer.lr=1e-3). Prints the path of the adapter; the same command goes on where it was stopped.

    \b
    lorica search glora --data everyday:train --largest 200000 --out runs/glora
    """
    from lorica.cli.stages import StageObserver
    from lorica.recipes import glora_search

    budget = [] if largest is None else [f"evolution.largest={largest}"]
    config = glora_search.GLoRASearchConfig.parse(_values((*budget, *settings), flags))
    with StageObserver(quiet=as_json) as observer:
        report = glora_search.run(config, observer)
    if not as_json:
        say(table(("site", "A,B,C,D,E"), list(report.choices.items())))
        say(
            f"{report.parameters:,} parameters of the supernet's {report.supernet_parameters:,}; loss of the test "
            f"rows {report.test_loss:.4f}, of the base {report.base_test_loss:.4f}."
        )
    emit(_document(report), report.adapter, as_json=as_json)


@command.command()
@_options
@click.option("--metric", help="exact (answers word for word) or probability (of the right tokens).")
@click.option("--structured", is_flag=True, default=None, help="SAID: one trained factor for each tensor.")
def d90(settings: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Find the fewest random directions that reach 90 % of full fine-tuning.

    Learning rates are tuned for each dimension, on validation rows. KEY=VALUE sets any other field
    (grid.smallest=100, grid.rates=[0.01,0.03], grid.seeds=[0,1,2]). Prints the dimension; runs are kept in --out, and
    a search with another grid uses them again.

    \b
    lorica search d90 --data everyday:train --metric probability --out runs/d90
    """
    from lorica.cli.stages import StageObserver
    from lorica.recipes import intrinsic_search

    config = intrinsic_search.IntrinsicSearchConfig.parse(_values(settings, flags))
    with StageObserver(quiet=as_json) as observer:
        report = intrinsic_search.run(config, observer)
    if not as_json:
        rows = [(row.dimension or "all", row.metric, row.lr, len(row.tried)) for row in (*report.rows, report.full)]
        say(table(("dimension", report.metric, "learning rate", "rates tried"), rows))
        say(f"Wanted: {report.target:.4f}. {report.computed} runs were trained and {report.reused} used again.")
    emit(_document(report), "none" if report.d90 is None else str(report.d90), as_json=as_json)


def _document(report: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(report)
