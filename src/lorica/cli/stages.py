"""Progress of a recipe with stages: a bar on a terminal, a line for each stage elsewhere, nothing with `--json`.

In: what a recipe tells its observer. Out: talk on stderr. Refuses to know what is being done.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Self

from lorica.cli.output import say, wants_colour
from lorica.recipes.observer import Observer

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class StageObserver(Observer):
    """Shows stages as they go. Use it as a context, so that the bar is gone after an error."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: tuple[Progress, TaskID] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None

    def say(self, text: str) -> None:
        if not self.quiet:
            self._close()
            say(text)

    def stage(self, text: str, total: int) -> None:
        if not sys.stderr.isatty():
            self.say(f"» {text}")
            return
        self._close()
        if self.quiet:
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True, no_color=None if wants_colour(sys.stderr) else True)
        bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console)
        bar.start()
        self._bar = bar, bar.add_task(text, total=total)

    def advance(self, units: int) -> None:
        if self._bar is not None:
            self._bar[0].advance(self._bar[1], units)
