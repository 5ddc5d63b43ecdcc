"""`lorica quickstart`: the main job from end to end, told as it goes.

In: a method's name. Out: what changed, on stdout. Refuses to know how: `recipes.quickstart` does it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from lorica.cli.output import duration, emit, json_option, say, shell

if TYPE_CHECKING:
    from lorica.recipes.quickstart import Report

SPLITS = {"test": "generated wording", "handwritten": "written by hand"}


@click.command()
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--method", default="lora", show_default=True, help="Any method of `lorica methods`.")
@click.option("--out", help="Run directory; runs/quickstart, or runs/quickstart-METHOD, if not given.")
@click.option("--rows", type=click.IntRange(min=1), help="Most held-out rows of each kind to answer.")
@click.option("--fresh", is_flag=True, help="Delete an earlier quickstart in the run directory and start anew.")
@json_option
def command(
    settings: tuple[str, ...], method: str, out: str | None, rows: int | None, fresh: bool, as_json: bool
) -> None:
    """Fine-tune the built-in model on the built-in data, and see what changed.

    Everyday requests become JSON calls: held-out rows are answered before and after, the loss is plotted, the adapter
    is saved, loaded with peft and merged. A finished run is shown again; KEY=VALUE changes any setting of the run.
    """
    from lorica.cli.progress import ProgressObserver
    from lorica.recipes import quickstart

    class Observer(ProgressObserver, quickstart.QuickstartObserver):
        def phase(self, text: str) -> None:
            self.close()
            if not self.quiet:
                say(f"» {text}")

    wrong = next((part for part in settings if "=" not in part), None)
    if wrong is not None:
        raise click.UsageError(f"{wrong!r} is not of the form KEY=VALUE; a method is chosen with --method.")
    config = quickstart.configure(method, out, settings)
    if not as_json:
        say(
            f"{config.method['name']} on {config.model}, data {config.data.path}, {config.steps} steps, "
            f"into {config.out}"
        )
    try:
        with Observer(quiet=as_json) as observer:
            report = quickstart.run(config, observer, fresh=fresh, rows=rows or quickstart.ROWS)
    except KeyboardInterrupt:
        if not as_json:
            say(f"Interrupted. The same command goes on from the checkpoint in {config.out}.")
        raise SystemExit(130) from None
    document = _plain(report)
    emit(document, "" if as_json else render(report), as_json=as_json)


def _plain(report: Report) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(report)


def render(report: Report) -> str:
    """The report in words."""
    lines = []
    if report.reused:
        lines += [f"This run was finished before; its stored results are shown (--fresh redoes it): {report.path}", ""]
    share = report.parameters / report.base_parameters
    lines += [
        f"{report.method} trained {report.parameters:,} parameters, {share:.1%} of {report.model}'s "
        f"{report.base_parameters:,}, for {report.steps} steps: loss {report.loss:.3f}.",
        "",
        "Exact match             before     after",
        *(_score(SPLITS[name], score) for name, score in report.scores.items()),
        "",
    ]
    for case in report.cases:
        lines += [
            f"> {case.request}",
            f"  before    {_line(case.before)}",
            f"  after     {_line(case.after)}",
            f"  expected  {_line(case.expected)}",
            "",
        ]
    lines += [*_proofs(report), "", f"config.yaml, metrics.jsonl, loss.png, adapter are in {report.path}.", ""]
    lines += ["Try next:", *(f"  {line}" for line in next_commands(report)), ""]
    if report.reused:
        lines.append(f"The run took {duration(report.seconds['total'])}.")
    else:
        phases = ", ".join(f"{k} {duration(v)}" for k, v in report.seconds.items() if k != "total")
        lines.append(f"Done in {duration(report.seconds['total'])} ({phases}).")
    return "\n".join(lines)


def _score(label: str, score: Any) -> str:
    rows = f"{score.rows} rows" if score.rows == score.total else f"{score.rows} of {score.total} rows"
    return f"  {label:<20}{score.before / score.rows:>8.1%}  {score.after / score.rows:>8.1%}   ({rows})"


def _line(text: str, width: int = 100) -> str:
    """One line of an answer; a text that is not one line is shown as a quoted string."""
    text = text if text.isprintable() and text else json.dumps(text, ensure_ascii=False)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _proofs(report: Report) -> list[str]:
    peft, merge = report.peft, report.merge
    said = {
        "same": f"peft {peft.version} loads the adapter and gives the same logits (largest difference "
        f"{_number(peft.difference)}, where the adapter changes the base's by up to {_number(peft.effect)}).",
        "different": f"peft {peft.version} loads the adapter but its logits differ by {_number(peft.difference)} "
        f"(the adapter changes the base's by up to {_number(peft.effect)}); please report this.",
        "absent": "peft is not installed, so its reading of the adapter was not checked: pip install 'lorica[peft]'",
        "unsupported": f"peft has no method {report.method!r}, so there is nothing to compare with.",
    }[peft.status]
    if merge.status == "merged":
        merged = (
            f"Merged into {merge.path}; the largest difference of a logit on probes is {_number(merge.difference)}."
        )
    else:
        merged = f"Not merged: {merge.reason}"
    return [said, merged]


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2g}"


def next_commands(report: Report) -> list[str]:
    """Three commands that go on from here."""
    adapter, other = shell(report.adapter), "dora" if report.method != "dora" else "vera"
    return [
        f"lorica chat --single --adapter {adapter}",
        f"lorica quickstart --method {other}",
        "lorica data show everyday:train --tokens",
    ]
