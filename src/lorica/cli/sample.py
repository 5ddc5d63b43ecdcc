"""`lorica sample`: answers to prompts, from the base or through adapters.

In: prompts as options, from a data file, or on stdin. Out: the answers on stdout.
Refuses to know how sampling works: the client does it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from lorica.cli.loading import cut, make_params, make_renderer, model_options, open_service, sampling_options
from lorica.cli.output import emit, json_option, say

if TYPE_CHECKING:
    from lorica.data.records import Record

BATCH = 32
"""Prompts that are sampled together."""


@click.command()
@model_options
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="What to answer; may be given several times.")
@click.option("--data", metavar="FILE", help="Answer the prompts of a data file, or of everyday:test.")
@click.option("-n", "--limit", type=click.IntRange(min=1), help="Only the first N rows of --data.")
@click.option("--raw", is_flag=True, help="Continue the text itself, without the chat template.")
@sampling_options
@json_option
def command(
    model: str,
    adapters: tuple[str, ...],
    dtype: str,
    device: str,
    prompts: tuple[str, ...],
    data: str | None,
    limit: int | None,
    raw: bool,
    stops: tuple[str, ...],
    as_json: bool,
    **params: Any,
) -> None:
    """Continue prompts, with or without an adapter.

    Without --prompt and --data, the prompt is read from stdin.

    \b
    lorica sample --model nano --adapter runs/quickstart/adapter --prompt "wake me at 7"
    """
    if data is not None and prompts:
        raise click.UsageError("Give --prompt or --data, not both.")
    asked = from_file(data, limit) if data is not None else [(text, None) for text in prompts or _from_stdin()]
    service, names = open_service(model, adapters, dtype, device)
    renderer = make_renderer(service.host.backbone)
    if not raw and not getattr(renderer.tokenizer, "chat_template", None):
        raw = True
        if not as_json:
            say(f"{model} has no chat template; the prompt is continued as raw text.")
    settings = make_params(renderer, stops, **params)
    client = service.sampling_client(names or None)
    answers: list[dict[str, Any]] = []
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        tokens = [renderer.prompt(as_prompt(prompt, raw)) for prompt, _ in batch]
        for (prompt, expected), sample in zip(batch, client.sample(tokens, settings), strict=True):
            text, stopped = renderer.parse(sample.tokens)
            text = cut(text, stops)
            answers.append({"prompt": prompt, "text": text, "stopped": stopped, "tokens": len(sample.tokens)})
            answers[-1] |= {"logprob": sum(sample.logprobs)} | ({} if expected is None else {"expected": expected})
            if not as_json:
                _show(answers[-1], alone=len(asked) == 1)
    if as_json:
        emit({"model": model, "adapters": adapters, "samples": answers}, "", as_json=True)


def _show(answer: dict[str, Any], *, alone: bool) -> None:
    if alone:
        click.echo(answer["text"])
        return
    prompt = answer["prompt"]
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    click.echo("\n".join(f"> {line}" for line in asked.splitlines()))
    click.echo(f"{answer['text']}\n")


def as_prompt(prompt: Any, raw: bool) -> Any:
    """What a renderer's `prompt` takes: turns, or with `raw` a text."""
    if isinstance(prompt, str):
        return prompt if raw else [{"role": "user", "content": prompt}]
    if raw:
        return "\n".join(str(message["content"]) for message in prompt)
    return prompt


def _from_stdin() -> Sequence[str]:
    if sys.stdin.isatty():
        raise click.UsageError("Nothing to answer: give --prompt TEXT or --data FILE, or pipe a text in.")
    text = sys.stdin.read().rstrip("\n")
    if not text:
        raise click.UsageError("Nothing to answer: stdin is empty.")
    return [text]


def from_file(path: str, limit: int | None) -> list[tuple[Any, str | None]]:
    """The prompts of a data file's first rows, each with the answer that the file gives."""
    from lorica.data.records import load_records

    return [_asked(record) for record in load_records(path).records[:limit]]


def _asked(record: Record) -> tuple[Any, str | None]:
    """A record's prompt, and the answer it gives."""
    from lorica.data.records import Chat, Completion

    if isinstance(record, Completion):
        return record.prompt, record.completion
    if not isinstance(record, Chat):
        return record.text, None
    turns = list(record.messages)
    last = next((i for i in _backwards(turns) if turns[i]["role"] == "assistant"), len(turns))
    return turns[:last] or turns, str(turns[last]["content"]) if last < len(turns) else None


def _backwards(items: Sequence[Any]) -> Iterator[int]:
    return reversed(range(len(items)))
