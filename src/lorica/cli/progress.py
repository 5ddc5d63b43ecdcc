"""A run's progress: a bar on a terminal, plain lines elsewhere, nothing with `--json`.

In: what a recipe tells its observer. Out: talk on stderr, tokens per second, loss and time left included.
Refuses to know how a step is made.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lorica.cli.output import duration, say, wants_colour
from lorica.recipes.sft import Observer, Plan

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINES = 20
"""Plain progress lines of a whole run, about."""


class ProgressObserver(Observer):
    """Shows steps as they are done. Use it as a context, so that the bar is gone after an error."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._pace = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar down and leave its last state on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def talk(self, text: str) -> None:
        """A line above the bar."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            say(text)

    def prepared(self, plan: Plan) -> None:
        if self.quiet or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        console = Console(stderr=True, no_color=None if wants_colour(sys.stderr) else True)
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
        self._bar = Progress(*columns, console=console)
        self._bar.start()
        self._task = self._bar.add_task("training", total=plan.steps, figures="")

    def step(self, record: dict[str, Any], total: int) -> None:
        seconds, number = record["seconds"], record["step"]
        self._pace = seconds if not self._pace else 0.9 * self._pace + 0.1 * seconds
        left = duration(self._pace * (total - number))
        figures = f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s  {left} left"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=number, figures=figures)
        elif number in (1, total) or number % max(1, total // LINES) == 0:
            self.talk(f"step {number}/{total}  {figures}")

    def evaluated(self, record: dict[str, Any]) -> None:
        self.talk(f"step {record['step']}: evaluation loss {record['eval_loss']:.3f}")

    def saved(self, path: Path) -> None:
        if not sys.stderr.isatty():
            self.talk(f"saved {path}")
