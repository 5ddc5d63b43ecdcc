"""Options that several commands share, and the model with adapters that they name.

In: names, paths, dtype, device. Out: a service with the adapters resident, a renderer, sampling settings.
Refuses to know what a command does with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lorica.cli.output import say

if TYPE_CHECKING:
    from lorica.client.local import Service
    from lorica.data.example import Example
    from lorica.data.render import Renderer
    from lorica.models.backbone import Backbone
    from lorica.sampling.params import SamplingParams

F = TypeVar("F", bound=Callable[..., Any])
POSITION_SCALE = "lorica.position_scale"
"""Where a command's context keeps the option of that name."""
QUANTIZE = "lorica.quantize"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def dtype_options(command: F) -> F:
    """`--dtype`, `--device`, and `--position-scale` and `--quantize`, which no command has to hand on."""
    command = click.option(
        "--quantize",
        metavar="KIND[,KEY=VALUE]",
        expose_value=False,
        callback=_remember(QUANTIZE),
        help="Pack the base's linear weights: nf4, nvfp4, …; `nf4,double=false`.  [default: as stored]",
    )(command)
    command = click.option(
        "--position-scale",
        type=float,
        metavar="F",
        expose_value=False,
        callback=_remember(POSITION_SCALE),
        help="Divide rotary positions by F, as an adapter was trained for.  [default: 1]",
    )(command)
    command = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")(command)
    return click.option(
        "--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="Dtype of the frozen base."
    )(command)


def _remember(key: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def keep(context: click.Context, option: click.Parameter, value: Any) -> None:
        if value is not None:
            context.meta[key] = value

    return keep


def model_options(command: F) -> F:
    """`--model`, `--adapter`, `--dtype`, `--device`."""
    command = dtype_options(command)
    command = click.option(
        "--adapter", "adapters", multiple=True, metavar="DIR", help="Adapter folder; several are stacked in order."
    )(command)
    return click.option("--model", default="nano", show_default=True, help="Built-in name, local directory or hub id.")(
        command
    )


def sampling_options(command: F) -> F:
    """The fields of `SamplingParams`, and stop texts."""
    options = (
        click.option("--max-tokens", type=int, default=128, show_default=True, help="Most tokens to sample."),
        click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token."),
        click.option("--top-k", type=int, help="Sample among the K likeliest tokens only."),
        click.option(
            "--top-p", type=float, default=1.0, show_default=True, help="Sample within this probability mass."
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Row i draws from (seed, i)."),
        click.option("--stop", "stops", multiple=True, metavar="TEXT", help="End an answer before this text."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def open_backbone(model: str, dtype: str, device: str) -> Backbone:
    """A backbone by name. Raises MissingError, FormatError, ConfigError."""
    from lorica.models import load

    given = click.get_current_context().meta
    scale, packed = given.get(POSITION_SCALE, 1.0), given.get(QUANTIZE)
    return load(model, dtype=dtype, device=device, position_scale=scale, quantize=packed)


def open_service(
    model: str, adapters: Sequence[str], dtype: str, device: str, *, from_quantized: bool = False
) -> tuple[Service, tuple[str, ...]]:
    """A service with the adapters resident, and their names in order."""
    from lorica.client.local import Service

    service = Service(open_backbone(model, dtype, device))
    names = tuple(unique_names(adapters))
    for name, path in zip(names, adapters, strict=True):
        service.host.load(path, name, from_quantized=from_quantized)
    if not click.get_current_context().params.get("as_json"):
        _say_what_is_absent(service, names)
    return service, names


def _say_what_is_absent(service: Service, names: Sequence[str]) -> None:
    """A warning for each adapter that was trained on top of others which do not act beneath it here."""
    from lorica.adapters.lineage import parent_at
    from lorica.adapters.parents import lineage_of, missing_beneath

    adapters = [service.host.adapter(name) for name in names]
    for index, adapter in enumerate(adapters):
        if lineage_of(adapter).of("stacked-on"):
            absent = missing_beneath(adapter, [parent_at(below.folder, "stacked-on") for below in adapters[:index]])
            if absent:
                on = ", ".join(parent.path or f"an unsaved {parent.method}" for parent in absent)
                say(f"warning: {adapter.name} was trained on top of {on}, which does not act beneath it here.")


def unique_names(paths: Sequence[str]) -> list[str]:
    """A name for each adapter folder: its path, numbered where one comes twice."""
    names: list[str] = []
    for path in map(str, map(Path, paths)):
        names.append(path if path not in names else f"{path} ({names.count(path) + len(names)})")
    return names


def make_renderer(backbone: Backbone) -> Renderer:
    """The renderer of a backbone's tokenizer. Raises MethodError when it has none."""
    from lorica.core.errors import MethodError
    from lorica.data.render import Renderer

    if backbone.tokenizer is None:
        raise MethodError(f"{backbone.name!r} has no tokenizer, so it cannot read or write text.")
    return Renderer(backbone.tokenizer)


def make_params(renderer: Renderer, stops: Sequence[str], **values: Any) -> SamplingParams:
    """Sampling settings; stop texts that are one token end the sampling itself. Raises ConfigError."""
    from lorica.sampling.params import SamplingParams

    encoded = [renderer.tokenizer.encode(text, add_special_tokens=False) for text in stops]
    single = {int(ids[0]) for ids in encoded if len(ids) == 1}
    return SamplingParams(**values, stop_ids=tuple(sorted(renderer.stop_ids | single)))


def cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop text in it."""
    ends = [at for at in (text.find(stop) for stop in stops if stop) if at >= 0]
    return text[: min(ends)] if ends else text


def read_sets(
    paths: Sequence[str], renderer: Renderer, max_length: int, *, quiet: bool
) -> dict[str, Sequence[Example]]:
    """The rows of data files as examples, by file; what was cut is said unless `quiet`. Raises DataError."""
    from lorica.data.records import load_records
    from lorica.data.render import prepare

    found: dict[str, Sequence[Example]] = {}
    for name, path in zip(unique_names(paths), paths, strict=True):
        ready = prepare(load_records(path), renderer, max_length)
        if ready.truncation is not None and ready.truncation.count and not quiet:
            say(f"{path}: {ready.truncation.sentence()}")
        found[name] = ready.examples
    return found
