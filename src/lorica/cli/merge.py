"""`lorica merge`: several adapters made into one by a rule, or folded into the weights of a model.

In: adapter folders, a rule with its parameters. Out: the path of the new adapter or model directory; on stderr what it
is; with `--eval` a table of losses. Refuses to know how merging works: `adapters.merging` and the host do it.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorica.cli.loading import dtype_options, make_renderer, open_service, read_sets, unique_names
from lorica.cli.output import emit, json_option, say, table
from lorica.cli.remote import on_server, refuse_local, server

if TYPE_CHECKING:
    from lorica.adapters.merge import MergeReport
    from lorica.adapters.merging import Merging
    from lorica.adapters.merging.combine import CombineReport
    from lorica.client.local import Service
    from lorica.engine.host import RowSpec


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="ADAPTER...")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder to write.")
@click.option("--name", help="Of tinker:// paths: what the server shall keep the result as.")
@click.option("--model", help="Built-in name, local directory or hub id.  [default: what the first adapter names]")
@click.option("--how", metavar="RULE", help="The rule; --list shows them. Without one, adapters are folded in order.")
@click.option("--weights", metavar="W,W...", help="A weight for each adapter.  [default: the rule's]")
@click.option("--rank", type=click.IntRange(min=1), help="Cut the result to this rank; what is lost is said.")
@click.option(
    "--as",
    "form",
    type=click.Choice(("adapter", "model")),
    help="What to write.  [default: adapter with --how, else model]",
)
@click.option("--full", is_flag=True, help="Take adapters that were trained beside quantised weights of this model.")
@click.option("--eval", "files", multiple=True, metavar="FILE", help="Compare losses on these rows; may come again.")
@click.option("--max-length", type=int, default=512, show_default=True, help="Longer rows are cut to so many tokens.")
@click.option("--list", "listing", is_flag=True, help="Show the rules and their parameters, and do nothing else.")
@dtype_options
@json_option
def command(words: tuple[str, ...], listing: bool, as_json: bool, **given: Any) -> None:
    """Make one adapter out of several by a rule, or fold adapters into the weights of a model.

    With --how, the changes of all adapters are combined in float64 site by site. A rule's parameters are given as
    options of their names (--density 0.3). The result is an adapter, or with --as model a model directory.

    Without --how, adapters are folded in order into the weights, and a model directory is written. Every fold is
    computed in float64 and verified: at each site the outputs of the stored weight and of the adapters are compared on
    probes, and the largest difference is printed.

    Packed weights (--quantize) are quantised again, and what that rounds is printed for each site. An adapter that was
    trained beside them is better merged into the full weights, with --full.

    Checkpoints of a server (tinker:// paths) are combined there, without a base here, and can be sampled at once.

    \b
    lorica merge runs/quickstart/adapter --out merged
    lorica merge runs/a/adapter runs/b/adapter --how ties --density 0.3 --out both
    lorica merge runs/a/adapter runs/b/adapter --how linear --weights 0.5,0.5 --eval rows.jsonl --out both
    lorica merge tinker://RUN/weights/a tinker://RUN/weights/b --how ties --name both
    lorica merge --list
    """
    if listing:
        emit(rules := _rules(), _rules_page(rules), as_json=as_json)
        return
    adapters, parameters = _split(words)
    if not adapters:
        raise click.UsageError("Missing argument 'ADAPTER...'.")
    name = given.pop("name")
    if on_server(adapters):
        emit(*_on_server(adapters, parameters, name, given), as_json=as_json)
        return
    if name is not None:
        raise click.UsageError("--name is for tinker:// paths; a folder is written to --out.")
    if given["out"] is None:
        raise click.UsageError("Missing option '--out'.")
    if any(given["out"].resolve() == Path(adapter).resolve() for adapter in adapters):
        raise click.UsageError(f"--out {given['out']} is one of the adapters, which would be lost.")
    rule = _rule(given.pop("how"), parameters, given)
    _check_first(adapters[0])
    emit(*_run(adapters, rule, quiet=as_json, **given), as_json=as_json)


def _on_server(
    adapters: tuple[str, ...], parameters: dict[str, Any], name: str | None, given: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Let the server do it; the document and the text."""
    local = {"out": "--out", "model": "--model", "form": "--as", "full": "--full", "files": "--eval"}
    refuse_local({flag: given[key] for key, flag in local.items()})
    if given["how"] is None or name is None:
        raise click.UsageError("tinker:// paths are combined on their server: give --how and --name.")
    shares = None if given["weights"] is None else _numbers(given["weights"])
    with server() as client:
        path = client.merge(adapters, name, given["how"], weights=shares, rank=given["rank"], **parameters)
    return {"path": path, "adapters": adapters, "how": given["how"], "parameters": parameters, "weights": shares}, path


def _run(
    adapters: tuple[str, ...],
    rule: Merging | None,
    *,
    out: Path,
    model: str | None,
    weights: str | None,
    rank: int | None,
    form: str | None,
    full: bool,
    files: tuple[str, ...],
    max_length: int,
    dtype: str,
    device: str,
    quiet: bool,
) -> tuple[dict[str, Any], str]:
    """Do it; the document and the text."""
    from lorica.adapters.folder import base_name

    model = model or base_name(Path(adapters[0]))
    service, names = open_service(model, adapters, dtype, device, from_quantized=full)
    form = form or ("model" if rule is None else "adapter")
    document: dict[str, Any] = {"as": form, "model": model, "adapters": adapters}
    acting = names
    if rule is not None:
        shares = None if weights is None else _numbers(weights)
        acting, report = _combine(service, names, rule, shares, rank, full)
        document |= asdict(report)
        _say_unless(quiet, str(report))
    losses = _losses(service, [*zip(adapters, names, strict=True), ("merged", acting)], files, max_length, quiet=quiet)
    if form == "adapter":
        path = service.host.save(out, acting[0])
    else:
        path, folded = _fold(service, acting, out)
        document |= asdict(folded)
        _say_unless(quiet, *folded.lines())
    document |= {"path": path, "losses": losses}
    return document, "\n\n".join([*([_losses_page(losses)] if losses else []), str(path)])


def _say_unless(quiet: bool, *lines: str) -> None:
    if not quiet:
        say("\n".join(lines))


def _combine(
    service: Service, names: tuple[str, ...], rule: Merging, shares: list[float] | None, rank: int | None, full: bool
) -> tuple[tuple[str, ...], CombineReport]:
    """Make the combined adapter resident; its name, alone, and what was made."""
    from lorica.adapters.merging.combine import combine

    host = service.host
    name = unique_names((*names, "merged"))[-1]
    rank = None if "rank" in type(rule).model_fields else rank  # then it is the rule's own
    parents = [host.adapter(parent) for parent in names]
    merged, report = combine(parents, host.backbone, rule, shares, name=name, rank=rank, other_base=full)
    host.put(merged)
    return (name,), report


def _fold(service: Service, acting: tuple[str, ...], out: Path) -> tuple[Path, MergeReport]:
    from lorica.adapters.save_merged import save_merged

    report = service.host.merge(*acting)
    return save_merged(service.host.backbone, out), report


# -- what was typed ------------------------------------------------------------------------------------------------


def _split(words: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Adapters, and the rule's parameters: whatever is an option that the command itself does not have."""
    import yaml

    adapters, parameters, rest = [], {}, list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            adapters.append(word)
            continue
        name, mark, text = word.removeprefix("--").partition("=")
        if not mark:
            if not rest or rest[0].startswith("--"):
                raise click.UsageError(f"No such option: --{name}, and a rule's parameter needs a value.")
            text = rest.pop(0)
        parameters[name.replace("-", "_")] = yaml.safe_load(text)
    return tuple(adapters), parameters


def _rule(how: str | None, parameters: dict[str, Any], given: dict[str, Any]) -> Merging | None:
    """The rule; None without `--how`, where nothing may be given that needs one."""
    if how is None:
        names = [*parameters, *(key for key in ("weights", "rank") if given[key] is not None)]
        if names or given["form"] == "adapter":
            what = f"--{names[0].replace('_', '-')} belongs to a rule" if names else "--as adapter needs a rule"
            raise click.UsageError(f"{what}: name one by --how, which --list shows.")
        return None
    from lorica.adapters.merging import get_merging

    cls = get_merging(how)
    if given["rank"] is not None and "rank" in cls.model_fields:
        parameters["rank"] = given["rank"]
    return cls(**parameters)


def _check_first(word: str) -> None:
    """Once the model stood before the adapters."""
    if not Path(word).exists() or (Path(word) / "config.json").is_file():
        from lorica.core.errors import MissingError

        raise MissingError(f"There is no adapter at {word}.", hint=f"A model is given by its option: --model {word}.")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is not a list of numbers such as 0.5,0.5.", param_hint="--weights"
        ) from None


# -- tables --------------------------------------------------------------------------------------------------------


def _losses(
    service: Service, rows: list[tuple[str, RowSpec]], files: tuple[str, ...], max_length: int, *, quiet: bool
) -> list[dict[str, Any]]:
    """The mean loss of the base, of each adapter and of the merged one, on each file."""
    if not files:
        return []
    from lorica.recipes.forgetting import task_losses

    sets = read_sets(files, make_renderer(service.host.backbone), max_length, quiet=quiet)
    return [{"adapter": name, **task_losses(service, row, sets)} for name, row in [("(the base)", None), *rows]]


def _losses_page(losses: list[dict[str, Any]]) -> str:
    _, *files = losses[0]
    return table(("loss", *files), [(row["adapter"], *(f"{row[file]:.4f}" for file in files)) for row in losses])


def _rules() -> list[dict[str, Any]]:
    from lorica.adapters.merging import all_mergings

    return [
        {
            "name": cls.name,
            "summary": cls.summary,
            "paper": None if cls.paper is None else asdict(cls.paper),
            "weighted": cls.weighted,
            "parameters": [
                {"name": name, "default": info.default, "description": info.description}
                for name, info in cls.model_fields.items()
            ],
        }
        for cls in all_mergings().values()
    ]


def _rules_page(rules: list[dict[str, Any]]) -> str:
    heads = [(r["name"], r["summary"], f"arXiv {r['paper']['arxiv']}" if r["paper"] else "-") for r in rules]
    fields = [
        (r["name"], f"--{p['name']}", "none" if p["default"] is None else str(p["default"]), p["description"])
        for r in rules
        for p in r["parameters"]
    ]
    headers = ("rule", "parameter", "default", "what it does")
    return "\n\n".join([table(("rule", "what", "paper"), heads), table(headers, fields)])
