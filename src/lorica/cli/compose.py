"""`lorica compose`: one adapter out of several for a new task, from a few examples of it.

In: adapter folders of one base, a data file. Out: an adapter folder, and a table of what it must be compared with.
Refuses to know how weights are found: `recipes.compose` does it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorica.cli.loading import dtype_options, make_renderer, open_service
from lorica.cli.output import emit, json_option, say, table
from lorica.cli.remote import on_server, server

if TYPE_CHECKING:
    from lorica.client.local import Service
    from lorica.data.render import Renderer
    from lorica.recipes.compose import Composition, FewShot
    from lorica.recipes.compose.remote import Hosted

SOUPS = "lora_soups"
"""What learns weights by gradients at every site; every other way is a rule whose weights are searched."""
SEARCHED = ("optimizer", "budget", "bound", "l1", "candidates", "parameters")
LEARNT = ("weighting", "steps", "lr", "batch_size", "spread")


def _search_options(command: Any) -> Any:
    options = (
        click.option("--optimizer", help="nevergrad's optimiser by name.  [default: Cobyla]"),
        click.option("--budget", type=int, help="Evaluations of the search.  [default: 40]"),
        click.option("--bound", type=float, help="Weights stay in [−F, F].  [default: 1.5]", metavar="F"),
        click.option("--l1", type=float, help="Penalty on the mean size of the weights.  [default: 0.05]"),
        click.option("--candidates", type=int, metavar="K", help="Keep the K adapters that score best alone."),
        click.option("--set", "parameters", multiple=True, metavar="KEY=VALUE", help="A parameter of the rule."),
        click.option(
            "--weighting", type=click.Choice(("free", "softmax")), help="lora_soups: which weights.  [default: free]"
        ),
        click.option("--spread", type=float, help="lora_soups: deviation of the initial logits.  [default: 0]"),
        click.option("--steps", type=int, help="lora_soups: optimiser steps.  [default: 60]"),
        click.option("--lr", type=float, help="lora_soups: learning rate.  [default: 0.1]"),
        click.option("--batch-size", type=int, help="lora_soups: examples of one step.  [default: 8]"),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="DIR...")
@click.option("--data", required=True, help="Rows of the new task; everyday:train, say.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Adapter folder to write.")
@click.option("--name", help="Of tinker:// paths: what the server shall keep the result as.")
@click.option("--model", default="nano", show_default=True, help="Built-in name, local directory or hub id.")
@click.option(
    "--how", default="lorahub", show_default=True, help="Rule whose weights are searched, or lora_soups to learn them."
)
@click.option(
    "--examples", type=click.IntRange(min=1), help="Rows to find the weights by.  [default: 5; lora_soups: all]"
)
@click.option("--test", help="Other rows of the task: their loss is shown too, and chosen by nowhere.")
@click.option("--max-length", type=int, default=512, show_default=True, help="Longer rows are cut to so many tokens.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of rows, and of the search.")
@_search_options
@dtype_options
@json_option
def command(
    adapters: tuple[str, ...],
    data: str,
    out: Path | None,
    name: str | None,
    model: str,
    how: str,
    examples: int | None,
    test: str | None,
    max_length: int,
    seed: int,
    dtype: str,
    device: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Compose adapters for a new task from a few examples.

    One weight for each adapter is searched without gradients (LoraHub), so that the loss of the examples' answers is
    small; or, with --how lora_soups, weights of every site are learnt. The table has the same loss for no adapter,
    equal weights, the best adapter alone and random search: a few examples choose well only if these are beaten.

    Checkpoints of a server (tinker:// paths) are combined and measured there; of --model only the tokenizer is read.

    \b
    lorica compose runs/a/adapter runs/b/adapter --data few.jsonl --test more.jsonl --out composed
    lorica compose tinker://RUN/weights/a tinker://RUN/weights/b --data few.jsonl --name composed
    """
    from lorica.recipes.compose import few_shot

    settings, hosted = _settings(how, seed, given), on_server(adapters)
    if (name if hosted else out) is None or (out if hosted else name) is not None:
        raise click.UsageError("Give --name for tinker:// paths, and --out for folders.")
    if out is not None and any(out.resolve() == Path(adapter).resolve() for adapter in adapters):
        raise click.UsageError(f"--out {out} is one of the adapters, which would be lost.")
    service, names = (None, adapters) if hosted else open_service(model, adapters, dtype, device)
    renderer = _tokenizer(model) if service is None else make_renderer(service.host.backbone)
    count = examples or (None if how == SOUPS else 5)
    chosen = few_shot(data, renderer, count, seed=seed, max_length=max_length)
    tested = None if test is None else few_shot(test, renderer, None, max_length=max_length)

    def talk(text: str) -> None:
        if not as_json:
            say(text)

    for sentence in (*chosen.said, *(() if tested is None else tested.said)):
        talk(sentence)
    rows = None if tested is None else tested.examples
    if service is None:
        done = _on_server(adapters, chosen.examples, settings, str(name), rows, talk)
    else:
        done = _here(service, names, chosen, settings, out or Path(), rows, talk)
    emit(*done, as_json=as_json)


def _settings(how: str, seed: int, given: dict[str, Any]) -> Any:
    """The config of the way that was asked for. Raises UsageError for a flag of the other one."""
    from lorica.recipes.compose import ComposeConfig, SoupsConfig
    from lorica.recipes.config import override

    given = {key: value for key, value in given.items() if value not in (None, ())}
    strange = next((key for key in given if key in (SEARCHED if how == SOUPS else LEARNT)), None)
    if strange is not None:
        flag = "--set" if strange == "parameters" else f"--{strange.replace('_', '-')}"
        raise click.UsageError(f"{flag} does nothing with --how {how}.")
    if how == SOUPS:
        return SoupsConfig(seed=seed, **given)
    if "parameters" in given:
        given["parameters"] = override({}, given["parameters"])
    config = ComposeConfig(how=how, seed=seed, **given)
    config.rule()
    return config


def _here(
    service: Service,
    names: tuple[str, ...],
    chosen: FewShot,
    settings: Any,
    out: Path,
    test: Any,
    talk: Callable[[str], None],
) -> tuple[dict[str, Any], str]:
    """Compose on this machine; the document and the text."""
    from lorica.recipes.compose import SoupsConfig, compose, learn_soup, loss_on, save_composition

    parents = [service.host.adapter(name) for name in names]
    shared: dict[str, Any] = {"data": chosen.data, "name": str(out), "say": talk}
    shared["test"] = None if test is None else loss_on(service, test, "test rows")
    if isinstance(settings, SoupsConfig):
        found = learn_soup(service, parents, chosen.examples, settings, **shared)
    else:
        found = compose(service.host, parents, loss_on(service, chosen.examples), settings, **shared)
    path = save_composition(found, service.host.backbone, out)
    talk(f"{_page(found)}\n\n{found.report}")
    return {"path": path, "examples": chosen.where, **found.to_dict()}, str(path)


def _tokenizer(model: str) -> Renderer:
    """What writes the rows of a model that a server has."""
    from lorica.data.render import Renderer
    from lorica.models.loading import locate, read_tokenizer

    return Renderer(read_tokenizer(locate(model)))


def _on_server(
    paths: tuple[str, ...], examples: Any, settings: Any, name: str, test: Any, talk: Callable[[str], None]
) -> tuple[dict[str, Any], str]:
    """Let the server combine and measure; the document and the text."""
    from lorica.recipes.compose import ComposeConfig

    if not isinstance(settings, ComposeConfig):
        raise click.UsageError(f"--how {SOUPS} trains on this machine: it takes folders, not tinker:// paths.")
    from lorica.recipes.compose.remote import compose_on_server

    with server() as client:
        found = compose_on_server(client, paths, examples, settings, name=name, test=test, say=talk)
    talk(_page(found))
    return found.to_dict(), found.path


def _page(found: Composition | Hosted) -> str:
    """The table of ways to weigh the adapters, their weights where they are few, and what should be known."""
    tested = any(row.test is not None for row in found.rows)
    searched = any(row.value is not None for row in found.rows)
    headers = ["weights", "loss", *(["with penalty"] if searched else []), *(["test loss"] if tested else [])]
    rows = [
        [
            row.name,
            f"{row.loss:.4f}",
            *(["-" if row.value is None else f"{row.value:.4f}"] if searched else []),
            *(["-" if row.test is None else f"{row.test:.4f}"] if tested else []),
        ]
        for row in found.rows
    ]
    parts = [table(headers, rows), table(("adapter", "alone", "weight"), _weights(found))]
    return "\n\n".join([*parts, *(["\n".join(found.notes)] if found.notes else [])])


def _weights(found: Composition | Hosted) -> list[tuple[str, str, str]]:
    """Every adapter, its loss alone, its weight in the result: one number, or the range over sites."""
    shown = dict.fromkeys(found.alone, "left out")
    by_site = found.log.get("weights")
    for n, name in enumerate(found.parents):
        if found.rows[-1].weights is not None:
            shown[name] = f"{found.rows[-1].weights[n]:+.3f}"
        elif by_site is not None:
            own = [weights[n] for weights in by_site.values()]
            shown[name] = f"{sum(own) / len(own):+.3f} ({min(own):+.3f} to {max(own):+.3f})"
    return [(name, f"{loss:.4f}", shown[name]) for name, loss in found.alone.items()]
