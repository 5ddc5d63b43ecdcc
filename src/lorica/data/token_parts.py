"""Which tokens of a record are its question, the header of the assistant's turn, its answer, or the rest.

In: a renderer and a record, or what is asked and the tokens that were sampled behind it. Out: tokens with the part of
each, and the mask of those that count. The header is what the chat template writes between the question and the first
word of the answer; whether it belongs to the answer is for the caller to say. Refuses to know models and classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lorica.core.errors import DataError
from lorica.data.example import Example
from lorica.data.records import Chat, Completion, Record
from lorica.data.render import Renderer
from lorica.data.turns import Message

Part = Literal["question", "header", "answer", "rest"]
Which = Literal["question", "answer", "all"]
WHICH: tuple[Which, ...] = get_args(Which)


@dataclass(frozen=True, slots=True)
class Parted:
    """Tokens and the part of each. An answer ends with its stop token; what a template writes after the last one, and
    running text, which asks nothing, is `rest`.
    """

    tokens: tuple[int, ...]
    parts: tuple[Part, ...]
    where: str = "row"

    def mask(self, which: Which, *, header_in_answer: bool) -> tuple[bool, ...]:
        """Which tokens count: those of the question, of the answer (with or without its header), or all.

        Raises DataError where none does.
        """
        wanted: set[Part] = {"question"} if which == "question" else {"answer"}
        wanted |= {"header"} if which == "answer" and header_in_answer else set()
        found = tuple(which == "all" or part in wanted for part in self.parts)
        if not any(found):
            raise DataError(f"{self.where} has no tokens of {which!r}; running text has a mean over 'all' only.")
        return found

    def answered(self, tokens: Sequence[int]) -> Parted:
        """With sampled tokens behind it, as the answer."""
        return Parted((*self.tokens, *tokens), (*self.parts, *_run("answer", len(tokens))), self.where)


def parted(renderer: Renderer, record: Record) -> Parted:
    """The tokens that training would see, each with its part. Of a conversation, every turn of the assistant that
    answers is an answer, whatever its weight; all else is question. Raises DataError as rendering does.
    """
    example, record = renderer.example(record), renderer.turned(record)
    parts: list[Part] = ["rest"] * len(example)
    if isinstance(record, Chat):
        parts = _of_turns(renderer, record, example)
    elif isinstance(record, Completion):
        start = len(renderer.prompt(record.prompt))
        parts = [*_run("question", start), *_run("answer", len(example) - start)]
    return Parted(example.tokens, tuple(parts), example.where)


def _of_turns(renderer: Renderer, chat: Chat, example: Example) -> list[Part]:
    parts = list(_run("question", len(example)))
    end = 0
    for index in [i for i, message in enumerate(chat.messages) if i > 0 and message.get("role") == "assistant"]:
        asked = ask(renderer, chat.messages[:index], chat.where, tools=chat.tools)
        start, header = len(asked.tokens), asked.parts.count("header")
        if example.tokens[:start] != asked.tokens:  # a template that renders earlier turns otherwise
            continue
        end = next((i + 1 for i in range(start, len(example)) if example.tokens[i] in renderer.stop_ids), len(example))
        parts[start - header : end] = [*_run("header", header), *_run("answer", end - start)]
    parts[end:] = _run("rest", len(parts) - end)
    return parts


def ask(
    renderer: Renderer,
    asked: Sequence[Message] | str,
    where: str = "the prompt",
    *,
    tools: Sequence[dict[str, Any]] = (),
) -> Parted:
    """What is asked, up to where the assistant begins to speak; a text is raw and has no header. Raises DataError."""
    tokens = tuple(renderer.prompt(asked, tools=tools))
    if isinstance(asked, str):
        return Parted(tokens, _run("question", len(tokens)), where)
    text = renderer.template.render(asked, prompt=False, tools=tools, where=where)
    before = renderer.template.encode(text, [])[0]
    # a token that lies across the border ends in the header, and counts there
    question = next((i for i, (a, b) in enumerate(zip(tokens, before, strict=False)) if a != b), len(before))
    question = min(question, len(tokens))
    return Parted(tokens, (*_run("question", question), *_run("header", len(tokens) - question)), where)


def _run(part: Part, count: int) -> tuple[Part, ...]:
    return (part,) * count
