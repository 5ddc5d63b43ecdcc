"""What the terminal sees: data on stdout, talk on stderr, one JSON document where `--json` asks for it.

In: plain values and text. Out: text with colour on a terminal only, never with NO_COLOR. Refuses to know commands.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import click

from lorica.core.jsonable import plain

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document; stderr holds errors only.")


def say(text: str = "") -> None:
    """Talk, on stderr."""
    click.echo(text, err=True)


def emit(document: Any, text: str, *, as_json: bool) -> None:
    """A command's result, on stdout."""
    click.echo(json.dumps(plain(document), ensure_ascii=False, allow_nan=False) if as_json else text)


def report_error(code: str, message: str, hint: str | None, *, as_json: bool) -> None:
    """One sentence and perhaps a hint, on stderr."""
    if as_json:
        say(json.dumps({"error": {"code": code, "message": message, "hint": hint}}, ensure_ascii=False))
        return
    colour = wants_colour(sys.stderr)
    say(f"{_bold('error', '31', colour)}: {message}")
    if hint:
        say(f"{_bold('hint', '36', colour)}: {hint}")


def wants_colour(stream: IO[str]) -> bool:
    """Whether to colour what goes to a stream: a terminal, and NO_COLOR is not set (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _bold(word: str, code: str, colour: bool) -> str:
    return f"\x1b[1;{code}m{word}\x1b[0m" if colour else word


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned columns, no wrapping; numbers stand to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(headers), *cells]) for i in range(len(headers))]
    right = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(headers))]

    def line(parts: Sequence[str]) -> str:
        padded = (p.rjust(w) if r else p.ljust(w) for p, w, r in zip(parts, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    head = line(headers)
    if wants_colour(sys.stdout):
        head = f"\x1b[1m{head}\x1b[0m"
    return "\n".join([head, *map(line, cells)])


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def size(count: float) -> str:
    """Bytes for people: `1.5 GB`, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds for people: `1 h 05 min`, `2 min 03 s`, `4.2 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    return (
        f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {round(seconds) % 60:02d} s"
    )


def shell(path: Path | str) -> str:
    """A path as it can be pasted into a shell."""
    import shlex

    return shlex.quote(str(path))
