"""Running a paper's experiment over seeds, and saving page, picture and record together.

In: a paper, a scale, overrides, how many seeds. Out: a `Record`; `save` writes NAME.json, NAME.png and NAME.md. Refuses
to know terminals: progress goes to a function.
"""

from __future__ import annotations

import platform
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import lorica
from lorica.core.config import Config
from lorica.core.errors import ConfigError, LoricaError, MethodError
from lorica.core.storage import storage, write_file
from lorica.papers.base import PaperCheck, Say
from lorica.papers.kit.page import render
from lorica.papers.kit.plot import draw
from lorica.papers.kit.record import Record, digest, rounded
from lorica.papers.kit.table import Row, Table
from lorica.recipes.config import override

SEEDS = 3
"""Seeds of a page, at least: fewer have no spread worth printing."""


def settings_of(paper: PaperCheck[Any], scale: str, overrides: Sequence[str] = ()) -> Config:
    """The settings of a scale with `key=value` on top. Raises ConfigError."""
    settings: Config = paper.settings(scale)
    return type(settings).parse(override(settings.model_dump(), overrides))


def run_paper(
    paper: PaperCheck[Any], scale: str, say: Say, *, seeds: int | None = None, overrides: Sequence[str] = ()
) -> Record:
    """Run the experiment once for each seed (0, 1, …; None takes the paper's number) and judge the whole. Raises
    ConfigError, and whatever the experiment raises.
    """
    seeds = paper.seeds if seeds is None else seeds
    if seeds < 1:
        raise ConfigError(f"The number of seeds is {seeds}; at least 1 is right.")
    settings = settings_of(paper, scale, overrides)
    began, worked, rows = time.monotonic(), time.process_time(), []
    for seed in range(seeds):
        say(f"{paper.name}: seed {seed} of 0…{seeds - 1}, {scale} settings")
        rows.append(tuple(_one(paper, settings, seed, say)))
    table = Table.of(rows, paper.keys, tuple(paper.columns))
    verdict = paper.judge(table)
    return Record(
        paper=paper.name,
        scale=scale,
        settings=settings.model_dump(mode="json"),
        digest=digest(paper, settings),
        seeds=tuple(range(seeds)),
        rows=tuple(rows),
        shows=verdict.shows,
        sentence=verdict.sentence,
        seconds=round(time.monotonic() - began, 1),
        cpu_seconds=round(time.process_time() - worked, 1),
        command=command_line(paper, scale, seeds, overrides),
        versions=versions(),
    )


def _one(paper: PaperCheck[Any], settings: Config, seed: int, say: Say) -> list[Row]:
    """One seed. Torch's global random state is a function of the seed inside, and as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found: list[Row] = paper.run(settings, seed, say)
    if not found:
        raise MethodError(f"The experiment of {paper.name!r} gave no rows for seed {seed}.")
    return [rounded(row) for row in found]


def judged_again(paper: PaperCheck[Any], record: Record) -> Record:
    """A stored record with the verdict that the paper gives now: for sentences and bounds that changed."""
    verdict = paper.judge(record.table(paper))
    return replace(record, shows=verdict.shows, sentence=verdict.sentence)


def save(paper: PaperCheck[Any], record: Record, folder: Path) -> Path:
    """Write the record, the picture and the page. Returns the page's path. Raises StorageError."""
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / f"{paper.name}.json", record.to_json().encode())
        plots = paper.plots(record.table(paper))
        if plots:
            write_file(folder / f"{paper.name}.png", draw(plots))
        page = folder / f"{paper.name}.md"
        write_file(page, render(paper, record).encode())
    return page


def command_line(paper: PaperCheck[Any], scale: str, seeds: int, overrides: Sequence[str] = ()) -> str:
    """The command that runs this again."""
    words = ["lorica", "papers", "run", paper.name]
    words += ["--scale", scale] if scale != "small" else []
    words += ["--seeds", str(seeds)] if seeds != paper.seeds else []
    for text in overrides:
        words += ["--set", text]
    return shlex.join(words)


def versions() -> dict[str, str]:
    """What the numbers may depend on."""
    found = {"lorica": lorica.__version__, "torch": torch.__version__.partition("+")[0], "python": _python()}
    for package in ("transformers", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _python() -> str:
    return platform.python_version()


def why_stale(paper: PaperCheck[Any], record: Record) -> LoricaError | None:
    """Why a stored record is not what the paper would measure now; None where it is."""
    now = digest(paper, settings_of(paper, record.scale))
    if record.digest != now:
        return MethodError(
            f"The stored results of {paper.name!r} were measured with other settings than the paper has now.",
            hint=f"Run `lorica papers run {paper.name}`.",
        )
    return None
