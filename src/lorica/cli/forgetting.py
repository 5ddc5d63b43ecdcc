"""`lorica forgetting`: what adapters gained on tasks, what they lost on others, and how many directions they use.

In: adapter folders of one base, data files. Out: tables, adapters by files. Refuses to know how it is measured:
`recipes.forgetting` does it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lorica.cli.loading import dtype_options, make_renderer, open_service, read_sets
from lorica.cli.output import emit, json_option, table

if TYPE_CHECKING:
    from lorica.recipes.forgetting import Forgetting


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="DIR...")
@click.option(
    "--target",
    "targets",
    required=True,
    multiple=True,
    metavar="DATA",
    help="Rows of a task that was trained, held out; everyday:test, say. May be given several times.",
)
@click.option(
    "--source",
    "sources",
    required=True,
    multiple=True,
    metavar="DATA",
    help="Rows of what the base knew before. May be given several times.",
)
@click.option("--model", default="nano", show_default=True, help="Built-in name, local directory or hub id.")
@click.option("--max-length", type=int, default=512, show_default=True, help="Longer rows are cut to so many tokens.")
@click.option(
    "--share", type=float, default=0.9, show_default=True, help="Share of a change's variance to count up to."
)
@dtype_options
@json_option
def command(
    adapters: tuple[str, ...],
    targets: tuple[str, ...],
    sources: tuple[str, ...],
    model: str,
    max_length: int,
    share: float,
    dtype: str,
    device: str,
    as_json: bool,
) -> None:
    """Measure what adapters gained on their tasks and lost on others.

    The loss of every file is asked of the base and of each adapter: a matrix of adapters and data, before and after.
    The components of a change of weights are counted that hold a share of its variance: few for a low rank, many for
    full fine-tuning (`lorica train delta`).

    \b
    lorica forgetting runs/lora/adapter runs/delta/adapter --target everyday:test --source other.jsonl
    lorica forgetting a/adapter b/adapter --target a.jsonl --target b.jsonl --source old.jsonl --source older.jsonl
    """
    from lorica.recipes.forgetting import measure_forgetting

    service, names = open_service(model, adapters, dtype, device)
    renderer = make_renderer(service.host.backbone)
    wanted, known = (read_sets(paths, renderer, max_length, quiet=as_json) for paths in (targets, sources))
    resident = [service.host.adapter(name) for name in names]
    found = measure_forgetting(service, resident, wanted, known, share=share)
    emit([row.to_dict() for row in found], _page(found, share), as_json=as_json)


def _page(found: list[Forgetting], share: float) -> str:
    parts = [
        table(
            ("adapter", "method", "parameters", "gained", "forgotten"),
            [(r.adapter, r.method, r.parameters, f"{r.gained:+.4f}", f"{r.forgotten:+.4f}") for r in found],
        ),
        _matrix(found),
    ]
    counted = [
        (row.adapter, role, f"{mean:.1f} of {most}") for row in found for role, (mean, most) in row.by_role().items()
    ]
    if counted:
        parts.append(table(("adapter", "site", f"components for {share:.0%} of the change"), counted))
    return "\n\n".join(parts)


def _matrix(found: list[Forgetting]) -> str:
    """A row for each file and a column for each adapter, so that many files fit a terminal."""
    letters = [f"[{number + 1}]" for number in range(len(found))]
    rows = []
    for kind in ("targets", "sources"):
        for place, loss in enumerate(getattr(found[0], kind)):
            own = [getattr(row, kind)[place] for row in found]
            after = [f"{one.after:.4f} ({one.change:+.4f})" for one in own]
            rows.append((f"{kind.removesuffix('s')} {loss.data}", f"{loss.before:.4f}", *after))
    legend = "\n".join(f"{letter} {row.adapter}" for letter, row in zip(letters, found, strict=True))
    return f"{table(('loss, nats a token', 'the base', *letters), rows)}\n{legend}"
