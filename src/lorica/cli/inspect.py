"""`lorica inspect`: what an adapter folder holds, and with `--model` how far it moves each weight.

In: a folder that Lorica or PEFT wrote. Out: method, settings, base, tensors. Refuses to know file formats.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from lorica.cli.loading import dtype_options, open_service
from lorica.cli.output import emit, json_option, size, table

if TYPE_CHECKING:
    from lorica.adapters.contents import Change, Contents


@click.command()
@click.argument("adapter")
@click.option("--model", help="Load it on this base too, and show how far it moves each kind of weight.")
@dtype_options
@json_option
def command(adapter: str, model: str | None, dtype: str, device: str, as_json: bool) -> None:
    """Show what an adapter folder holds.

    Without --model the base is not loaded: the files alone are read.

    \b
    lorica inspect runs/first/adapter
    """
    from lorica.adapters.contents import read_contents, relative_changes

    contents = read_contents(adapter)
    changes: tuple[Change, ...] | None = None
    if model is not None:
        service, names = open_service(model, (adapter,), dtype, device)
        changes = relative_changes(service.host.adapter(names[0]), service.host.backbone)
    document = {**asdict(contents), "values": contents.values}
    document["changes"] = None if changes is None else [asdict(change) for change in changes]
    emit(document, _page(contents, changes), as_json=as_json)


def _page(found: Contents, changes: tuple[Change, ...] | None) -> str:
    base = found.base
    facts: list[tuple[str, Any]] = [
        ("method", found.method or f"{found.peft_type} (written by PEFT)"),
        (
            "base",
            f"{base.get('name')}" + (f" ({base['family']}, {base['fingerprint']})" if "fingerprint" in base else ""),
        ),
        ("read by peft", "yes" if found.peft_type else f"no: {found.not_peft}"),
        ("values", f"{found.values:,}, {size(found.bytes)} on disk"),
    ]
    facts += [] if found.sites is None else [("sites", f"{found.sites:,}")]
    facts += [] if found.seed is None else [("seed", found.seed)]
    facts += [(f"meta: {key}", value) for key, value in found.meta.items()]
    parts = [
        "\n".join(f"{name:<14}{value}" for name, value in facts),
        table(("setting", "value"), [(key, str(value)) for key, value in found.settings.items()]),
        table(
            ("tensors", "count", "shape", "values", "rms", "largest"),
            [(g.name, g.count, " ".join(map(_shape, g.shapes)), g.values, g.rms, g.largest) for g in found.groups],
        ),
    ]
    if changes:
        rows = [(c.role, c.sites, f"{c.mean:.2%}", f"{c.largest:.2%}") for c in changes]
        parts.append(table(("change of the weights", "sites", "mean", "largest"), rows))
    elif changes is not None:
        parts.append("It changes no weight: it adds virtual tokens, or keys and values.")
    return "\n\n".join(parts)


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "1"
