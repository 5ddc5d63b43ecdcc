"""The turns of a conversation, checked and brought to one form.

In: the value of a row's `messages` or `conversations` column. Out: messages with a known role and a text as content;
other fields of a message (tool calls, names) are kept for the chat template. Refuses to know files and tokenizers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from lorica.core.errors import DataError, did_you_mean
from lorica.data.reading import kind

Message = Mapping[str, Any]
"""`role` and `content`, optionally `weight` (a factor on the turn's loss weights), and whatever else the template
prints.
"""

ROLES = ("system", "developer", "user", "assistant", "tool")

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""The `from` of a sharegpt turn, and the role that it means."""


def from_messages(value: Any, place: str) -> tuple[Message, ...]:
    """Turns that say `role` and `content`. Raises DataError naming the turn at fault."""
    return tuple(_message(turn, spot) for turn, spot in _turns(value, "messages", place))


def from_conversations(value: Any, place: str) -> tuple[Message, ...]:
    """Turns that say `from` and `value` (or, as many published files do, `role` and `content`)."""
    return tuple(
        _spoken(turn, spot) if "from" in turn else _message(turn, spot)
        for turn, spot in _turns(value, "conversations", place)
    )


def _turns(value: Any, column: str, place: str) -> list[tuple[Mapping[str, Any], str]]:
    if not isinstance(value, list):
        raise DataError(f"{place}: {column!r} must be a list of turns, but it is {kind(value)}.")
    if not value:
        raise DataError(f"{place}: {column!r} is empty; it needs at least one turn.")
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise DataError(f"{place}: turn {number} of {column!r} must be an object, but it is {kind(turn)}.")
    return [({k: v for k, v in turn.items() if v is not None}, f"{place}: turn {i}") for i, turn in enumerate(value, 1)]


def _spoken(turn: Mapping[str, Any], spot: str) -> Message:
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        near = did_you_mean(str(speaker), SPEAKERS)
        raise DataError(f"{spot} is from {speaker!r}; known speakers are {', '.join(SPEAKERS)}.{near}")
    if "value" not in turn:
        raise DataError(f"{spot} has no 'value'.")
    rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
    return {
        **rest,
        **_weight(rest, SPEAKERS[speaker], spot),
        "role": SPEAKERS[speaker],
        "content": _content(turn["value"], "value", spot),
    }


def _message(turn: Mapping[str, Any], spot: str) -> Message:
    role = turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        said = "has no 'role'" if role is None else f"has the role {role!r}"
        raise DataError(f"{spot} {said}; known roles are {', '.join(ROLES)}.{did_you_mean(str(role), ROLES)}")
    if "content" not in turn and not turn.get("tool_calls"):
        raise DataError(f"{spot} has no 'content'.")
    return {
        **turn,
        **_weight(turn, role, spot),
        "role": role,
        "content": _content(turn.get("content", ""), "content", spot),
    }


def _content(value: Any, field: str, spot: str) -> str:
    """A text, or a list of text parts (joined). Other parts, such as images, are refused."""
    if isinstance(value, list):
        for part in value:
            if (
                not isinstance(part, dict)
                or part.get("type", "text") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise DataError(f"{spot}: {field!r} holds a part that is not text, and only text can be trained.")
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise DataError(f"{spot}: {field!r} must be a text, but it is {kind(value)}.")
    return sound(value, f"{spot}: {field!r}")


def _weight(turn: Mapping[str, Any], role: str, spot: str) -> dict[str, float]:
    if "weight" not in turn:
        return {}
    weight = turn["weight"]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise DataError(f"{spot}: 'weight' must be a number from 0 up, but it is {weight!r}.")
    if role != "assistant" and weight:
        raise DataError(
            f"{spot} is the {role}'s and has the weight {weight}; only an assistant's turn can be given a weight."
        )
    return {"weight": float(weight)}


def sound(text: str, spot: str) -> str:
    """The text itself. Raises DataError when it cannot be written as UTF-8 (half of a surrogate pair from a JSON
    escape).
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{spot} holds half a Unicode surrogate pair (\\u{ord(text[error.start]):04x}), which is not a character."
        ) from None
    return text


def tools(value: Any, place: str) -> tuple[dict[str, Any], ...]:
    """Function descriptions: a list of objects, or (as parquet files store it) the same as a JSON text."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(f"{place}: 'tools' is a text that is not JSON.") from None
    if value is None or value == "":
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{place}: 'tools' must be a list of objects, but it is {kind(value)}.")
    return tuple(value)
