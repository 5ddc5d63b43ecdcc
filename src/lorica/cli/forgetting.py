"""`lorica forgetting`: what adapters gained on their task, what they lost on another, and how many directions they use.

In: adapter folders of one base, two data files. Out: a table. Refuses to know how it is measured:
`recipes.forgetting` does it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lorica.cli.loading import dtype_options, make_renderer, open_service
from lorica.cli.output import emit, json_option, say, table

if TYPE_CHECKING:
    from lorica.recipes.forgetting import Forgetting


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="DIR...")
@click.option("--target", required=True, help="Rows of the task that was trained, held out; everyday:test, say.")
@click.option("--source", required=True, help="Rows of what the base knew before.")
@click.option("--model", default="nano", show_default=True, help="Built-in name, local directory or hub id.")
@click.option("--max-length", type=int, default=512, show_default=True, help="Longer rows are cut to so many tokens.")
@click.option(
    "--share", type=float, default=0.9, show_default=True, help="Share of a change's variance to count up to."
)
@dtype_options
@json_option
def command(
    adapters: tuple[str, ...],
    target: str,
    source: str,
    model: str,
    max_length: int,
    share: float,
    dtype: str,
    device: str,
    as_json: bool,
) -> None:
    """Measure what adapters gained on their task and lost on another.

    The loss of both files is asked of the base and of each adapter. The components of a change of weights are counted
    that hold a share of its variance: few for a low rank, many for full fine-tuning (`lorica train delta`).

    \b
    lorica forgetting runs/lora/adapter runs/delta/adapter --target everyday:test --source other.jsonl
    """
    from lorica.data.records import load_records
    from lorica.data.render import prepare
    from lorica.recipes.forgetting import measure_forgetting

    service, names = open_service(model, adapters, dtype, device)
    renderer = make_renderer(service.host.backbone)
    examples = []
    for path in (target, source):
        ready = prepare(load_records(path), renderer, max_length)
        examples.append(ready.examples)
        if ready.truncation is not None and ready.truncation.count and not as_json:
            say(f"{path}: {ready.truncation.sentence()}")
    found = measure_forgetting(service, [service.host.adapter(name) for name in names], *examples, share=share)
    emit([row.to_dict() for row in found], _page(found, share), as_json=as_json)


def _page(found: list[Forgetting], share: float) -> str:
    headers = ("adapter", "method", "parameters", "target loss", "gained", "source loss", "forgotten")
    base = ("(the base)", "-", "0", f"{found[0].target_before:.4f}", "-", f"{found[0].source_before:.4f}", "-")
    rows = [
        (
            row.adapter,
            row.method,
            f"{row.parameters:,}",
            f"{row.target_after:.4f}",
            f"{row.gained:+.4f}",
            f"{row.source_after:.4f}",
            f"{row.forgotten:+.4f}",
        )
        for row in found
    ]
    parts = [table(headers, [base, *rows])]
    counted = [
        (row.adapter, role, f"{mean:.1f} of {most}") for row in found for role, (mean, most) in row.by_role().items()
    ]
    if counted:
        parts.append(table(("adapter", "site", f"components for {share:.0%} of the change"), counted))
    return "\n\n".join(parts)
