"""Rows to records: the shape of a data file, recognised and checked.

In: a path, or rows. Out: a `Dataset` of `Chat`, `Completion` and `Text` records, the shape that was recognised and why.
A row of another shape, or with a field of the wrong type, is an error that names its line and the accepted shapes.
Refuses to know tokens, tokenizers and templates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorica.core.errors import DataError
from lorica.data import turns
from lorica.data.everyday import resolve
from lorica.data.reading import fingerprint, kind, parse_rows, read_bytes, where
from lorica.data.reading import read_rows as read_rows
from lorica.data.turns import Message

ShapeName = Literal["messages", "alpaca", "sharegpt", "prompt_completion", "text"]

ACCEPTED: dict[ShapeName, str] = {
    "messages": '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}',
    "sharegpt": '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}',
    "alpaca": '{"instruction": "…", "input": "…", "output": "…"}  (input may be left out)',
    "prompt_completion": '{"prompt": "…", "completion": "…"}',
    "text": '{"text": "…"}',
}
"""The shapes of a row. When a row fits several, the first in this order counts."""

_NEEDED: dict[ShapeName, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
_OPTIONAL: dict[ShapeName, tuple[str, ...]] = {
    "messages": ("tools",),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system"),
    "prompt_completion": (),
    "text": (),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a file's rows, and the sentence that says how it was recognised."""

    name: ShapeName
    reason: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation. `tools` are the function descriptions that the chat template may print."""

    messages: tuple[Message, ...]
    where: str
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what should follow it."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True, slots=True)
class Text:
    """Running text, all of it to be learnt."""

    text: str
    where: str


Record = Chat | Completion | Text


@dataclass(frozen=True, slots=True)
class Dataset:
    """The records of one file. `ignored` names the columns that no record uses; `fingerprint` identifies the bytes."""

    records: tuple[Record, ...]
    shape: Shape
    path: str
    fingerprint: str
    ignored: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.records)


def load_records(path: str | Path) -> Dataset:
    """Read, recognise and check a data file, or a shipped one by name (`everyday:train`).

    Raises:
        MissingError: the file is not there.
        DataError: a file or row that cannot be used, named by line.
    """
    path = resolve(path)
    content = read_bytes(path)
    rows = parse_rows(content, path)
    shape = recognise(rows, path)
    records = tuple(to_record(row, shape, where(rows, index, path)) for index, row in enumerate(rows))
    return Dataset(records, shape, str(path), fingerprint(content), _unused(rows, shape.name))


def recognise(rows: list[dict[str, Any]], path: str | Path) -> Shape:
    """The one shape of all rows.

    Raises DataError naming the first row that has no shape, or another one than the first row.
    """
    if not rows:
        raise DataError(f"{path} holds no rows.")
    name = _fits(rows[0])
    first = where(rows, 0, path)
    if name is None:
        raise _odd(rows[0], first, None, first)
    for index, row in enumerate(rows):
        if not _has(row, _NEEDED[name]):
            raise _odd(row, where(rows, index, path), name, first)
    fields = " and ".join(repr(field) for field in _NEEDED[name])
    origin = " (one per paragraph)" if _is_text(path) else ""
    every = "the one row has" if len(rows) == 1 else f"all {len(rows)} rows{origin} have"
    return Shape(name, f"{every} {fields}")


def _is_text(path: str | Path) -> bool:
    """Whether the rows were made from a plain text file."""
    return Path(path).suffix.lower() == ".txt"


def _has(row: Mapping[str, Any], fields: tuple[str, ...]) -> bool:
    """Whether all fields are there. Parquet fills absent fields with null, so null counts as absent."""
    return all(row.get(field) is not None for field in fields)


def _fits(row: Mapping[str, Any]) -> ShapeName | None:
    return next((name for name in ACCEPTED if _has(row, _NEEDED[name])), None)


def _odd(row: Mapping[str, Any], place: str, expected: ShapeName | None, first: str) -> DataError:
    other = _fits(row)
    names = ", ".join(repr(key) for key, value in row.items() if value is not None) or "nothing"
    if expected is None:
        said = f"{place} holds {names}, which is none of the accepted shapes."
    elif other is None:
        missing = ", ".join(repr(field) for field in _NEEDED[expected] if row.get(field) is None)
        said = f"{place} lacks {missing} (it holds {names}), while {first} has the shape {expected!r}."
    else:
        said = f"{place} has the shape {other!r}, while {first} has the shape {expected!r}; a file must keep to one."
    return DataError(
        said, hint="Accepted shapes of a row:\n" + "\n".join(f"  {name:<18}{ACCEPTED[name]}" for name in ACCEPTED)
    )


def _unused(rows: list[dict[str, Any]], name: ShapeName) -> tuple[str, ...]:
    used = {*_NEEDED[name], *_OPTIONAL[name]}
    return tuple(dict.fromkeys(str(key) for row in rows for key in row if key not in used))


def to_record(row: Mapping[str, Any], shape: Shape, place: str = "row") -> Record:
    """One row as a record. Raises DataError naming `place` and the field at fault."""
    return _READERS[shape.name](row, place)


def _messages(row: Mapping[str, Any], place: str) -> Record:
    return Chat(turns.from_messages(row["messages"], place), place, turns.tools(row.get("tools"), place))


def _sharegpt(row: Mapping[str, Any], place: str) -> Record:
    said = turns.from_conversations(row["conversations"], place)
    return Chat((*_system(row, place), *said), place, turns.tools(row.get("tools"), place))


def _alpaca(row: Mapping[str, Any], place: str) -> Record:
    instruction, context = _text(row, "instruction", place), _text(row, "input", place, default="")
    asked = f"{instruction}\n\n{context}" if context.strip() else instruction
    _not_blank(asked, "instruction", place)
    answer = {"role": "assistant", "content": _text(row, "output", place)}
    return Chat((*_system(row, place), {"role": "user", "content": asked}, answer), place)


def _prompt_completion(row: Mapping[str, Any], place: str) -> Record:
    prompt, completion = _text(row, "prompt", place), _text(row, "completion", place)
    _not_blank(prompt + completion, "prompt", place)
    return Completion(prompt, completion, place)


def _plain(row: Mapping[str, Any], place: str) -> Record:
    text = _text(row, "text", place)
    _not_blank(text, "text", place)
    return Text(text, place)


def _system(row: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    text = _text(row, "system", place, default="")
    return ({"role": "system", "content": text},) if text else ()


def _text(row: Mapping[str, Any], field: str, place: str, default: str | None = None) -> str:
    value = row.get(field)
    value = default if value is None else value
    if not isinstance(value, str):
        raise DataError(f"{place}: {field!r} must be a text, but it is {kind(value)}.")
    return turns.sound(value, f"{place}: {field!r}")


def _not_blank(text: str, field: str, place: str) -> None:
    if not text.strip():
        raise DataError(f"{place}: {field!r} is empty.")


_READERS: dict[ShapeName, Callable[[Mapping[str, Any], str], Record]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _plain,
}
