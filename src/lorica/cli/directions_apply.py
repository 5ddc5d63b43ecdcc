"""`lorica directions apply`: answers while a direction is added or taken out, and while random ones are.

In: a folder of directions, prompts, a model with adapters. Out: the answers in every condition, and how many differ.
Refuses to know hooks: `recipes.directions` makes the conditions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorica.cli.loading import cut, make_params, make_renderer, model_options, open_service, sampling_options
from lorica.cli.output import emit, json_option, say, table
from lorica.cli.sample import as_prompt, from_file

if TYPE_CHECKING:
    from lorica.engine.sample import Sample


@click.command()
@model_options
@click.option("--directions", required=True, metavar="DIR", help="A folder of `lorica directions extract`.")
@click.option("--steer", "kappas", type=float, multiple=True, metavar="K", help="Add K times the direction.")
@click.option("--ablate", is_flag=True, help="Take the direction out of every layer that has one.")
@click.option("--layers", metavar="0-3,7", help="Only at these blocks.  [default: all that have a direction]")
@click.option(
    "--controls", type=click.IntRange(min=1), default=3, show_default=True, help="Random directions of equal norm."
)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="What to answer; may be given several times.")
@click.option("--data", metavar="FILE", help="Answer the prompts of a data file, or of everyday:test.")
@click.option("-n", "--limit", type=click.IntRange(min=1), help="Only the first N rows of --data.")
@click.option("--raw", is_flag=True, help="Continue the text itself, without the chat template.")
@click.option("--match", metavar="REGEX", help="Count the answers that hold this.")
@sampling_options
@json_option
def apply(
    model: str,
    adapters: tuple[str, ...],
    dtype: str,
    device: str,
    directions: str,
    kappas: tuple[float, ...],
    ablate: bool,
    layers: str | None,
    controls: int,
    prompts: tuple[str, ...],
    data: str | None,
    limit: int | None,
    raw: bool,
    match: str | None,
    stops: tuple[str, ...],
    as_json: bool,
    **params: Any,
) -> None:
    """Answer prompts with a direction in or out.

    Answers are sampled from the model as it is, with the direction added or taken out, and with random ones
    instead. The directions may be those of another adapter over the same base. Random directions of equal norm are
    always sampled too: what they change as much, the direction did not do.

    \b
    lorica directions apply --adapter runs/b/adapter --directions directions/a --ablate --data everyday:test -n 20
    """
    from lorica.adapters.analysis.directions_files import load_directions
    from lorica.adapters.targets import layer_numbers
    from lorica.recipes.directions import LIMITS, conditions, sample_under

    if (data is None) == (not prompts):
        raise click.UsageError("Give --prompt or --data, and not both.")
    if not (kappas or ablate):
        raise click.UsageError("Nothing to apply: give --ablate, or --steer K.")
    wanted = _pattern(match)
    asked = from_file(data, limit) if data is not None else [(text, None) for text in prompts]
    found = load_directions(Path(directions))
    service, names = open_service(model, adapters, dtype, device)
    renderer = make_renderer(service.host.backbone)
    if not raw and not getattr(renderer.tokenizer, "chat_template", None):
        raw = True
        if not as_json:
            say(f"{model} has no chat template; the prompt is continued as raw text.")
    tokens = [renderer.prompt(as_prompt(prompt, raw)) for prompt, _ in asked]
    settings = make_params(renderer, stops, **params)
    chosen = None if layers is None else layer_numbers(layers, found.layers)
    plan = conditions(found, kappas=kappas, ablate=ablate, layers=chosen, controls=controls, seed=settings.seed)
    sampled = sample_under(service, names or None, tokens, settings, plan)
    rows = []
    for condition in plan:
        own = sampled[condition.name]
        texts = [cut(renderer.parse(sample.tokens)[0], stops) for sample in own]
        told = {"condition": condition.name, "control": condition.control, "texts": texts}
        rows.append(told | _counted(own, next(iter(sampled.values())), texts, wanted))
    document: dict[str, Any] = {"model": model, "adapters": adapters, "directions": directions, "layers": layers}
    document |= {"prompts": [prompt for prompt, _ in asked], "conditions": rows, "limits": LIMITS}
    emit(document, _answers(rows, [prompt for prompt, _ in asked], match), as_json=as_json)


def _counted(
    own: Sequence[Sample], plain: Sequence[Sample], texts: Sequence[str], wanted: re.Pattern[str] | None
) -> dict[str, Any]:
    """Shares of answers that hold the pattern, and that differ from those of the model as it is; their mean length."""
    count = len(own)
    return {
        "matching": None if wanted is None else sum(bool(wanted.search(text)) for text in texts) / count,
        "changed": sum(a.tokens != b.tokens for a, b in zip(own, plain, strict=True)) / count,
        "tokens": sum(len(sample.tokens) for sample in own) / count,
    }


def _pattern(match: str | None) -> re.Pattern[str] | None:
    try:
        return None if match is None else re.compile(match)
    except re.error as error:
        raise click.UsageError(f"{match!r} is not a regular expression: {error}.") from None


SHOWN = 3
"""Prompts whose answers are printed; --json has them all."""


def _answers(rows: list[dict[str, Any]], prompts: Sequence[Any], match: str | None) -> str:
    from lorica.recipes.directions import LIMITS

    parts = []
    for number, prompt in enumerate(prompts[:SHOWN]):
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        lines = [f"  {row['condition']}: {row['texts'][number]!r}" for row in rows if not row["control"]]
        parts.append("\n".join([f"> {asked}", *lines]))
    if len(prompts) > SHOWN:
        parts.append(f"({len(prompts) - SHOWN} more prompts; --json prints every answer.)")
    headers = ["condition", "other than as it is", "tokens"] + ([] if match is None else [f"hold {match!r}"])
    cells = [
        (r["condition"], f"{r['changed']:.0%}", r["tokens"], *([] if match is None else [f"{r['matching']:.0%}"]))
        for r in rows
    ]
    return "\n\n".join((*parts, table(headers, cells), LIMITS))
