"""The JSON bodies of the OpenAI protocol, as this server reads them.

In: JSON objects. Out: validated values. What this server cannot do is refused with a sentence unless it has the value
that means nothing; an unknown name is refused with the nearest known one. Refuses to know models and tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Token = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]

MOST_STOPS = 16
"""OpenAI takes four; lm-evaluation-harness sends five for some tasks."""
NOTHING: tuple[Any, ...] = (None, [], {}, "")
"""Values by which a client asks for nothing."""

COMMON: dict[str, tuple[tuple[Any, ...], str]] = {
    "presence_penalty": ((0,), "presence_penalty is not supported: samples come from the model's own distribution."),
    "frequency_penalty": ((0,), "frequency_penalty is not supported: samples come from the model's own distribution."),
    "logit_bias": ((), "logit_bias is not supported: samples come from the model's own distribution."),
}
COMPLETION: dict[str, tuple[tuple[Any, ...], str]] = {
    **COMMON,
    "best_of": ((1,), "best_of is not supported: ask for n samples with logprobs, and choose among them."),
    "suffix": ((), "suffix is not supported: these models only write on from a prompt's end."),
}
CHAT: dict[str, tuple[tuple[Any, ...], str]] = {
    **COMMON,
    "tools": ((), "tools are not supported: describe them in a message, and read the answer's text."),
    "tool_choice": (("none", "auto"), "tool_choice is not supported, because tools are not."),
    "parallel_tool_calls": ((True, False), "parallel_tool_calls is not supported, because tools are not."),
    "functions": ((), "functions are not supported: describe them in a message, and read the answer's text."),
    "function_call": (("none", "auto"), "function_call is not supported, because functions are not."),
    "response_format": (({"type": "text"},), 'response_format is not supported, except {"type": "text"}.'),
    "modalities": ((["text"],), 'modalities are not supported, except ["text"].'),
    "audio": ((), "audio is not supported: these models read and write text."),
    "prediction": ((), "prediction is not supported."),
    "web_search_options": ((), "web_search_options is not supported: this server reads no web."),
    "reasoning_effort": ((), "reasoning_effort is not supported: it is the chat template's to know such words."),
    "verbosity": ((), "verbosity is not supported: ask for it in a message."),
    "store": ((False,), "store is not supported: this server keeps no conversations."),
    "metadata": ((), "metadata is not supported: this server keeps no conversations."),
    "service_tier": (("auto", "default"), "service_tier is not supported, except auto and default."),
}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    include_usage: bool = Field(False, description="a last chunk with the tokens that were used")
    include_obfuscation: bool = Field(False, description="accepted and without effect: no chunk is padded")


class Request(BaseModel):
    """What completions and conversations have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    refused: ClassVar[dict[str, tuple[tuple[Any, ...], str]]]

    model: Annotated[str, Field(min_length=1, max_length=4000)] = Field(
        description="a base model, an adapter's tinker:// path or name, or a stack of adapters `inner+outer`"
    )
    n: Annotated[int, Field(ge=1)] = Field(1, description="samples of each prompt; the i-th depends on seed and i")
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(1.0, description="0 takes the likeliest")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="fewest tokens that have this probability")
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = Field(-1, description="an extension: k likeliest tokens; -1 is all")
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(None, description="the same seed, the same text")
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = Field(
        None, description="texts that end a sample and are not part of it"
    )
    stream: bool = Field(False, description="server-sent events as the text comes")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="a word of the client's own; the server does nothing with it")

    @model_validator(mode="before")
    @classmethod
    def _asks_for_nothing_else(cls, given: Any) -> Any:
        """Refuse by a sentence what is known and not supported; nulls are as good as absent."""
        if not isinstance(given, Mapping):
            return given
        for name, (neutral, sentence) in cls.refused.items():
            value = given.get(name)
            if not _among(value, (*NOTHING, *neutral)):
                raise _unsupported(name, sentence)
        return {key: value for key, value in given.items() if key not in cls.refused and value is not None}

    @model_validator(mode="after")
    def _streams(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise _unsupported("stream_options", "stream_options need stream: true.")
        if self.top_k == 0:
            raise _unsupported("top_k", "top_k is 0: at least 1, or -1 for all.")
        return self

    @property
    def stops(self) -> list[str]:
        """Stop strings, as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the tokens used."""
        return self.stream_options is not None and self.stream_options.include_usage


def _unsupported(param: str, sentence: str) -> PydanticCustomError:
    return PydanticCustomError("unsupported", "{sentence}", {"sentence": sentence, "param": param})


def _among(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether a value is one of those that mean nothing. `true` is not 1 here."""
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral)


class CompletionRequest(Request):
    """`POST /v1/completions`."""

    refused = COMPLETION

    prompt: str | list[Token] | list[str] | list[list[Token]] = Field(
        description="a text, tokens, or a list of texts or of tokens"
    )
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] = Field(16, description="most tokens of a sample; 0 with echo")
    logprobs: Annotated[int, Field(ge=0)] | None = Field(
        None, description="log-probabilities of the tokens and of so many likeliest ones"
    )
    echo: bool = Field(False, description="the prompt in front of each sample")

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


class ChatRequest(Request):
    """`POST /v1/chat/completions`."""

    refused = CHAT

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] = Field(
        description="turns with `role` and `content`, a text or a list of text parts"
    )
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(None, description="as max_completion_tokens")
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        None, description="most tokens of a sample; without it, what the context leaves"
    )
    logprobs: bool = Field(False, description="log-probabilities of the tokens")
    top_logprobs: Annotated[int, Field(ge=0)] | None = Field(None, description="and of so many likeliest ones")
    safety_identifier: str | None = Field(None, description="as `user`: the server does nothing with it")
    prompt_cache_key: str | None = Field(None, description="without effect: equal prefixes are found by themselves")

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise _unsupported("top_logprobs", "top_logprobs need logprobs: true.")
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise _unsupported("max_tokens", "max_tokens and max_completion_tokens differ; give one of them.")
        return self
