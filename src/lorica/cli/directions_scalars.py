"""`lorica directions scalars` and `probe`: what a rank-1 adapter writes at each token, and what that tells.

In: a rank-1 adapter and a data file, or the table made of them. Out: the table; accuracies, coefficients and roles of
sites. Refuses to know how they are computed.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorica.cli.loading import dtype_options, make_renderer, open_service
from lorica.cli.output import emit, json_option, say, table

if TYPE_CHECKING:
    from lorica.adapters.analysis.directions_probe import ContrastReport, ProbeResult
    from lorica.adapters.analysis.directions_scalars import ScalarTable

header_option = click.option(
    "--header-in-answer/--no-header-in-answer",
    default=True,
    show_default=True,
    help="Whether the header of the assistant's turn counts as answer.",
)


@click.command()
@click.argument("adapter", metavar="ADAPTER")
@click.option("--model", default="nano", show_default=True, help="Built-in name, local directory or hub id.")
@click.option("--data", required=True, metavar="FILE", help="Rows to read; everyday:test, say.")
@click.option("-n", "--limit", type=click.IntRange(min=1), help="Only the first N rows of --data.")
@click.option("--label", "labels", multiple=True, metavar="NAME", help="A column to keep beside each token.")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="A .csv or .json to write.")
@dtype_options
@json_option
def scalars(
    adapter: str,
    model: str,
    data: str,
    limit: int | None,
    labels: tuple[str, ...],
    out: Path,
    dtype: str,
    device: str,
    as_json: bool,
) -> None:
    """Write what a rank-1 adapter does to each token.

    That is c = s (A·h) ‖B‖ at every site. Prints the path of the table: one line a token, with its text, its part
    of the conversation and its row's labels.

    \b
    lorica directions scalars runs/rank1/adapter --data everyday:test -n 50 --out scalars.csv
    """
    from lorica.adapters.analysis.directions_scalars import save_scalars
    from lorica.data.labelled import load_labelled
    from lorica.data.token_parts import parted
    from lorica.recipes.directions import scalar_table

    service, names = open_service(model, (adapter,), dtype, device)
    renderer = make_renderer(service.host.backbone)
    rows = load_labelled(data, labels)[:limit]
    read = [parted(renderer, record) for record, _ in rows]
    found = scalar_table(service, renderer, read, names[0], labels=[own for _, own in rows])
    path = save_scalars(found, out)
    means = found.means()
    if not as_json:
        said = [(site, *(f"{means[part][site]:+.4g}" for part in means)) for site in found.sites]
        say(f"Mean c of {len(found.lines):,} tokens in {len(rows):,} rows:\n")
        say(table(("site", *means), said))
        say(f"\n{found.about['limits']}")
    document = {"path": path, "rows": len(rows), "tokens": len(found.lines), "means": means, **found.about}
    emit(document, str(path), as_json=as_json)


@click.command()
@click.argument("scalars", type=click.Path(path_type=Path), metavar="TABLE")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--behaviour", required=True, metavar="NAME=VALUE", help="Label and value of rows that show it.")
@click.option(
    "--domain", metavar="NAME=VALUE", help="Label and value of rows in the domain: four contrasts, and roles."
)
@header_option
@click.option(
    "--split-answers", is_flag=True, help="Hold out tokens of answers that are fitted too, as the paper does."
)
@json_option
def probe(
    scalars: Path,
    settings: tuple[str, ...],
    behaviour: str,
    domain: str | None,
    header_in_answer: bool,
    split_answers: bool,
    as_json: bool,
) -> None:
    """Ask which sites of an adapter tell answers apart.

    Fits L1 logistic regressions to scalars, classes balanced, repeated. Reads a table of `lorica directions scalars
    --label …`. KEY=VALUE sets any other field (repeats=100, C=0.1).

    \b
    lorica directions probe scalars.csv --behaviour class=bad --domain topic=medicine repeats=100
    """
    from lorica.adapters.analysis import directions_probe as probes
    from lorica.adapters.analysis.directions_scalars import load_scalars
    from lorica.recipes.config import override

    config = probes.ProbeConfig.parse(override({}, settings))
    rows = load_scalars(scalars).of_parts({"answer", "header"} if header_in_answer else {"answer"})
    values = [line.scalars for line in rows.lines]
    groups = None if split_answers else [line.row for line in rows.lines]
    shows = _marks(rows, behaviour, "--behaviour")
    said = f"Tokens of answers, their headers {'included' if header_in_answer else 'left out'}; "
    said += "tokens of one answer on both sides." if split_answers else "whole answers held out."
    document: dict[str, Any] = {"header_in_answer": header_in_answer, "split_answers": split_answers}
    if domain is None:
        found = probes.probe(values, shows, rows.sites, config, groups_N=groups)
        document |= {"probe": asdict(found), "limits": probes.LIMITS}
        text = _one(found, behaviour)
    else:
        report = probes.contrasts(values, shows, _marks(rows, domain, "--domain"), rows.sites, config, groups_N=groups)
        document |= {**asdict(report), "limits": probes.LIMITS}
        text = _four(report)
    emit(document, "\n\n".join((said, text, probes.LIMITS)), as_json=as_json)


def _marks(rows: ScalarTable, text: str, option: str) -> list[bool]:
    """Which tokens have a label's value. Raises DataError where none or all have."""
    from lorica.core.errors import DataError

    name, sign, value = text.partition("=")
    if not sign:
        raise click.UsageError(f"{option} takes NAME=VALUE, not {text!r}.")
    found = [own == value for own in rows.label(name)]
    if not any(found) or all(found):
        raise DataError(
            f"{'Every' if all(found) else 'No'} row of the table has {name} {value!r}: there is nothing to tell apart."
        )
    return found


def _one(found: ProbeResult, name: str) -> str:
    rows = [
        (site, f"{value:+z.3f} ± {found.spreads[site]:.3f}", f"{found.steady[site]:.0%}")
        for site, value in found.coefficients.items()
    ]
    return "\n\n".join((_accuracy(name, found), table(("site", "coefficient", "one sign in"), rows)))


def _four(report: ContrastReport) -> str:
    rows = [
        (site, role, *(f"{own.coefficients[site]:+z.3f}" for own in report.contrasts.values()))
        for site, role in report.roles.items()
    ]
    names = list(report.contrasts)
    key = [f"{number}: {_accuracy(name, report.contrasts[name])}" for number, name in enumerate(names, 1)]
    headers = ("site", "role", *map(str, range(1, len(names) + 1)))
    return "\n".join(key) + "\n\n" + table(headers, rows)


def _accuracy(name: str, found: ProbeResult) -> str:
    said = (
        f"{name}: right for {found.accuracy:.1%} ± {found.accuracy_spread:.1%} of held-out tokens, where chance is 50% "
        f"({found.positive:,} and {found.negative:,} tokens, {found.repeats} repeats)"
    )
    if not any(found.coefficients.values()):
        said += "; no coefficient differs from zero: raise C, or give more tokens"
    return said + (f"; {found.unconverged} fits did not converge" if found.unconverged else "") + "."
