"""`lorica chat`: a conversation with a model, line by line.

In: lines from the terminal or a pipe. Out: answers on stdout; `/reset` begins anew, `/exit` and the end of input end
it. Refuses to know how sampling works: the client does it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import click

from lorica.cli.loading import cut, make_params, make_renderer, model_options, open_service, sampling_options
from lorica.cli.output import emit, json_option, say, wants_colour


@click.command()
@model_options
@click.option("--system", metavar="TEXT", help="A system message before the first turn.")
@click.option(
    "--single", is_flag=True, help="Forget each turn after its answer; right for adapters of single requests."
)
@sampling_options
@json_option
def command(
    model: str,
    adapters: tuple[str, ...],
    dtype: str,
    device: str,
    system: str | None,
    single: bool,
    stops: tuple[str, ...],
    as_json: bool,
    **params: Any,
) -> None:
    """Talk to a model, with or without an adapter.

    /reset forgets the conversation, /exit (or the end of input) leaves. With --json the transcript is printed at the
    end.

    \b
    lorica chat --model nano --adapter runs/quickstart/adapter
    """
    service, names = open_service(model, adapters, dtype, device)
    renderer = make_renderer(service.host.backbone)
    settings = make_params(renderer, stops, **params)
    client = service.sampling_client(names or None)
    opening = [{"role": "system", "content": system}] if system else []
    messages, transcript = list(opening), list[dict[str, str]]()
    renderer.template  # noqa: B018 - a model without a chat template is refused before the first question
    if sys.stdin.isatty() and not as_json:
        say(f"{model}{''.join(f' + {name}' for name in names)}. /reset begins anew, /exit leaves.")
    for line in _lines():
        if line == "/exit":
            break
        if line == "/reset":
            messages = list(opening)
            continue
        if line.startswith("/"):
            say(f"There is no {line.split()[0]}; use /reset or /exit.")
            continue
        asked = {"role": "user", "content": line}
        sample = client.sample([renderer.prompt([*messages, asked])], settings)[0]
        answer = {"role": "assistant", "content": cut(renderer.parse(sample.tokens)[0], stops)}
        messages = list(opening) if single else [*messages, asked, answer]
        transcript += [asked, answer]
        if not as_json:
            click.echo(answer["content"])
    if as_json:
        emit({"model": model, "adapters": adapters, "messages": [*opening, *transcript]}, "", as_json=True)


def _lines() -> Iterator[str]:
    """Lines that are not blank, until the input ends."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - editing and history for input()
    while True:
        try:
            if terminal:
                line = input("\x01\x1b[1m\x02> \x01\x1b[0m\x02" if wants_colour(sys.stdout) else "> ")
            else:
                line = next(sys.stdin)
        except (EOFError, StopIteration):
            return
        if line.strip():
            yield line.strip()
