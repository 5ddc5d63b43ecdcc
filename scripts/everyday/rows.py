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
TRAIN_ROWS, TEST_ROWS = 400, 40
"""Rows of each call."""

OPENINGS = ("", "", "", "", "", "please ", "please ", "hey, ", "can you ", "could you ")
STARTS = ("", "", "", "hey, ", "ok, ", "so, ")
CLOSINGS = ("", "", "", "", " please", ", thanks")


@dataclass(frozen=True)
class Row:
    """A request and the answer to it."""

    request: str
    answer: str

    @property
    def key(self) -> str:
        """The request without case and punctuation: two rows are never alike in it."""
        return plain(self.request)

    @property
    def core(self) -> str:
        """The key without filler and politeness: a test row is not even alike in it to a training row."""
        return re.sub(r"^((please|hey|ok|so|can you|could you) )*|( (please|thanks))*$", "", self.key)

    def record(self) -> dict[str, Any]:
        turns = (("user", self.request), ("assistant", self.answer))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}


def plain(request: str) -> str:
    """The letters and digits of a request."""
    return " ".join(re.findall(r"[^\W_]+", request.lower()))


def dressed(template: str, text: str, dice: Dice) -> str:
    """A sentence with politeness, filler and punctuation, as its template allows them."""
    if template.startswith("?"):
        return dice.pick(STARTS) + text + dice.pick(("?", "?", ""))
    if template.startswith("."):
        return dice.pick(STARTS) + text + dice.pick(("", "", ", please", "."))
    opening = dice.pick(OPENINGS)
    closing = "" if "please" in opening else dice.pick(CLOSINGS)
    return opening + text + closing + ("?" if "you " in opening and dice.chance(0.6) else "")


def said(call: str, template: str, dice: Dice) -> Row:
    """A row in the words of a template."""
    speaker = Speaker(call, dice)
    text = expand(parse(with_shared(template.lstrip(".?"), SHARED)), speaker, dice).strip()
    text = dressed(template, text, dice)
    style = dice.between(0, 9)
    if style < 8:
        text = text.lower()
    elif style < 9:
        text = text[0].upper() + text[1:]
    answer = answer_text(call, {key: small(value) for key, value in speaker.values.items()})
    wrong = faults(text, answer)
    assert not wrong, f"{template} gave {text!r} and {answer}: {wrong[0]}"
    return Row(text, answer)


def small(value: Any) -> Any:
    """A value in lower case."""
    return value.lower() if isinstance(value, str) else value


def faults(request: str, answer: str) -> list[str]:
    """What is wrong with a row by itself: its answer's form, or words that its request does not hold."""
    found = problems(answer)
    if found:
        return found
    values = json.loads(answer)
    missing = [part for part in copied_words(values.pop("call"), values) if part not in request.lower()]
    return [f"{part!r} is not in the request" for part in missing]


def make(seed: int, each: int, barred: frozenset[str] = frozenset()) -> list[Row]:
    """`each` rows of every call in a random order; no request is there twice, and none has a core that is barred."""
    dice = Dice(seed)
    rows: list[Row] = []
    taken: set[str] = set()
    for call in CALLS:
        count = 0
        while count < each:
            for template in dice.shuffled(WORDING[call]):
                row = said(call, template, dice)
                if count < each and row.key not in taken and row.core not in barred:
                    taken.add(row.key)
                    rows.append(row)
                    count += 1
    return dice.shuffled(rows)


@cache
def splits() -> dict[str, list[Row]]:
    """All rows of the two generated splits."""
    test = make(TEST_SEED, TEST_ROWS)
    return {"train": make(TRAIN_SEED, TRAIN_ROWS, frozenset(row.core for row in test)), "test": test}
