"""`lorica directions`: extract a direction, and compare several; the other subcommands are in files beside this one.

In: data files of two classes, or one with a column that tells them apart; adapters. Out: a folder, a table of cosines.
Refuses to know how means are taken: `recipes.directions` does it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from lorica.cli.directions_apply import apply
from lorica.cli.directions_scalars import header_option, probe, scalars
from lorica.cli.loading import make_renderer, model_options, open_service
from lorica.cli.output import emit, json_option, say, table

if TYPE_CHECKING:
    from lorica.adapters.analysis.directions import Directions
    from lorica.data.render import Renderer
    from lorica.data.token_parts import Parted

Between = Literal["classes", "models", "both"]


@click.group()
def command() -> None:
    """Directions of a behaviour: extract, compare, steer, ablate; scalars of rank-1 adapters."""


for subcommand in (apply, scalars, probe):
    command.add_command(subcommand)


@command.command()
@model_options
@click.option("--positive", required=True, metavar="FILE|VALUE", help="Rows that show it; with --class-field, a value.")
@click.option("--negative", metavar="FILE|VALUE", help="Rows that do not; not needed between models.")
@click.option("--data", metavar="FILE", help="One file of both classes, told apart by --class-field.")
@click.option("--class-field", metavar="NAME", help="The column of --data that says which class a row is of.")
@click.option(
    "--between",
    type=click.Choice(["classes", "models", "both"]),
    default="classes",
    show_default=True,
    help="What differs: rows, read by one model; models (adapters, and their base) on the positive rows; or both.",
)
@click.option(
    "--tokens",
    type=click.Choice(["answer", "question", "all"]),
    default="answer",
    show_default=True,
    help="Which count.",
)
@header_option
@click.option("--layers", metavar="0-3,7", help="Blocks to look at.  [default: all]")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder to write.")
@json_option
def extract(
    model: str,
    adapters: tuple[str, ...],
    dtype: str,
    device: str,
    positive: str,
    negative: str | None,
    data: str | None,
    class_field: str | None,
    between: Between,
    out: Path,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write the direction between two sides.

    It is the difference of two means of block outputs, layer by layer. Means are over tokens. Answers should be the
    model's own, sampled and judged by you. Prints the folder's path.

    \b
    lorica directions extract --adapter runs/a/adapter --positive bad.jsonl --negative good.jsonl --out directions/a
    """
    from lorica.adapters.analysis.directions_files import save_directions
    from lorica.recipes.directions import DirectionSettings, Side
    from lorica.recipes.directions import extract as run

    _check(positive, negative, data, class_field, between, adapters)
    chosen = DirectionSettings(**settings)
    service, names = open_service(model, adapters, dtype, device)
    renderer = make_renderer(service.host.backbone)
    own, other = names or None, None if between != "classes" else names or None
    rows = _sides(renderer, positive, positive if between == "models" else str(negative), data, class_field)
    told = (", ".join(names), "the base") if between == "models" else (positive, str(negative))
    found = run(service, Side(told[0], rows[0], own), Side(told[1], rows[1], other), chosen)
    path = save_directions(found, out)
    if not as_json:
        say("\n\n".join((_told(found), found.about["limits"])))
    emit({"path": path, "norms": found.norms(), "about": found.about}, str(path), as_json=as_json)


def _check(
    positive: str,
    negative: str | None,
    data: str | None,
    class_field: str | None,
    between: Between,
    adapters: Sequence[str],
) -> None:
    if (data is None) != (class_field is None):
        raise click.UsageError("--data and --class-field go together: one file, and the column that tells its classes.")
    if between == "models" and negative is not None:
        raise click.UsageError("Between models both read the positive rows; leave --negative out.")
    if between != "models" and negative is None:
        raise click.UsageError("Give --negative, or --between models.")
    if between != "classes" and not adapters:
        raise click.UsageError(f"--between {between} compares adapters with their base; give --adapter.")


def _sides(
    renderer: Renderer, positive: str, negative: str, data: str | None, field: str | None
) -> tuple[list[Parted], list[Parted]]:
    from lorica.core.errors import DataError, did_you_mean
    from lorica.data.labelled import load_labelled
    from lorica.data.records import load_records
    from lorica.data.token_parts import parted

    if data is None or field is None:
        first, second = ([parted(renderer, one) for one in load_records(path).records] for path in (positive, negative))
        return first, second
    rows = load_labelled(data, (field,))
    values = sorted({labels[field] for _, labels in rows})
    for wanted in (positive, negative):
        if wanted not in values:
            raise DataError(f"No row of {data} has {field} {wanted!r}.{did_you_mean(wanted, values)}")
    first, second = (
        [parted(renderer, record) for record, labels in rows if labels[field] == wanted]
        for wanted in (positive, negative)
    )
    return first, second


def _told(found: Directions) -> str:
    settings = found.about["settings"]
    header = ""
    if settings["tokens"] == "answer":
        header = f", the header of the turn {'included' if settings['header_in_answer'] else 'left out'}"
    sides = [(s["name"], ", ".join(s["adapter"]) or "-", s["rows"], s["tokens"]) for s in found.about["sides"]]
    return "\n\n".join(
        (
            f"Means over {settings['tokens']} tokens{header}.",
            table(("side", "read by", "rows", "tokens"), sides),
            table(("layer", "norm"), list(found.norms().items())),
        )
    )


@command.command()
@click.argument("folders", nargs=-1, required=True, metavar="DIR DIR...")
@json_option
def compare(folders: tuple[str, ...], as_json: bool) -> None:
    """Show the cosine of every pair of directions, layer by layer.

    \b
    lorica directions compare directions/a directions/b
    """
    from lorica.adapters.analysis.directions import cosines
    from lorica.adapters.analysis.directions_files import load_directions

    if len(folders) < 2:
        raise click.UsageError("Give two folders or more: a direction is compared with another one.")
    stores = [load_directions(Path(folder)) for folder in folders]
    found = cosines(stores)
    left_out = sorted({layer for store in stores for layer in store.layers} - set(found))
    pairs = [(i, j) for i in range(len(stores)) for j in range(i + 1, len(stores))]
    width = len(stores[0].vectors[min(found)])
    rows = [(layer, *(f"{float(matrix[i, j]):+.3f}" for i, j in pairs)) for layer, matrix in found.items()]
    means = [sum(float(m[i, j]) for m in found.values()) / len(found) for i, j in pairs]
    rows.append(("mean", *(f"{mean:+.3f}" for mean in means)))
    limits = (
        f"Two random directions of {width} values have a cosine of 0 ± {1 / math.sqrt(width):.3f}. That two directions "
        "agree does not say that the model uses them: rows that share topic or length make them agree too."
    )
    said = [f"{i + 1}: {folder}" for i, folder in enumerate(folders)]
    said += [f"Not all have layers {', '.join(map(str, left_out))}: left out."] if left_out else []
    headers = ("layer", *(f"{i + 1} · {j + 1}" for i, j in pairs))
    document = {
        "folders": folders,
        "cosines": {layer: matrix.tolist() for layer, matrix in found.items()},
        "left_out": left_out,
        "limits": limits,
    }
    emit(document, "\n".join((*said, "", table(headers, rows), "", limits)), as_json=as_json)
