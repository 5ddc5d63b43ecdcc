"""Rows out of a file.

In: a path to .jsonl, .ndjson, .json, .parquet or .txt. Out: a list of mappings that remembers where each one stood,
so that every later error can name the line. Anything that cannot be read is one sentence that names the file and the
line. Refuses to know what a row means.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lorica.core.errors import DataError, MissingError, did_you_mean

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".txt")
"""The file names that are read. The first three all accept one object per line or one array of objects."""

_PARAGRAPH = re.compile(r"\n[ \t]*\n")


class Rows(list[dict[str, Any]]):
    """Rows of one file. `where(i)` says where row `i` stood, in words for an error message."""

    def __init__(self, rows: Iterable[dict[str, Any]], places: Iterable[int], unit: str, path: str) -> None:
        super().__init__(rows)
        self.places = tuple(places)
        self.unit = unit
        self.path = path

    def where(self, index: int) -> str:
        """For example `chats.jsonl, line 7`. Lines, rows and items are counted from 1."""
        return f"{self.path}, {self.unit} {self.places[index]}"


def where(rows: list[dict[str, Any]], index: int, path: str | Path) -> str:
    """The place of a row, also for a plain list (whose rows are counted from 1)."""
    return rows.where(index) if isinstance(rows, Rows) else f"{path}, row {index + 1}"


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a data file. Raises MissingError when it is not there and DataError when it cannot be read."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path} is not a data file that Lorica reads: its name must end in {', '.join(SUFFIXES)}.")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        raise MissingError(f"There is no data file {path}.{did_you_mean(path.name, near)}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None


def fingerprint(content: bytes) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of a file's bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def read_rows(path: str | Path) -> Rows:
    """Read every row of a file.

    JSON files hold one object per line, or one array of objects. Blank lines, a byte order mark and Windows line ends
    are accepted. A .txt file gives one row `{"text": ...}` per paragraph; blank lines separate paragraphs.

    Raises:
        MissingError: the file is not there.
        DataError: the file is empty, cut short, of another encoding, or holds something other than objects.
    """
    return parse_rows(read_bytes(path), path)


def parse_rows(content: bytes, path: str | Path) -> Rows:
    """`read_rows` for bytes that were read already; the name decides the format."""
    suffix = Path(path).suffix.lower()
    if not content:
        raise DataError(f"{path} is empty; it must hold at least one row.")
    if suffix == ".parquet":
        rows = _parquet(content, str(path))
    else:
        text = _decode(content, path)
        rows = _paragraphs(text, str(path)) if suffix == ".txt" else _json(text, str(path))
    if not rows:
        raise DataError(f"{path} holds no rows.")
    return rows


def _decode(content: bytes, path: str | Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        hint = (
            f"Convert it first, for example: iconv -f UTF-16 -t UTF-8 {path}"
            if content[:2] in (b"\xff\xfe", b"\xfe\xff")
            else None
        )
        raise DataError(
            f"{path}, line {line} is not UTF-8 text (byte 0x{content[error.start]:02x}).", hint=hint
        ) from None


def _json(text: str, path: str) -> Rows:
    if text.lstrip()[:1] == "[":
        items = _loads(text, path)
        rows = [_object(item, f"{path}, item {number}") for number, item in enumerate(items, 1)]
        return Rows(rows, range(1, len(rows) + 1), "item", path)
    # Only "\n" ends a line: str.splitlines would also cut at U+2028 and U+0085, which JSON strings may contain.
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(numbered) > 1 and numbered[0][1].strip() == "{":
        return Rows([_object(_loads(text, path), path)], [numbered[0][0]], "line", path)
    return Rows(
        [_object(_loads(line, f"{path}, line {number}"), f"{path}, line {number}") for number, line in numbered],
        [number for number, _ in numbered],
        "line",
        path,
    )


def _loads(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # A document of several lines (an array) knows better than `place` where it broke.
        spot = f"{place}, line {error.lineno}" if error.lineno > 1 else place
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        tail = "; the file may be cut short" if cut else ""
        raise DataError(
            f"{spot} is not valid JSON: {error.msg} at column {error.colno}{tail}.",
            hint="A JSON data file holds one object per line, or one array of objects.",
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not usable JSON: {error}.") from None


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place} holds {kind(value)} where an object with named fields is needed.")
    return value


def kind(value: Any) -> str:
    """What a JSON value is, in words for an error message."""
    words = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "nothing (null)" if value is None else words.get(type(value), type(value).__name__)


def _paragraphs(text: str, path: str) -> Rows:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    found = [(line, part) for line, part in _numbered_paragraphs(text) if part.strip()]
    return Rows([{"text": part.strip("\n")} for _, part in found], [line for line, _ in found], "line", path)


def _numbered_paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Paragraphs with the number of the first line that holds something."""
    start, line = 0, 1
    for stop, resume in [*(match.span() for match in _PARAGRAPH.finditer(text)), (len(text), len(text))]:
        part = text[start:stop]
        yield line + len(part) - len(part.lstrip("\n")), part
        line += text.count("\n", start, resume)
        start = resume


def _parquet(content: bytes, path: str) -> Rows:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        arrow_error: type[Exception] = importlib.import_module("pyarrow").ArrowException
    except ImportError:
        raise MissingError(
            f"Reading {path} needs the package 'pyarrow', which is not installed.", hint="pip install pyarrow"
        ) from None
    try:
        rows = parquet.read_table(io.BytesIO(content)).to_pylist()
    except (arrow_error, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise DataError(f"{path} is not a readable parquet file; it may be cut short ({reason}).") from None
    return Rows(rows, range(1, len(rows) + 1), "row", path)
