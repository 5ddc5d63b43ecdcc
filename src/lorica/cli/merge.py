"""`lorica merge`: fold adapters into the weights and write a model directory that loads without Lorica.

In: a model and adapter folders. Out: the new directory's path, and on stderr the largest difference on probes.
Refuses to know how merging works: the host does it.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from lorica.cli.loading import dtype_options, open_service
from lorica.cli.output import emit, json_option, say


@click.command()
@click.argument("model")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Directory to write.")
@click.option("--full", is_flag=True, help="Take adapters that were trained beside quantised weights of this model.")
@dtype_options
@json_option
def command(
    model: str, adapters: tuple[str, ...], out: Path, full: bool, dtype: str, device: str, as_json: bool
) -> None:
    """Fold adapters into the weights and write a model directory.

    Several adapters are folded in order. The merge is computed in float64 and verified: at every site the outputs of
    the stored weight and of the adapters are compared on probes, and the largest difference is printed.

    Packed weights (--quantize) are quantised again, and what that rounds is printed for each site. An adapter that was
    trained beside them is better merged into the full weights, with --full; its outputs are then those of training but
    for the rounding of the base.

    \b
    lorica merge nano runs/quickstart/adapter --out merged
    lorica merge nano runs/packed/adapter --full --out merged
    """
    from lorica.adapters.save_merged import save_merged

    service, names = open_service(model, adapters, dtype, device, from_quantized=full)
    report = service.host.merge(*names)
    path = save_merged(service.host.backbone, out)
    if not as_json:
        say("\n".join(report.lines()))
    emit({"path": path, "model": model, "adapters": adapters, **asdict(report)}, str(path), as_json=as_json)
