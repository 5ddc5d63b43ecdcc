"""A tokenizer's chat template, measured: which token stops a turn, and what the template wraps around the assistant's
words.

In: a tokenizer with `apply_chat_template`. Out: rendered text, tokens cut at given characters, the stop token.
The template is a program that we cannot read, so it is asked with a probe conversation.
Refuses to know records and loss weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError

from lorica.core.errors import DataError
from lorica.data.turns import Message

_PROBE = ({"role": "user", "content": "Qzx"}, {"role": "assistant", "content": "Vkw"})


class Tokenizer(Protocol):
    """What is needed of a tokenizer; every fast or slow tokenizer of `transformers` has it."""

    chat_template: Any
    bos_token_id: Any
    eos_token_id: Any
    added_tokens_decoder: Any

    def encode(self, text: str, **options: Any) -> Any:
        """Token ids of a text."""

    def decode(self, ids: Any, **options: Any) -> Any:
        """The text of token ids."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """A rendered conversation."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What the template does around an assistant's turn: text before and after the content, and the token that stops
    it.
    """

    before: str
    after: str
    stop: int


class Template:
    """The chat template of one tokenizer.

    Raises DataError when the tokenizer has none, or one that ends the assistant's turn with no special token: a model
    trained on such text would never learn to stop.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "The tokenizer has no chat template, so conversations cannot be rendered.",
                hint="Use the tokenizer of an instruction-tuned model, rows of prompt and completion, or plain text.",
            )
        self._tokenizer = tokenizer
        self.special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._spelled = re.compile("|".join(re.escape(token) for token in self.special.values()) or r"(?!)")
        self.probe = self._measure()

    def render(
        self,
        messages: Sequence[Message],
        *,
        prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        where: str = "the chat",
    ) -> str:
        """The conversation as text; with `prompt`, up to where the assistant would begin to speak.

        Raises DataError naming `where` when the template refuses the conversation, for example for its order of roles.
        """
        plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=prompt, tools=[dict(tool) for tool in tools] or None
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise DataError(
                f"{where}: the chat template refuses the conversation ({roles}): {str(error).rstrip('.')}."
            ) from None
        return str(text)

    def refuse_control_tokens(self, messages: Sequence[Message], where: str) -> None:
        """Raises DataError when a message spells a special token: it would become a real one inside the turn."""
        for number, message in enumerate(messages, 1):
            found = self._spelled.search(str(message.get("content", "")))
            if found is not None:
                raise DataError(
                    f"{where}: turn {number} contains {found[0]!r}, which the tokenizer reads as a control token.",
                    hint="Remove it from the text: the template adds the control tokens itself.",
                )

    def encode(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Tokens of `text`, and for each cut (a character index, ascending) the number of tokens before it.

        The tokens are those of the whole text wherever a token ends at each cut. Where one would straddle a cut, the
        parts are encoded apart, as they are when the model writes the second part. So the tokens up to a cut depend
        on nothing after it.
        """
        tokens: list[int] = []
        counts: list[int] = []
        start = 0
        for cut in (*cuts, len(text)):
            whole = self._encode(text[:cut])
            tokens = whole if whole[: len(tokens)] == tokens else tokens + self._encode(text[start:cut])
            counts.append(len(tokens))
            start = cut
        return tokens, counts[:-1]

    def _encode(self, text: str) -> list[int]:
        # The template has written its own opening token, so the tokenizer must not add another.
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False, verbose=False)]

    def _measure(self) -> Probe:
        opening = self.render(_PROBE[:1], prompt=True, where="the probe")
        text = self.render(_PROBE, prompt=False, where="the probe")
        content = str(_PROBE[1]["content"])
        at = text.find(content, len(opening))
        if not text.startswith(opening) or at < 0:
            raise DataError("The chat template does not print the assistant's turn where its generation prompt ends.")
        end = at + len(content)
        tokens, (count,) = self.encode(text, [end])
        stops = {*self.special, self._tokenizer.eos_token_id}
        stop = next((i for i in range(count, len(tokens)) if tokens[i] in stops), None)
        if stop is None:
            raise DataError("The chat template puts no special token after the assistant's turn, to learn to stop by.")
        after = str(self._tokenizer.decode(tokens[count:stop], skip_special_tokens=False))
        return Probe(text[len(opening) : at], after, tokens[stop])
