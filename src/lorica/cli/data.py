"""`lorica data show`: a data file as the trainer sees it.

In: a file and a tokenizer's model. Out: the recognised shape, statistics, truncation, and rows with trained tokens
marked. Refuses to know how rows are read and rendered.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from lorica.cli.output import emit, json_option, wants_colour


@click.group("data")
def command() -> None:
    """Look at training data as the trainer sees it."""


@command.command()
@click.argument("file")
@click.option("--model", default="nano", show_default=True, help="Whose tokenizer and chat template to use.")
@click.option("--tokens", is_flag=True, help="Show rows token by token, the trained ones in colour or between ⟦ and ⟧.")
@click.option(
    "-n", "--rows", type=click.IntRange(min=1), default=3, show_default=True, help="Rows that --tokens shows."
)
@click.option("--max-length", type=int, default=1024, show_default=True, help="Length limit whose cost is reported.")
@click.option(
    "--train-on",
    type=click.Choice(("assistant", "last", "all")),
    default="assistant",
    show_default=True,
    help="Which turns of a conversation have weight.",
)
@json_option
def show(file: str, model: str, tokens: bool, rows: int, max_length: int, train_on: Any, as_json: bool) -> None:
    """Show the recognised shape, the first row, truncation and statistics of FILE.

    FILE is JSONL, JSON, parquet or text, or everyday:train, everyday:test, everyday:handwritten.
    """
    from lorica.core.errors import MethodError
    from lorica.data.records import load_records
    from lorica.data.render import Renderer, prepare
    from lorica.data.show import colour_tokens, describe
    from lorica.models import load

    dataset = load_records(file)
    tokenizer = load(model).tokenizer
    if tokenizer is None:
        raise MethodError(f"{model!r} has no tokenizer, so text cannot be trained on it.")
    renderer = Renderer(tokenizer, train_on=train_on)
    prepared = prepare(dataset, renderer, max_length)
    colour = wants_colour(sys.stdout) and not as_json
    said = describe(dataset, renderer, prepared, colour=colour)
    shown = prepared.examples[:rows] if tokens else []
    marked = [(example, colour_tokens(example, renderer.tokenizer, colour)) for example in shown]
    document = said.to_dict()
    if tokens:
        document["examples"] = [
            {
                "where": example.where,
                "tokens": example.tokens,
                "weights": example.weights,
                "pieces": [renderer.tokenizer.decode([token]) for token in example.tokens],
                "text": text,
            }
            for example, text in marked
        ]
    text = str(said) if not tokens else str(said).partition("\nFirst row:")[0]
    parts = [text, *(f"{e.where}: {len(e)} tokens, {e.trained} trained\n{body}" for e, body in marked)]
    emit(document, "\n\n".join(parts), as_json=as_json)
