"""docs/reference/python.md: signatures and first sentences of the public API.

In: the names below. Out: Markdown. What is not listed here may change without notice. Refuses to know how things work.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from scripts.docs.markdown import GENERATED, first_sentence

PUBLIC: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Models", "lorica.models", ("load", "wrap", "tiny", "names", "Backbone")),
    ("Adapters on a model", "lorica.engine.host", ("attach", "Host")),
    ("Methods", "lorica.methods", ("all_methods", "get_method", "make_method", "Method", "Paper")),
    ("Targets", "lorica.adapters.targets", ("Targets",)),
    ("One adapter", "lorica.adapters.adapter", ("Adapter",)),
    (
        "Rules of merging",
        "lorica.adapters.merging",
        ("all_mergings", "get_merging", "make_merging", "Merging", "Change", "change_of"),
    ),
    ("Combining adapters", "lorica.adapters.merging.combine", ("combine", "CombineReport")),
    ("Composing adapters", "lorica.recipes.compose", ("compose", "learn_soup", "ComposeConfig", "SoupsConfig")),
    ("Inspecting an adapter", "lorica.adapters.analysis.report", ("inspect_adapter", "Inspection")),
    (
        "Directions",
        "lorica.adapters.analysis.directions",
        ("Directions", "mean_difference", "cosines", "random_like"),
    ),
    ("Measuring directions", "lorica.recipes.directions", ("extract", "sample_under", "scalar_table")),
    (
        "Interventions",
        "lorica.engine.interventions",
        ("steer", "project_out", "adapter_zero", "adapter_steer", "adapter_turn"),
    ),
    ("Lineage", "lorica.adapters.lineage", ("Lineage", "Parent", "lineage_at", "sha256_of")),
    ("Ancestry", "lorica.adapters.ancestry", ("trace", "Ancestry")),
    ("Data", "lorica.data.records", ("load_records", "Dataset", "Chat", "Completion", "Text")),
    ("Rendering", "lorica.data.render", ("prepare", "Renderer", "Prepared")),
    ("Examples", "lorica.data.example", ("Example", "truncate")),
    ("Data for the engine", "lorica.data.datum", ("Datum",)),
    ("Batches", "lorica.data.packing", ("Sampler",)),
    ("Clients", "lorica.client.local", ("Service", "TrainingClient", "SamplingClient", "Loss", "Step")),
    ("Losses", "lorica.training.losses", ("make_loss",)),
    ("Optimiser", "lorica.training.optimizer", ("AdamWConfig",)),
    ("Sampling", "lorica.sampling.params", ("SamplingParams",)),
    ("Samples", "lorica.engine.sample", ("Sample", "generate")),
    ("Supervised fine-tuning", "lorica.recipes.sft", ("run", "resume", "plan", "Observer", "Outcome")),
    ("The same as a flat loop", "lorica.recipes.sft_loop", ("train",)),
    ("Configs", "lorica.recipes.config", ("SFTConfig", "DataConfig", "read_config")),
)
"""(heading, module, names)."""
INNER = {"begin", "relengthened", "windowed", "attention_hub", "covers_head", "layout"}
"""Members that the engine calls; users do not."""


def page() -> str:
    parts = [
        GENERATED,
        "# Python",
        "`import lorica` is light: torch is imported when one of these is first used. `lorica.attach`, `lorica.load`, "
        "`lorica.make_method`, `lorica.all_methods` and `lorica.Host` are short names for what is listed below.",
    ]
    for title, module_name, names in PUBLIC:
        module = importlib.import_module(module_name)
        parts += [f"## {title}", f"`{module_name}`"]
        for name in names:
            parts += entry(name, getattr(module, name))
    return "\n\n".join(parts) + "\n"


def entry(name: str, item: Any) -> list[str]:
    """One function, or a class with its public members."""
    if not inspect.isclass(item):
        return [f"### `{name}`", block(signature(name, item)), first_sentence(item.__doc__)]
    head = "settings: see [Settings](config.md)" if issubclass(item, BaseModel) else ""
    parts = [
        f"### `{name}`",
        block(f"class {name}") if head or inspect.isabstract(item) else block(signature(name, item)),
    ]
    parts.append(first_sentence(item.__doc__) + (f" Its {head}." if head else ""))
    rows = [f"- `{said}`: {first_sentence(doc)}" for said, doc in members(item)]
    return [*parts, "\n".join(rows)] if rows else parts


def members(cls: type) -> Iterator[tuple[str, str]]:
    """Public methods and properties that the class itself defines and documents."""
    for name, item in vars(cls).items():
        if name.startswith("_") or name in INNER:
            continue
        if isinstance(item, property) and item.__doc__:
            yield f".{name}", item.__doc__
        elif isinstance(item, classmethod | staticmethod) and item.__doc__:
            yield f".{signature(name, getattr(cls, name))}", item.__doc__
        elif inspect.isfunction(item) and item.__doc__:
            yield f".{signature(name, item)}", item.__doc__


class _Bare:
    """An annotation that prints without quotes."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _bare(annotation: Any) -> Any:
    return _Bare(annotation) if isinstance(annotation, str) else annotation


def signature(name: str, item: Any) -> str:
    """`name(a: int, *, b: str = 'x') -> None` without `self`."""
    found = inspect.signature(item)
    parameters = [p.replace(annotation=_bare(p.annotation)) for p in found.parameters.values() if p.name != "self"]
    made = found.replace(parameters=parameters, return_annotation=_bare(found.return_annotation))
    return f"{name}{made}".removesuffix(" -> None") if inspect.isclass(item) else f"{name}{made}"


def block(text: str) -> str:
    return f"```text\n{text}\n```"
