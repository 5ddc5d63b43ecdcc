"""Records to tokens with a loss weight for each.

In: a tokenizer and a record. Out: `Example(tokens, weights)`, the generation prompt of a conversation, and the text of
sampled tokens. The assistant's words and the token that stops them have weight 1, everything else 0.
Refuses to know files, batches and models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from lorica.core.errors import ConfigError, DataError, did_you_mean
from lorica.data.example import Example as Example
from lorica.data.example import TruncationReport as TruncationReport
from lorica.data.example import truncate as truncate
from lorica.data.records import Chat, Completion, Dataset, Record, Text
from lorica.data.template import Template, Tokenizer
from lorica.data.turns import Message

TrainOn = Literal["assistant", "last", "all"]
AsChat = bool | Literal["auto"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """The examples that a run will see, how long every row was before any limit, and what a limit cost (None without
    one).
    """

    examples: list[Example]
    lengths: tuple[int, ...]
    truncation: TruncationReport | None


def prepare(dataset: Dataset, renderer: Renderer, max_length: int | None = None) -> Prepared:
    """Render every record, then cut to `max_length` tokens. Raises DataError naming the first line that cannot be
    rendered.
    """
    examples = [renderer.example(record) for record in dataset.records]
    lengths = tuple(map(len, examples))
    if max_length is None:
        return Prepared(examples, lengths, None)
    kept, report = truncate(examples, max_length)
    return Prepared(kept, lengths, report)


def _template(tokenizer: Tokenizer) -> Template | DataError:
    """The chat template, or why there is none: an error that is raised only if a conversation must be rendered."""
    try:
        return Template(tokenizer)
    except DataError as error:
        return error


class Renderer:
    """Renders records with one tokenizer.

    Args:
        tokenizer: any tokenizer of `transformers`.
        train_on: what has weight in a conversation. `assistant`: every turn of the assistant with its stop token, times
            the turn's own `weight` where the data gives one. `last`: only the last such turn. `all`: every token.
        chat: whether prompt/completion rows become two turns. `auto`: if the tokenizer has a chat template.

    An assistant's turn that opens a conversation answers nothing and has no weight unless all has.
    Running text is trained whole, and raw completions with the end-of-text token after them.
    """

    def __init__(self, tokenizer: Any, *, train_on: TrainOn = "assistant", chat: AsChat = "auto") -> None:
        if train_on not in get_args(TrainOn):
            known = get_args(TrainOn)
            raise ConfigError(
                f"train_on is {train_on!r}; it must be one of {', '.join(known)}.{did_you_mean(str(train_on), known)}"
            )
        if chat not in (True, False, "auto"):
            raise ConfigError(f"chat is {chat!r}; it must be true, false or 'auto'.")
        self.tokenizer = cast(Tokenizer, tokenizer)
        self._train_on = train_on
        self._template = _template(self.tokenizer)
        self._completions_as_chat = bool(tokenizer.chat_template) if chat == "auto" else bool(chat)
        self._decided = chat == "auto"
        stops = [self._template.probe.stop] if isinstance(self._template, Template) else []
        stops += [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        self.stop_ids: frozenset[int] = frozenset(stops)

    @property
    def template(self) -> Template:
        """The chat template. Raises DataError when the tokenizer has none that can be trained."""
        if isinstance(self._template, DataError):
            raise self._template
        return self._template

    def decisions(self, dataset: Dataset) -> list[str]:
        """What this renderer does with the rows of a data set, one sentence each."""
        name = dataset.shape.name
        if name == "text":
            return ["Every token is trained, and the end-of-text token after each row."]
        if name == "prompt_completion" and not self._completions_as_chat:
            why = " because the tokenizer has no chat template" if self._decided else ""
            what = "the completion and the end-of-text token after it are trained"
            return [f"Prompt and completion are joined as raw text{why}; {what}."]
        said = []
        if name == "prompt_completion":
            why = " because the tokenizer has a chat template" if self._decided else ""
            said.append(f"Prompt and completion become a user's and an assistant's turn{why}.")
        what = {
            "assistant": "Every assistant turn",
            "last": "The last assistant turn",
            "all": "The whole conversation",
        }[self._train_on]
        stop = self.template.special.get(self.template.probe.stop, "")
        return [*said, f"{what} is trained, including the stop token {stop}".rstrip() + "."]

    def example(self, record: Record) -> Example:
        """Tokens and weights of one record.

        Raises DataError naming the record's line: no assistant turn, no trained token, a conversation that the template
        refuses, or a template that renders earlier turns differently once later ones follow.
        """
        record = self.turned(record)
        if isinstance(record, Chat):
            return self._chat(record)
        if isinstance(record, Completion):
            head, tail = self._raw(record.prompt), self._plain(record.completion)
            tail = [*tail, self._eos(record)]
            return self._checked(head + tail, [0.0] * len(head) + [1.0] * len(tail), record.where)
        body = self._raw(record.text)
        body = body if body and body[-1] == self._eos(record) else [*body, self._eos(record)]
        return self._checked(body, [1.0] * len(body), record.where)

    def turned(self, record: Record) -> Record:
        """A completion that is rendered as two turns, as these turns; any other record as it is."""
        if isinstance(record, Completion) and self._completions_as_chat:
            said = ({"role": "user", "content": record.prompt}, {"role": "assistant", "content": record.completion})
            return Chat(said, record.where)
        return record

    def prompt(self, messages: Sequence[Message] | str, *, tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Tokens up to where the assistant begins to speak: exactly a prefix of the training example that answers them.

        A text instead of messages is raw: the tokens that a raw completion follows.
        Text that spells a control token is read as one here, as in `transformers`; in training data it is refused.
        """
        if isinstance(messages, str):
            return self._raw(messages)
        chat = Chat(tuple(messages), "the prompt", tuple(tools))
        text = self.template.render(messages, prompt=True, tools=tools, where=chat.where)
        cuts = [len(opening) for _, opening in self._openings(chat) if text.startswith(opening)]
        return self.template.encode(text, cuts)[0]

    def parse(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """The assistant's words in sampled tokens, and whether a stop token ended them. What follows it is not read."""
        end = next((i for i, token in enumerate(tokens) if token in self.stop_ids), None)
        text = str(
            self.tokenizer.decode(list(tokens[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        if isinstance(self._template, Template):
            text = text.removeprefix(self._template.probe.before)
            text = text.removesuffix(self._template.probe.after) if end is not None else text
        return text, end is not None

    def _openings(self, chat: Chat) -> list[tuple[int, str]]:
        """For each assistant turn its index and the text before it, generation prompt included."""
        turns = [i for i, message in enumerate(chat.messages) if message.get("role") == "assistant" and i > 0]
        return [
            (i, self.template.render(chat.messages[:i], prompt=True, tools=chat.tools, where=chat.where)) for i in turns
        ]

    def _chat(self, chat: Chat) -> Example:
        self.template.refuse_control_tokens(chat.messages, chat.where)
        openings = self._openings(chat)
        if not openings:
            raise DataError(
                f"{chat.where} has no assistant turn that answers another turn, so there is nothing to train."
            )
        text = self.template.render(chat.messages, prompt=False, tools=chat.tools, where=chat.where)
        wanted = self._wanted(chat, [index for index, _ in openings])
        kept = [(index, opening) for index, opening in openings if text.startswith(opening)]
        if not wanted <= {index for index, _ in kept}:
            hint = "Set train_on to 'last'." if openings[-1] in kept and self._train_on == "assistant" else None
            raise DataError(
                f"{chat.where}: the chat template renders an assistant turn differently from its own prompt.", hint=hint
            )
        tokens, starts = self.template.encode(text, [len(opening) for _, opening in kept])
        weights = [1.0 if self._train_on == "all" else 0.0] * len(tokens)
        for (index, _), start, limit in zip(kept, starts, [*starts[1:], len(tokens)], strict=True):
            if index not in wanted:
                continue
            stop = next((i for i in range(start, limit) if tokens[i] in self.stop_ids), None)
            if stop is None:
                raise DataError(f"{chat.where}: the chat template puts no stop token after turn {index + 1}.")
            weights[start : stop + 1] = [float(chat.messages[index].get("weight", 1.0))] * (stop + 1 - start)
        return self._checked(tokens, weights, chat.where)

    def _wanted(self, chat: Chat, turns: Sequence[int]) -> set[int]:
        """The turns whose place among the tokens must be known, because their weights are set apart from the rest."""
        if self._train_on == "last":
            return {turns[-1]}
        return {i for i in turns if self._train_on == "assistant" or "weight" in chat.messages[i]}

    def _raw(self, text: str) -> list[int]:
        """Tokens of raw text as the tokenizer likes to open it (some put a token in front), without a closing token."""
        plain = self._plain(text)
        opened = self.tokenizer.encode(text, add_special_tokens=True, verbose=False)
        bos = self.tokenizer.bos_token_id
        return [int(bos), *plain] if bos is not None and opened[:1] == [bos] and plain[:1] != [bos] else plain

    def _plain(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer.encode(text, add_special_tokens=False, verbose=False)]

    def _eos(self, record: Completion | Text) -> int:
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                f"{record.where}: the tokenizer has no end-of-text token, so a model could not learn to stop."
            )
        return int(self.tokenizer.eos_token_id)

    @staticmethod
    def _checked(tokens: Sequence[int], weights: list[float], where: str) -> Example:
        weights[:1] = [0.0] * len(weights[:1])
        example = Example(tuple(tokens), tuple(weights), where)
        if not example.trained:
            raise DataError(f"{where} has no trained token: every loss weight is zero.")
        return example
