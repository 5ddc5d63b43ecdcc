"""The rows of the everyday data: templates said in random words, checked, and split.

In: the split's seed and size. Out: rows of one request and one answer, each request once.
Refuses to know files.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from scripts.everyday.grammar import Dice, expand, parse, with_shared
from scripts.everyday.schema import CALLS, answer_text, copied_words, problems
from scripts.everyday.slots import Speaker
from scripts.everyday.wording import SHARED, WORDING

TRAIN_SEED, TEST_SEED = 11, 12
TRAIN_ROWS, TEST_ROWS = 310, 39
"""Rows of each call."""

OPENINGS = (
    *("", "", "", "", "", "", "please ", "please ", "hey, ", "ok, ", "go ahead and "),
    *("can you ", "could you ", "would you ", "can you please ", "could you please "),
    *("I need you to ", "I'd like you to "),
)
STARTS = ("", "", "", "", "", "hey, ", "ok, ", "so, ", "hi, ", "right, ")
CLOSINGS = ("", "", "", "", "", "", "", " please", ", please", ", thanks", " thanks", " for me")
FREE = ("text", "task")
"""Slots whose words would swallow a `please` after them."""


@dataclass(frozen=True)
class Row:
    """A request and the answer to it."""

    request: str
    answer: str

    @property
    def key(self) -> str:
        """The request without case and punctuation: two rows are never alike in it."""
        return plain(self.request)

    def record(self) -> dict[str, Any]:
        turns = (("user", self.request), ("assistant", self.answer))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}


def plain(request: str) -> str:
    """The letters and digits of a request."""
    return " ".join(re.findall(r"[^\W_]+", request.lower()))


def dressed(template: str, text: str, ends_free: bool, dice: Dice) -> str:
    """A sentence with politeness, filler and punctuation, as its template allows them."""
    if template.startswith("?"):
        return dice.pick(STARTS) + text + dice.pick(("?", "?", "?", ""))
    if template.startswith("."):
        closing = dice.pick(("", "", "", "" if ends_free else ", please"))
        return dice.pick(STARTS) + text + closing + dice.pick(("", "", "."))
    opening = dice.pick(OPENINGS)
    asks = "you " in opening and opening[0] in "cw"
    closing = "" if ends_free else dice.pick(CLOSINGS)
    if "please" in opening and "please" in closing:
        closing = ""
    return opening + text + closing + dice.pick(("?", "?", "") if asks else ("", "", "", ".", "!"))


def said(call: str, template: str, dice: Dice, testing: bool) -> Row | None:
    """A row in the words of a template; None where the dice made no good one."""
    speaker = Speaker(call, dice, testing)
    text = expand(parse(with_shared(template.lstrip(".?"), SHARED)), speaker, dice).strip()
    values = speaker.values
    ends_free = any(text.rstrip("'\"").endswith(str(values.get(key))) for key in FREE)
    text = dressed(template, text, ends_free, dice)
    style = dice.between(0, 9)
    if style < 7:
        text = text.lower()
    elif style < 9:
        text = text[0].upper() + text[1:]
    if "from" in values and values["from"] == values.get("to"):
        return None
    answer = answer_text(call, {key: small(value) for key, value in values.items()})
    wrong = faults(text, answer)
    assert not wrong, f"{template} gave {text!r} and {answer}: {wrong[0]}"
    return Row(text, answer)


def small(value: Any) -> Any:
    """A value in lower case."""
    if isinstance(value, list):
        return [small(item) for item in value]
    return value.lower() if isinstance(value, str) else value


def faults(request: str, answer: str) -> list[str]:
    """What is wrong with a row by itself: its answer's form, or words that its request does not hold."""
    found = problems(answer)
    if found:
        return found
    values = json.loads(answer)
    missing = [part for part in copied_words(values.pop("call"), values) if part not in request.lower()]
    return [f"{part!r} is not in the request" for part in missing]


def make(seed: int, each: int, taken: set[str], testing: bool) -> list[Row]:
    """`each` rows of every call in a random order; no request is in `taken`, which learns the new ones."""
    dice = Dice(seed)
    rows: list[Row] = []
    for call in CALLS:
        count = 0
        while count < each:
            for template in dice.shuffled(WORDING[call]):
                row = said(call, template, dice, testing)
                if row is not None and row.key not in taken and count < each:
                    taken.add(row.key)
                    rows.append(row)
                    count += 1
    return dice.shuffled(rows)


@cache
def splits() -> dict[str, list[Row]]:
    """All rows of the two generated splits."""
    taken: set[str] = set()
    train = make(TRAIN_SEED, TRAIN_ROWS, taken, testing=False)
    return {"train": train, "test": make(TEST_SEED, TEST_ROWS, taken, testing=True)}
