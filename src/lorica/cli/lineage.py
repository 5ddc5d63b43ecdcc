"""`lorica lineage`: where adapters and merged models come from, as a tree, a graph or a picture.

In: folders. Out: the tree on stdout, and on stderr what is no longer as it was. Refuses to know how parents are found.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorica.cli.output import emit, json_option, say

if TYPE_CHECKING:
    from lorica.adapters.ancestry import Ancestry, Edge, Node

PICTURES = (".png", ".svg")


@click.command()
@click.argument("places", nargs=-1, required=True, metavar="ADAPTER|DIR...")
@click.option("--search", multiple=True, metavar="DIR", help="Look for parents that were moved in this folder too.")
@click.option("--dot", "as_dot", is_flag=True, help="Print the graph in the language of Graphviz.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Draw the graph: a .png or .svg file.")
@json_option
def command(places: tuple[str, ...], search: tuple[str, ...], as_dot: bool, out: Path | None, as_json: bool) -> None:
    """Show where adapters and merged models come from: a tree, a graph or a picture.

    For each adapter: the first digits of its hash, method and rank, base, data and recipe; below it its parents, and
    theirs. Of a folder that holds several adapters, those are shown that no other one comes from. A parent is read
    where it was when the child was made, else found by its hash in the given folders; one that is gone, or whose hash
    differs, is said.

    \b
    lorica lineage runs/second/adapter
    lorica lineage runs --out lineage.svg
    """
    if as_dot and as_json:
        raise click.UsageError("--dot and --json print different things; give one of them.")
    if out is not None and out.suffix.lower() not in PICTURES:
        raise click.UsageError(f"--out {out} is no picture that this command draws; its name must end in .png or .svg.")
    from lorica.adapters.ancestry import trace
    from lorica.recipes.lineage_plots import dot, picture

    graph = trace(places, search)
    if out is not None:
        from lorica.core.storage import storage, write_file

        with storage(out):
            write_file(out, picture(graph, out.suffix.lower().removeprefix(".")))
    emit(graph.to_dict(), dot(graph) if as_dot else "\n\n".join(tree(graph)), as_json=as_json)
    if not as_json:
        for problem in graph.problems():
            say(f"warning: {problem}")
        if out is not None:
            say(f"Drawn in {out}.")


def tree(graph: Ancestry) -> list[str]:
    """A tree for each root; what was shown already is named again and not unfolded."""
    seen: set[str] = set()
    return ["\n".join(_branch(graph, key, "", "", "", seen)) for key in graph.roots]


def _branch(graph: Ancestry, key: str, first: str, rest: str, relation: str, seen: set[str]) -> list[str]:
    """The lines of a node and what is below it. `first` stands before its name, `rest` before its other lines."""
    node, known = graph.nodes[key], key in seen
    seen.add(key)
    parents = [] if known else graph.parents(key)
    lines = [f"{first}{relation}{headline(node)}{'  (above)' if known else ''}"]
    bar = rest + ("│  " if parents else "   ")
    lines += [] if known else [f"{bar}{line}" for line in details(node)]
    for number, (edge, parent) in enumerate(parents, 1):
        last = number == len(parents)
        mark, space = ("└─ ", "   ") if last else ("├─ ", "│  ")
        lines += _branch(graph, parent.key, rest + mark, rest + space, f"{_relation(edge)}  ", seen)
    return lines


def _relation(edge: Edge) -> str:
    name = "on the model" if edge.relation == "base" else edge.relation
    return name if edge.weight is None else f"{name} × {edge.weight:g}"


def headline(node: Node) -> str:
    """Path, hash, method and what became of it, in one line."""
    place = _near(node.path) if node.path else "never saved"
    if node.kind == "model":
        return f"{place}  model directory"
    method = node.method if node.rank is None else f"{node.method}, rank {node.rank}"
    words = [place, node.short, method, "" if node.status in ("here", "served") else node.status.upper()]
    return "  ".join(word for word in words if word)


def _near(path: str) -> str:
    """A path from here where that is below, else as it is."""
    place, here = Path(path), Path.cwd()
    return str(place.relative_to(here)) if place.is_relative_to(here) else path


def details(node: Node) -> list[str]:
    """Base, how it was made, recipe and data, where they are known."""
    found, lineage = [], node.lineage
    if node.base[0] or node.base[1]:
        made = "made from" if node.kind == "model" else "on"
        found.append(
            " ".join(
                word for word in (made, _near(node.base[0]), f"({node.base[1][:8]})" if node.base[1] else "") if word
            )
        )
    if lineage.how:
        found.append(f"by {lineage.how}{_settings(lineage.settings)}")
    if lineage.recipe:
        steps = lineage.recipe.get("steps")
        found.append(f"trained by {lineage.recipe.get('name', '?')}{'' if steps is None else f', {steps:,} steps'}")
    if lineage.data is not None:
        rows = "" if lineage.data.rows is None else f"{lineage.data.rows:,} rows, "
        found.append(f"data {lineage.data.path} ({rows}{lineage.data.sha256[:8]})")
    return found


def _settings(settings: dict[str, Any]) -> str:
    plain = {key: value for key, value in settings.items() if isinstance(value, str | int | float | bool)}
    return f" ({', '.join(f'{key} {value}' for key, value in plain.items())})" if plain else ""
