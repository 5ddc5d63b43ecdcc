"""The calls of the everyday data, their slots in canonical order, and what counts as a canonical value.

In: the text of an answer. Out: the sentences that say what is wrong with it, none when it is right.
Refuses to know requests: whether an answer suits its request is not decided here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from scripts.everyday.kinds import Kind, Number, OneOf, Time, Words

WEEK = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
ROOMS = ("kitchen", "bedroom", "bathroom", "living room", "hallway", "office", "garage", "garden")
UNITS = (
    *("km", "miles", "metres", "feet", "cm", "inches", "kg", "pounds", "litres", "gallons", "celsius", "fahrenheit"),
    *("euros", "dollars"),
)
COLOURS = ("red", "blue", "green", "yellow", "pink", "white")


@dataclass(frozen=True)
class Slot:
    """One slot of a call. An optional one is left out of the answer when the request does not name it."""

    key: str
    kind: Kind
    required: bool = False


@dataclass(frozen=True)
class Call:
    """A call: its slots in the order of the answer, and those of which at least one is there."""

    name: str
    slots: tuple[Slot, ...]
    some: tuple[str, ...] = ()


ROOM = OneOf(ROOMS)
CALLS = {
    call.name: call
    for call in (
        Call(
            "alarm",
            (Slot("time", Time(), True), Slot("day", OneOf(("tomorrow", "weekdays", "weekends", "daily")))),
        ),
        Call(
            "timer",
            (Slot("hours", Number(1, 24)), Slot("minutes", Number(1, 120)), Slot("seconds", Number(1, 120))),
            some=("hours", "minutes", "seconds"),
        ),
        Call("phone", (Slot("who", Words(), True),)),
        Call("music", (Slot("genre", Words(), True), Slot("room", ROOM))),
        Call("weather", (Slot("city", Words()), Slot("day", OneOf(("today", "tonight", "tomorrow", *WEEK))))),
        Call(
            "lights",
            (
                Slot("room", OneOf((*ROOMS, "all")), True),
                Slot("state", OneOf(("on", "off"))),
                Slot("colour", OneOf(COLOURS)),
                Slot("brightness", Number(1, 100)),
            ),
            some=("state", "colour", "brightness"),
        ),
        Call("heating", (Slot("room", ROOM), Slot("degrees", Number(5, 30), True))),
        Call(
            "convert",
            (
                Slot("amount", Number(0, 100_000, decimals=True), True),
                Slot("from", OneOf(UNITS), True),
                Slot("to", OneOf(UNITS), True),
            ),
        ),
    )
}


def answer_text(name: str, values: dict[str, Any]) -> str:
    """The answer as it stands in the data: the call's name first, then its slots in their fixed order."""
    ordered = {slot.key: values[slot.key] for slot in CALLS[name].slots if slot.key in values}
    return json.dumps({"call": name, **ordered}, ensure_ascii=False)


def problems(text: str) -> list[str]:
    """What keeps the text from being a canonical answer."""
    try:
        answer = json.loads(text)
    except ValueError:
        return ["it is not JSON"]
    if not isinstance(answer, dict) or answer.get("call") not in CALLS:
        return ["it names no known call"]
    values = {key: value for key, value in answer.items() if key != "call"}
    return _slot_problems(CALLS[answer["call"]], values) or (
        [] if answer_text(answer["call"], values) == text else ["its keys are out of order, or its spacing is another"]
    )


def _slot_problems(call: Call, values: dict[str, Any]) -> list[str]:
    slots = {slot.key: slot for slot in call.slots}
    found = [f"{call.name} has no slot {key}" for key in values if key not in slots]
    found += [f"{key} is missing" for key, slot in slots.items() if slot.required and key not in values]
    found += [
        f"{key} is {value!r}, not {slots[key].kind.says()}"
        for key, value in values.items()
        if key in slots and not slots[key].kind.admits(value)
    ]
    if call.some and not set(call.some) & set(values):
        found.append(f"none of {', '.join(call.some)} is there")
    return found


def copied_words(call: str, values: dict[str, Any]) -> list[str]:
    """The parts of an answer that a reader finds, case aside, in its request."""
    return [values[s.key] for s in CALLS[call].slots if isinstance(s.kind, Words) and s.key in values]


def table() -> str:
    """The calls and their slots as a markdown table."""
    lines = ["| call | slots, in order; those in brackets are optional |", "| --- | --- |"]
    for call in CALLS.values():
        slots = [f"{s.key}: {s.kind.says()}" if s.required else f"[{s.key}: {s.kind.says()}]" for s in call.slots]
        note = f"; at least one of {', '.join(call.some)}" if call.some else ""
        lines.append(f"| `{call.name}` | {'; '.join(slots)}{note} |")
    return "\n".join(lines)
