"""`lorica inspect`: what an adapter folder holds, and what the adapter does to the weights.

In: the folder, perhaps its base, perhaps others. Out: a report, JSON, pictures, an adapter with scaled intruders.
Refuses to know file formats, and how anything is measured and drawn.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorica.cli.inspect_page import contents_page, inspection_page
from lorica.cli.loading import dtype_options, open_backbone, unique_names
from lorica.cli.output import emit, json_option, say
from lorica.cli.remote import on_server, refuse_local, server

if TYPE_CHECKING:
    from lorica.adapters.analysis.bases import Bases
    from lorica.adapters.analysis.intruders import Search
    from lorica.adapters.analysis.report import Inspection
    from lorica.adapters.analysis.similarity import Source


@dataclass(frozen=True, slots=True)
class _Scaling:
    """What `--scale-intruders` asks for."""

    factor: float
    out: Path
    exact: bool
    rank: int | None


@click.command()
@click.argument("adapter")
@click.option(
    "--base", "--model", "base", metavar="MODEL", help="The base it belongs to: built-in name, directory or hub id."
)
@click.option("--against", multiple=True, metavar="DIR", help="Another adapter to compare with, on the same base.")
@click.option("--sites", is_flag=True, help="List every site, and not only modules and layers.")
@click.option("--plots", type=click.Path(path_type=Path), metavar="DIR", help="Draw pictures (PNG) into this folder.")
@click.option("--intruders", is_flag=True, help="Count intruder dimensions; needs --base.")
@click.option("--top", type=int, default=10, show_default=True, help="Leading vectors of each weight to look at.")
@click.option("--threshold", type=float, default=0.5, show_default=True, help="An intruder's |cos| is below this.")
@click.option(
    "--scale-intruders",
    "factor",
    type=float,
    metavar="X",
    help="Write the adapter with its intruders times X to --out.",
)
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder of the adapter that is written.")
@click.option("--exact", is_flag=True, help="Let its ranks grow, instead of cutting to the adapter's own.")
@click.option("--rank", type=click.IntRange(min=1), help="Cut every site of it to this rank.")
@click.option(
    "--cache", type=click.Path(path_type=Path), metavar="DIR", help="Where vectors of the base are kept.  [~/.cache]"
)
@click.option("--no-cache", is_flag=True, help="Keep no vectors of the base; they take as much room as its weights.")
@dtype_options
@json_option
def command(
    adapter: str,
    base: str | None,
    against: tuple[str, ...],
    sites: bool,
    plots: Path | None,
    intruders: bool,
    top: int,
    threshold: float,
    factor: float | None,
    out: Path | None,
    exact: bool,
    rank: int | None,
    cache: Path | None,
    no_cache: bool,
    dtype: str,
    device: str,
    as_json: bool,
) -> None:
    """Show what an adapter folder holds, and what it does to the weights.

    A tinker:// path is a checkpoint of a server, which is inspected there, on its base.

    The base is loaded only with --base. Without it the files are read, and changes that are plain factors or dense
    differences are measured; with it all are, and relative to the weights. Values that are not finite are reported.

    \b
    lorica inspect runs/first/adapter
    lorica inspect runs/first/adapter --base nano --intruders --plots runs/first/plots
    lorica inspect runs/first/adapter --against runs/second/adapter
    lorica inspect runs/first/adapter --base nano --scale-intruders 0.75 --out runs/first/damped
    """
    from lorica.adapters.analysis.intruders import Search
    from lorica.adapters.contents import read_contents

    scaling = _scaling(factor, out, exact, rank)
    if on_server((adapter, *against)):
        refuse_local({"--base": base, "--scale-intruders": factor, "--cache": cache, "--no-cache": no_cache})
        told = _on_server(adapter, against, {"intruders": intruders, "top": top, "threshold": threshold})
        emit(told.to_dict(), _page([inspection_page(told, sites=sites)], _draw(told, plots)), as_json=as_json)
        return
    if base is None and (intruders or scaling is not None):
        raise click.UsageError("Intruder dimensions are those of the base with the adapter: give --base.")
    if cache is not None and no_cache:
        raise click.UsageError("--cache and --no-cache exclude each other.")
    contents = read_contents(adapter)
    search = Search(top=top, threshold=threshold) if intruders or scaling is not None else None
    bases = _bases(cache, no_cache)
    sources, reason = _load((adapter, *against), base, dtype, device)
    found = _inspect(sources, search, bases) if sources else None
    drawn = [] if found is None else _draw(found, plots)
    written = _rescale(sources[0], search, scaling, bases) if scaling is not None else None
    document: dict[str, Any] = {**asdict(contents), "values": contents.values, **_document(found, reason)}
    document |= {"plots": drawn, "rescaled": written}
    shown = f"not analysed: {reason}" if found is None else inspection_page(found, sites=sites)
    parts = [contents_page(contents), shown]
    parts += [f"{written['said']} Written to {written['path']}."] if written is not None else []
    emit(document, _page(parts, drawn), as_json=as_json)
    if plots is not None and not drawn and not as_json:
        say("There is nothing to draw.")


def _page(parts: list[str], drawn: list[str]) -> str:
    return "\n\n".join([*parts, *drawn])


def _on_server(adapter: str, against: tuple[str, ...], search: dict[str, Any]) -> Inspection:
    from lorica.adapters.analysis.report import Inspection

    with server() as client:
        return Inspection.from_dict(client.inspect(adapter, against, **search))


def _scaling(factor: float | None, out: Path | None, exact: bool, rank: int | None) -> _Scaling | None:
    """What is to be written. Raises UsageError for a half of it."""
    if factor is None:
        if out is not None or exact or rank is not None:
            raise click.UsageError("--out, --exact and --rank belong to --scale-intruders.")
        return None
    if out is None:
        raise click.UsageError("--scale-intruders needs --out, the folder to write.")
    if exact and rank is not None:
        raise click.UsageError("--exact and --rank exclude each other.")
    return _Scaling(factor, out, exact, rank)


def _bases(cache: Path | None, no_cache: bool) -> Bases:
    from lorica.adapters.analysis.bases import Bases, default_folder

    return Bases(None if no_cache else cache or default_folder())


def _load(paths: tuple[str, ...], base: str | None, dtype: str, device: str) -> tuple[list[Source], str | None]:
    """The adapters on the base or on their outlines; none, and why, where the first cannot be read without the base."""
    from lorica.adapters.files import load_adapter
    from lorica.adapters.outline import load_without_base
    from lorica.core.errors import LoricaError

    names = unique_names(paths)
    if base is not None:
        backbone = open_backbone(base, dtype, device)
        return [
            (load_adapter(Path(p), backbone, n, finite=False), backbone) for n, p in zip(names, paths, strict=True)
        ], None
    try:
        return [load_without_base(Path(p), n) for n, p in zip(names, paths, strict=True)], None
    except LoricaError as error:
        if len(paths) > 1:
            raise
        return [], " ".join(filter(None, (error.message, error.hint)))


def _inspect(sources: list[Source], search: Search | None, bases: Bases) -> Inspection:
    from lorica.adapters.analysis.report import inspect_adapter

    (adapter, backbone), *others = sources
    return inspect_adapter(adapter, backbone, others, search=search, bases=bases)


def _document(found: Inspection | None, reason: str | None) -> dict[str, Any]:
    """The analysis as JSON has it, or why there is none; `changes` is how far each kind of weight is moved."""
    changes = None
    if found is not None and found.base is not None:
        changes = [{"role": g.name, "sites": g.sites, "mean": g.relative, "largest": g.largest} for g in found.roles]
    analysis = None if found is None else found.to_dict()
    return {"changes": changes, "analysis": analysis, "not_analysed": reason}


def _draw(found: Inspection, folder: Path | None) -> list[str]:
    """Write the pictures, where there is a folder for them; their paths."""
    if folder is None:
        return []
    from lorica.core.storage import storage, write_file
    from lorica.recipes.inspect_plots import pictures

    paths = []
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in pictures(found).items():
            write_file(folder / f"{name}.png", content)
            paths.append(str(folder / f"{name}.png"))
    return paths


def _rescale(source: Source, search: Search | None, scaling: _Scaling, bases: Bases) -> dict[str, Any]:
    """Write the adapter with scaled intruders; what was done."""
    from lorica.adapters.analysis.rescale import rescale_intruders
    from lorica.adapters.files import save_adapter

    adapter, backbone = source
    made, report = rescale_intruders(
        adapter, backbone, scaling.factor, search, exact=scaling.exact, rank=scaling.rank, bases=bases
    )
    return {**asdict(report), "said": str(report), "path": str(save_adapter(made, backbone, scaling.out))}
