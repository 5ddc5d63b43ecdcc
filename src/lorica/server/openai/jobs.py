"""A request of the OpenAI protocol as work for an engine: a command for each prompt, a writer for each sample.

In: a validated request, the model that it names, limits. Out: a job whose draws can begin. What no engine has to be
asked about is refused here, before any is. Refuses to know HTTP and the shape of answers.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorica.core.errors import DataError, did_you_mean
from lorica.data.turns import from_messages
from lorica.engine.arrays import array
from lorica.engine.commands import Sample
from lorica.server.openai.bodies import ChatRequest, CompletionRequest, Request
from lorica.server.openai.draws import Draw
from lorica.server.openai.errors import RefusedError
from lorica.server.openai.models import Model
from lorica.server.openai.writer import Writer
from lorica.server.settings import Limits
from lorica.server.text import Text, text_of

LONG = 4096
"""Characters from which a prompt is read in another thread."""
MESSAGE = {"role", "content", "name", "tool_call_id"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's tokens; with echo, its text and where each token begins."""

    tokens: list[int]
    text: str = ""
    offsets: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """`draws` are in the order of `prompts`, each with a writer for each of `n` samples. `tops` is how many likeliest
    tokens each token is told with; None for no log-probabilities at all.
    """

    model: Model
    text: Text
    prompts: list[Prompt]
    draws: list[Draw]
    n: int
    tops: int | None
    echo: bool = False

    @property
    def count(self) -> int:
        return self.n * len(self.prompts)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.tokens) for prompt in self.prompts)

    @property
    def drawn_tokens(self) -> int:
        return sum(writer.count for draw in self.draws for writer in draw.writers)

    @property
    def cached_tokens(self) -> int:
        return sum(draw.reply.cached for draw in self.draws if draw.reply is not None)


async def completion(request: CompletionRequest, model: Model, tenant: str, limits: Limits) -> Job:
    """Raises LoricaError for what cannot be done."""
    text = await _text(model)
    if request.max_tokens == 0 and not request.echo:
        raise RefusedError(
            400, "validation", "max_tokens is 0: without echo that is an empty answer.", param="max_tokens"
        )
    prompts = [await _prompt(text, prompt, echo=request.echo) for prompt in request.prompts]
    if not prompts:
        raise RefusedError(400, "validation", "prompt is an empty list.", param="prompt")
    tops = request.logprobs
    plan = _Plan(request, model, text, tenant, tops, tops if request.echo else None, text.renderer.stop_ids)
    draws = [plan.draw(prompt.tokens, request.max_tokens, begin=len(prompt.text)) for prompt in prompts]
    return _checked(Job(model, text, prompts, draws, request.n, tops, request.echo), limits)


async def chat(request: ChatRequest, model: Model, tenant: str, limits: Limits) -> Job:
    """Raises LoricaError for what cannot be done."""
    text = await _text(model)
    messages = from_messages(request.messages, "The request")
    for message in messages:
        _check_message(message)
    tokens = await _apart(text.renderer.prompt, messages, long=sum(len(m["content"]) for m in messages) > LONG)
    tops = (request.top_logprobs or 0) if request.logprobs else None
    plan = _Plan(request, model, text, tenant, tops, None, text.renderer.stop_ids)
    most = request.max_completion_tokens or request.max_tokens or plan.room(tokens)
    probe = text.renderer.template.probe
    draw = plan.draw(tokens, most, turn=(probe.before, probe.after))
    return _checked(Job(model, text, [Prompt(tokens)], [draw], request.n, tops), limits)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the commands of one request have in common."""

    request: Request
    model: Model
    text: Text
    tenant: str
    tops: int | None
    prompt_tops: int | None
    template_stops: frozenset[int]

    def room(self, tokens: list[int]) -> int:
        """What the context leaves for a sample."""
        return max(self._context(tokens) - len(tokens), 1)

    def draw(self, tokens: list[int], most: int, *, begin: int = 0, turn: tuple[str, str] = ("", "")) -> Draw:
        """Raises RefusedError for a prompt that is empty, or too long for the context."""
        if not tokens:
            raise RefusedError(
                400, "validation", "A prompt has no tokens; the model needs at least one.", param="prompt"
            )
        context = self._context(tokens)
        if len(tokens) + most > context:
            raise RefusedError(
                400,
                "context_length_exceeded",
                f"A prompt of {len(tokens)} tokens and {most} to be sampled do not fit the context of {context}.",
                param="max_tokens" if len(tokens) < context else "prompt",
            )
        request, stops = self.request, self.request.stops
        stop_ids = self._stop_ids(stops)
        late = bool(self.tops) or self.prompt_tops is not None
        command = Sample(
            id=0,
            prompt=array(np.array(tokens, dtype=np.int32)),
            adapters=self.model.adapters,
            tenant=self.tenant,
            num_samples=request.n,
            max_tokens=most,
            temperature=request.temperature,
            top_k=None if request.top_k == -1 else request.top_k,
            top_p=request.top_p,
            seed=secrets.randbits(62) if request.seed is None else request.seed,
            stop_ids=sorted(stop_ids),
            prompt_logprobs=self.prompt_tops is not None,
            topk_prompt=self.prompt_tops or 0,
            topk_sample=self.tops or 0,
            stream=(request.stream or bool(stops)) and not late,
        )
        writers = [Writer(self.text, stops, stop_ids, begin=begin, turn=turn) for _ in range(request.n)]
        return Draw(self.model.backbone, command, writers)

    def _context(self, tokens: list[int]) -> int:
        """Positions that the model has; a model without a limit has room for a thousand more."""
        return int(self.model.backbone.info.get("context") or len(tokens) + 1024)

    def _stop_ids(self, stops: list[str]) -> set[int]:
        """End tokens, and stop strings that are one token by themselves: the engine sees those without our help."""
        fast = self.text.tokenizer.fast
        known = self.text.tokenizer.added_tokens_decoder
        single = {token for stop in stops if (token := fast.token_to_id(stop)) in known and token is not None}
        return {*self.template_stops, *(self.model.backbone.info.get("eos_ids") or []), *single}


async def _text(model: Model) -> Text:
    directory = str(model.backbone.info.get("tokenizer") or "")
    if not directory:
        raise DataError(
            f"{model.backbone.name!r} has no tokenizer, so this server cannot read or write its text.",
            hint="The Tinker protocol samples tokens.",
        )
    return await asyncio.to_thread(text_of, directory)


async def _prompt(text: Text, given: str | list[int], *, echo: bool) -> Prompt:
    if isinstance(given, str):
        tokens = await _apart(text.renderer.prompt, given, long=len(given) > LONG)
    else:
        tokens = given
    if not echo:
        return Prompt(tokens)
    return Prompt(tokens, *text.read(tokens))


async def _apart(work: Any, given: Any, *, long: bool) -> list[int]:
    """Tokens; those of a long text are found in another thread, so that the process goes on answering."""
    found: list[int] = await asyncio.to_thread(work, given) if long else work(given)
    return found


def _check_message(message: Any) -> None:
    if message.get("tool_calls") or message.get("function_call"):
        raise RefusedError(400, "unsupported", "tool_calls are not supported: write them as text.", param="messages")
    unknown = sorted(set(message) - MESSAGE - {"tool_calls", "function_call", "annotations"})
    if unknown or message.get("annotations"):
        name = (unknown or ["annotations"])[0]
        sentence = f"A message has {name!r}; known are {', '.join(sorted(MESSAGE))}.{did_you_mean(name, MESSAGE)}"
        raise RefusedError(400, "unknown_parameter", sentence, param="messages")


def _checked(job: Job, limits: Limits) -> Job:
    if job.count > limits.num_samples:
        sentence = f"{job.count} samples are asked for; at most {limits.num_samples} are drawn at once."
        raise RefusedError(400, "quota", sentence, param="n")
    if (job.tops or 0) > limits.topk:
        sentence = f"logprobs is {job.tops}; tables are at most {limits.topk} wide."
        raise RefusedError(400, "quota", sentence, param="logprobs")
    return job
