"""The settings of a supervised fine-tuning run: one YAML file, overridden by `a.b=c`.

In: a file and overrides. Out: a validated `SFTConfig`. Unknown keys fail and name their nearest neighbours.
Refuses to know models, data and how a run goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator

from lorica.adapters.targets import Targets
from lorica.core.config import Config
from lorica.core.errors import ConfigError, MissingError
from lorica.methods import Method, make_method
from lorica.models.quantize.config import Quantization
from lorica.models.shifted_attention import Shifted
from lorica.training.optimizer import AdamWConfig


class DataConfig(Config):
    """What to train on."""

    path: str = Field(description="a JSONL, JSON, parquet or text file, or `everyday:train`")
    eval_path: str | None = Field(None, description="a file whose loss is measured during the run, never trained on")
    max_length: int = Field(
        1024, ge=2, description="most tokens of an example; longer ones are cut, counted and reported"
    )
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant", description="which turns of a conversation have weight"
    )
    chat: bool | Literal["auto"] = Field(
        "auto", description="whether prompt/completion rows are rendered with the chat template"
    )


class SFTConfig(Config):
    """One run of supervised fine-tuning."""

    model: str = Field("nano", description="a built-in name, a local directory or a hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="dtype of the frozen base")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes the GPU where there is one")
    quantize: Quantization | None = Field(
        None, description="pack the frozen base's linear weights, as in `nf4`; null keeps them in full"
    )
    position_scale: float = Field(
        1.0, ge=1, description="divide rotary positions by it, for so many times the base's context"
    )
    attention: Shifted | None = Field(
        None, description="null is dense; `{kind: shifted, group: 2048}` trains in shifted groups (LongLoRA)"
    )
    method: dict[str, Any] = Field(
        {"name": "lora"}, description="`name` and the method's own settings; see `lorica methods NAME`"
    )
    targets: Targets = Field(Targets(), description="which sites to adapt")
    continue_from: str | None = Field(
        None,
        description="an adapter folder to train further: its method, sites and values, and a fresh optimiser; leave "
        "`method` and `targets` out",
    )
    stack_on: tuple[str, ...] = Field(
        (), description="adapter folders, innermost first, that act frozen beneath the adapter that is trained"
    )
    data: DataConfig = Field(description="what to train on")
    optimizer: AdamWConfig = Field(AdamWConfig(), description="AdamW, schedule and clipping")
    epochs: float = Field(1.0, gt=0, description="passes over the data; ignored where `steps` is given")
    steps: int | None = Field(None, ge=1, description="optimiser steps, instead of epochs")
    batch_size: int = Field(16, ge=1, description="examples of one optimiser step")
    token_budget: int = Field(
        2048, ge=16, description="most tokens of one micro-batch; a step accumulates as many as it needs"
    )
    checkpointing: bool = Field(False, description="recompute activations in backward: less memory, more time")
    seed: int = Field(0, ge=0, description="seed of the adapter's init, its dropout and the order of the data")
    out: str = Field("runs/sft", description="run directory: config, metrics, curve, checkpoints, adapter")
    save_every: int = Field(100, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept; older ones are deleted")
    eval_every: int = Field(100, ge=1, description="steps between evaluations, where `data.eval_path` is given")
    track: Literal["none", "wandb", "trackio", "tensorboard"] = Field(
        "none", description="where metrics go besides metrics.jsonl"
    )
    project: str = Field("lorica", description="project name for the tracker")

    @field_validator("quantize", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return Quantization.of(value)

    @field_validator("stack_on", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "name" not in value:
            raise ConfigError("SFTConfig.method needs 'name', e.g. `method: {name: lora, rank: 8}`.")
        method = make_method(**value)  # defaults are written out, so that a stored config says everything
        return {"name": method.name, **method.model_dump(mode="json")}

    def make_method(self) -> Method:
        """The configured method."""
        return make_method(**self.method)


def read_config(
    path: str | Path | None, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> SFTConfig:
    """A config from a YAML file, with `a.b=c` overrides (values are YAML) on top. Raises ConfigError, MissingError."""
    values = {**(defaults or {}), **({} if path is None else _read_yaml(Path(path)))}
    return SFTConfig.parse(override(values, overrides))


def override(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of nested settings with `a.b=c` overrides, whose values are YAML, on top. Raises ConfigError."""
    changed = dict(values)
    for text in overrides:
        _apply(changed, text)
    return changed


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingError(f"There is no config file {str(path)!r}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings (`key: value`), not {type(values).__name__}.")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    """Set `a.b=c` in nested mappings. A bare word stays a string; anything else is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"Override {override!r} is not of the form key=value, e.g. `optimizer.lr=1e-3`.")
    here = values
    *parents, last = key.split(".")
    for part in parents:
        inner = here.get(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"Override {override!r} sets a field of {part!r}, which holds a plain value.")
        here[part] = dict(inner)
        here = here[part]
    here[last] = read_value(text)


def read_value(text: str) -> Any:
    """What stands behind the sign of equality: YAML, and numbers such as 1e-3 that YAML takes for words. Raises
    ConfigError.
    """
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except ValueError:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r} is not a YAML value: {' '.join(str(error).split())}.") from None


def to_yaml(config: SFTConfig) -> str:
    """The resolved config, every field."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
