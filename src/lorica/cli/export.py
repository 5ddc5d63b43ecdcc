"""`lorica export`: an adapter of any method as a plain LoRA folder.

In: an adapter folder and its model. Out: the new folder's path. Refuses to know how updates become factors.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from lorica.cli.loading import dtype_options, open_service
from lorica.cli.output import emit, json_option, say


@click.command()
@click.argument("adapter")
@click.option("--model", required=True, help="The base it belongs to: built-in name, local directory or hub id.")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder to write.")
@click.option("--as", "form", type=click.Choice(("lora",)), default="lora", show_default=True, help="What to write.")
@click.option("--rank", type=click.IntRange(min=1), help="Cut to this rank; without it the export is exact.")
@dtype_options
@json_option
def command(
    adapter: str, model: str, out: Path, form: str, rank: int | None, dtype: str, device: str, as_json: bool
) -> None:
    """Write an adapter as a plain LoRA folder, whatever its method.

    \b
    lorica export runs/dora/adapter --model nano --out plain
    """
    from lorica.adapters.export import export_lora
    from lorica.adapters.files import save_adapter

    service, names = open_service(model, (adapter,), dtype, device)
    host = service.host
    exported, report = export_lora(host.adapter(names[0]), host.backbone, rank=rank)
    path = save_adapter(exported, host.backbone, out)
    if not as_json:
        say(str(report))
    emit({"path": path, "as": form, **asdict(report)}, str(path), as_json=as_json)
