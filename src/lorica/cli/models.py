"""`lorica models`: what can be loaded by name, and the sites of one model.

In: perhaps a name. Out: names, or sites by role. Refuses to know architectures.
"""

from __future__ import annotations

from typing import Any

import click

from lorica.cli.loading import dtype_options, open_backbone
from lorica.cli.output import emit, json_option, size, table


@click.command()
@click.argument("name", required=False)
@click.option("--all", "every", is_flag=True, help="Every site by its full name, instead of one line for each role.")
@dtype_options
@json_option
def command(name: str | None, every: bool, dtype: str, device: str, as_json: bool) -> None:
    """List the built-in models, or the sites of one model.

    A model is a built-in name, a local directory with config.json and weights, or a Hugging Face hub id.
    """
    if name is None:
        _list(as_json)
        return
    backbone = open_backbone(name, dtype, device)
    sites = list(backbone.sites.values())
    parameters = backbone.parameter_count()
    if every:
        headers: tuple[str, ...] = ("site", "kind", "shape", "layer")
        rows: list[tuple[Any, ...]] = [
            (s.name, s.kind, _shape(s.shape), "-" if s.layer is None else s.layer) for s in sites
        ]
    else:
        groups: dict[tuple[str, str, tuple[int, ...]], int] = {}
        for site in sites:
            key = (site.role, site.kind, site.shape)
            groups[key] = groups.get(key, 0) + 1
        headers = ("site", "kind", "shape", "count")
        rows = [(role, kind, _shape(shape), count) for (role, kind, shape), count in groups.items()]
    document = {
        "name": backbone.name,
        "family": backbone.family,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "parameters": parameters,
        "quantization": None if backbone.quantization is None else str(backbone.quantization),
        "weight_bytes": backbone.weight_bytes(),
        "fingerprint": backbone.fingerprint(),
        "causal_lm": backbone.is_causal_lm,
        "sites": [
            {"name": s.name, "kind": s.kind, "shape": s.shape, "layer": s.layer, "bias": s.bias, "tied": s.tied}
            for s in sites
        ],
    }
    kind = "causal language model" if backbone.is_causal_lm else "no language-model head"
    title = f"{backbone.name}: {backbone.family}, {kind}, {parameters:,} parameters in {document['dtype']}"
    if backbone.quantization is not None:
        title += f", linear weights packed as {backbone.quantization}: {size(backbone.weight_bytes())}"
    emit(document, f"{title}\n\n{table(headers, rows)}", as_json=as_json)


def _list(as_json: bool) -> None:
    from lorica.models.builtin import BUILTIN, FAMILIES

    text = "\n".join(
        [
            table(("name", "what"), list(BUILTIN.items())),
            "",
            "A local directory or a Hugging Face hub id works too, for every family that transformers loads;",
            f"tested: {', '.join(f for f in FAMILIES if f not in ('mlp', 'conv'))}.",
            "`lorica models NAME` lists a model's sites.",
        ]
    )
    emit({"builtin": BUILTIN, "families": list(FAMILIES)}, text, as_json=as_json)


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
