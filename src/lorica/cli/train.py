"""`lorica train`: a supervised fine-tuning run from a config, overrides and flags.

In: settings. Out: the run directory's adapter path on stdout. Refuses to know how training works: `recipes.sft` does
it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lorica.cli.output import duration, emit, json_option, say, shell, size, table, wants_colour

FLAGS = {
    "model": "model",
    "data": "data.path",
    "out": "out",
    "steps": "steps",
    "epochs": "epochs",
    "batch_size": "batch_size",
    "lr": "optimizer.lr",
    "seed": "seed",
    "continue_from": "continue_from",
    "stack_on": "stack_on",
    "position_scale": "position_scale",
    "quantize": "quantize",
    "track": "track",
}
"""Flag → config field. Everything else is set as KEY=VALUE."""


@click.command()
@click.argument("settings", nargs=-1, metavar="[CONFIG] [KEY=VALUE]...")
@click.option("--model", help="Built-in name, local directory or hub id.")
@click.option("--method", help="Method, with its default settings; `lorica methods` lists them.")
@click.option("--data", help="JSONL, JSON, parquet or text file, or everyday:train.")
@click.option("--out", help="Run directory to make.")
@click.option("--steps", type=int, help="Optimiser steps.")
@click.option("--epochs", type=float, help="Passes over the data, where steps are not given.")
@click.option("--batch-size", type=int, help="Examples of one optimiser step.")
@click.option("--lr", type=float, help="Peak learning rate.")
@click.option("--seed", type=int, help="Seed of the adapter's init, its dropout and the order of the data.")
@click.option(
    "--position-scale", type=float, metavar="F", help="Divide rotary positions by F, for F times the base's context."
)
@click.option(
    "--quantize", metavar="KIND[,KEY=VALUE]", help="Pack the base's linear weights: nf4 (QLoRA), nvfp4, nf3, …"
)
@click.option("--continue", "continue_from", metavar="ADAPTER", help="Train this adapter further, in a run of its own.")
@click.option("--stack-on", multiple=True, metavar="ADAPTER", help="Train on top of it; several are stacked in order.")
@click.option("--track", help="Also send metrics to wandb, trackio or tensorboard.")
@click.option("--dry-run", is_flag=True, help="Show config, data, what would be trained and memory; write nothing.")
@click.option("--resume", type=click.Path(path_type=Path), metavar="DIR", help="Go on with the interrupted run in DIR.")
@json_option
def command(
    settings: tuple[str, ...], method: str | None, dry_run: bool, resume: Path | None, as_json: bool, **flags: Any
) -> None:
    """Fine-tune an adapter on a data file.

    CONFIG is a YAML file or the name of a shipped one; KEY=VALUE sets any of its fields (optimizer.lr=1e-3).
    Flags stand for the commonest fields. Prints the path of the adapter; Ctrl-C leaves a checkpoint to resume from.

    \b
    lorica train --model nano --data rows.jsonl --out runs/first
    lorica train quickstart method.rank=4 steps=50
    lorica train --resume runs/first
    lorica train --continue runs/first/adapter --data more.jsonl --out runs/further
    lorica train --stack-on runs/first/adapter --data other.jsonl --out runs/second
    """
    given = {key: value for key, value in flags.items() if value not in (None, ())}
    if resume is not None:
        if settings or given or method or dry_run:
            raise click.UsageError("--resume takes its settings from the run directory; give nothing else with it.")
        _train(None, resume, as_json)
        return
    config = _config(settings, method, given)
    if dry_run:
        _dry_run(config, as_json)
    else:
        _train(config, Path(config.out), as_json)


def _config(settings: tuple[str, ...], method: str | None, given: dict[str, Any]) -> Any:
    from lorica.recipes.config import read_config
    from lorica.recipes.configs import find_config

    files = [part for part in settings if "=" not in part]
    if len(files) > 1:
        raise click.UsageError(f"One config at a time: {' and '.join(files)} were given.")
    overrides = [] if method is None else [f"method={json.dumps({'name': method})}"]
    overrides += [f"{FLAGS[key]}={json.dumps(value)}" for key, value in given.items()]
    overrides += [part for part in settings if "=" in part]
    if not files and not any(part.startswith(("data=", "data.path=")) for part in overrides):
        raise click.UsageError("Nothing to train on: give a config, or --data FILE.")
    named = any(part.startswith("method.") for part in overrides)
    default = {"method": {"name": "lora"}} if named else {}
    return read_config(find_config(files[0]) if files else None, overrides, default)


def _dry_run(config: Any, as_json: bool) -> None:
    from lorica.recipes import sft
    from lorica.recipes.summary import summarise

    summary = summarise(sft.plan(config), colour=wants_colour(sys.stdout) and not as_json)
    trained = summary.trained
    rows = [(g.role, g.kind, "×".join(map(str, g.shape)), g.count, g.parameters) for g in trained.groups]
    parts = [
        "# resolved config",
        summary.resolved,
        "# data",
        str(summary.data).rstrip(),
        "\n# what would be trained",
        table(("site", "kind", "shape", "sites", "parameters"), rows),
        *_begins(summary.config),
        _share(trained),
        f"{summary.steps} steps of {config.batch_size} examples.",
        "\n# memory, estimated",
        _memory(summary.memory),
        "\nDry run: nothing was written.",
    ]
    emit(summary.to_dict(), "\n".join(parts), as_json=as_json)


def _memory(memory: Any) -> str:
    how = "rehearsed" if memory.rehearsed else "scaled up from a smaller one, because this one would not fit now"
    return table(
        ("part", "bytes"),
        [
            ("base weights", size(memory.weights)),
            ("adapter", size(memory.adapter)),
            ("gradient and optimiser", size(memory.optimizer)),
            (f"largest micro-batch ({how})", size(memory.working)),
            ("peak, everything included", size(memory.total)),
        ],
    )


def _share(trained: Any) -> str:
    frozen = f" and {trained.frozen:,} frozen extra values" if trained.frozen else ""
    return "\n".join(
        (
            f"{trained.method} on {trained.sites} sites: {trained.parameters:,} trained parameters{frozen}, "
            f"{trained.share:.2%} of the base's {trained.base_parameters:,}.",
            *trained.oversized,
        )
    )


def _begins(config: Mapping[str, Any]) -> list[str]:
    """What a run begins with that is no new adapter on the plain base."""
    lines = []
    if config["continue_from"] is not None:
        kept = "method, sites and values are kept; optimiser and schedule begin anew."
        lines.append(f"It continues the adapter in {config['continue_from']}: {kept}")
    if config["stack_on"]:
        lines.append(f"It is stacked on {', '.join(config['stack_on'])}, frozen in every pass.")
    return lines


def _train(config: Any, out: Path, as_json: bool) -> None:
    """Run or resume, report, and exit with 130 when it was interrupted."""
    from lorica.cli.progress import ProgressObserver
    from lorica.recipes import sft
    from lorica.recipes.summary import summarise

    class Observer(ProgressObserver):
        def prepared(self, plan: sft.Plan) -> None:
            if not self.quiet:
                summary = summarise(plan, memory=False, colour=wants_colour(sys.stderr))
                begins = "".join(f"{line}\n" for line in _begins(summary.config))
                self.talk(f"{summary.data}\n\n{begins}{_share(summary.trained)}")
            super().prepared(plan)

    resume = f"lorica train --resume {shell(out)}"
    try:
        with Observer(quiet=as_json) as observer:
            outcome = sft.resume(out, observer) if config is None else sft.run(config, observer)
    except KeyboardInterrupt:
        if not as_json and any((out / "checkpoints").glob("*.pt")):
            say(f"Continue the run with:\n  {resume}")
        raise
    if not as_json:
        peak = size(outcome.peak_bytes)
        speed = f"{outcome.tokens_per_second:,.0f} tokens/s"
        say(f"\n{outcome.steps} steps in {duration(outcome.seconds)}, {speed}, loss {outcome.loss:.3f}, peak {peak}.")
        if outcome.interrupted:
            say(f"Interrupted; the checkpoint is in {outcome.path}. Continue the run with:\n  {resume}")
        else:
            say(f"Curve in {outcome.path / 'loss.png'}. Try it with:\n  lorica chat {_model(outcome)}")
    document = {
        "path": outcome.path,
        "adapter": outcome.adapter,
        "steps": outcome.steps,
        "loss": outcome.loss,
        "seconds": outcome.seconds,
        "tokens_per_second": outcome.tokens_per_second,
        "peak_bytes": outcome.peak_bytes,
        "interrupted": outcome.interrupted,
        "resume": resume if outcome.interrupted else None,
    }
    if as_json or not outcome.interrupted:
        emit(document, str(outcome.adapter), as_json=as_json)
    if outcome.interrupted:
        raise SystemExit(130)


def _model(outcome: Any) -> str:
    """The options that open a run's base again with its adapter, and what that was trained on top of."""
    from lorica.recipes.config import read_config

    run = outcome.path
    config = read_config(run / "config.yaml")
    adapters = "".join(f" --adapter {shell(str(folder))}" for folder in (*config.stack_on, outcome.adapter))
    if (run / "base").is_dir():  # made together with the adapter
        return f"--model {shell(str(run / 'base'))}{adapters}"
    scale = f" --position-scale {config.position_scale:g}" if config.position_scale != 1 else ""
    packed = "" if config.quantize is None else f" --quantize {shell(str(config.quantize))}"
    return f"--model {shell(config.model)}{scale}{packed}{adapters}"
