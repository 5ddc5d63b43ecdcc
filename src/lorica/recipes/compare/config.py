"""The settings of a comparison: which methods with which settings, on what data, and how their rates are tuned.

In: texts such as `lora:rank=4` and plain values. Out: a validated `CompareConfig`, and `Entry`s whose labels
differ. Refuses to know models, data and how a comparison goes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from lorica.adapters.targets import Targets
from lorica.core.config import Config
from lorica.core.errors import ConfigError, did_you_mean
from lorica.methods import Method, all_methods, make_method
from lorica.models.quantize.config import Quantization
from lorica.recipes.config import DataConfig, read_value
from lorica.recipes.quickstart import configure
from lorica.training.optimizer import AdamWConfig

ALL = "all"
"""The entry that stands for every registered method with its default settings."""
RATES = {
    "adalora": 0.03,
    "aqn": 0.08,
    "bias": 0.03,
    "glora": 0.01,
    "intrinsic": 0.03,
    "loftq": 0.003,
    "lora_fa": 0.02,
    "lora_pro": 0.0015,
    "lora_xs": 0.04,
    "miss": 0.003,
    "multilora": 0.01,
    "singlora": 0.01,
}
"""Learning rates for nano of methods that ship no config and for which LoRA's is far off."""


class CompareConfig(Config):
    """One comparison of methods on one base and one data set."""

    model: str = Field("nano", description="a built-in name, a local directory or a hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="dtype of the frozen base")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes the GPU where there is one")
    quantize: Quantization | None = Field(
        None, description="pack the frozen base's linear weights, as in `nf4`; null keeps them in full"
    )
    methods: tuple[str, ...] = Field(
        description="`NAME`, `NAME:setting=value:…`, `all`, or `-NAME` to leave one of all out; `targets` and `lr` are "
        "settings of every method here"
    )
    targets: Targets = Field(Targets(), description="which sites to adapt; the default is each method's own")
    data: DataConfig = Field(description="what to train on; rows of `eval_path` choose the learning rates")
    test_path: str | None = Field(None, description="a file that nothing is chosen by; without it, rows are held out")
    validation_rows: int = Field(64, ge=1, description="most rows that choose the learning rates")
    test_rows: int = Field(256, ge=1, description="most rows that the reported loss is measured on")
    answer_rows: int = Field(64, ge=0, description="most test rows that are answered for exact match; 0 asks none")
    optimizer: AdamWConfig = Field(AdamWConfig(), description="AdamW, schedule and clipping; its `lr` is tuned")
    lr_grid: tuple[float, ...] | None = Field(None, description="learning rates to try, the same for every method")
    lr_factors: tuple[float, ...] = Field(
        (0.1, 0.3, 1.0, 3.0, 10.0), description="rates to try as multiples of the method's own, where no grid is given"
    )
    lr_scale: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="factor on every method's own rate; 0.1 suits models of billions"
    )
    halvings: int = Field(
        2, ge=0, le=8, description="how often the worse half of a method's rates is given up; 0 trains all to the end"
    )
    steps: int = Field(200, ge=1, description="optimiser steps of a whole run")
    batch_size: int = Field(8, ge=1, description="examples of one optimiser step")
    token_budget: int = Field(2048, ge=16, description="most tokens of one micro-batch, which candidates share")
    together: int = Field(40, ge=1, description="candidates in memory at a time; others wait on disk")
    seeds: tuple[int, ...] = Field((0,), description="the first tunes the rates; the winners then run with every one")
    timing_pairs: int = Field(5, ge=0, description="pairs of steps, one with LoRA, that times come from; 0 skips them")

    @field_validator("quantize", mode="before")
    @classmethod
    def _packed(cls, value: Any) -> Any:
        return Quantization.of(value)

    @field_validator("methods", "seeds", "lr_grid", "lr_factors", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | int | float) else value

    @field_validator("methods")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        entries(value)
        return value

    @field_validator("lr_grid", "lr_factors")
    @classmethod
    def _rates(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        return value if value is None else tuple(sorted(checked_rates(value)))

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) != len(value) or min(value) < 0:
            raise ConfigError(f"CompareConfig.seeds is {list(value)}; different integers from 0 on are right.")
        return value

    @field_validator("optimizer", mode="before")
    @classmethod
    def _no_rate(cls, value: Any) -> Any:
        if isinstance(value, dict) and "lr" in value:
            raise ConfigError("A comparison tunes optimizer.lr for each method; set lr_grid, lr_factors or lr_scale.")
        return value

    def rungs(self) -> list[int]:
        """Steps after which candidates are measured and some are given up; the last is the end of the run."""
        return sorted({max(1, self.steps >> k) for k in range(self.halvings + 1)})

    def rates(self, entry: Entry) -> tuple[float, ...]:
        """The learning rates that are tried for one entry, ascending."""
        if entry.rates is not None:
            return entry.rates
        if self.lr_grid is not None:
            return self.lr_grid
        own = self.lr_scale * default_rate(entry.method.name)
        return tuple(float(f"{own * factor:.4g}") for factor in self.lr_factors)


@dataclass(frozen=True, eq=False)
class Entry:
    """One thing that is compared: a configured method, and what its own text says of targets and rates."""

    label: str
    method: Method
    targets: Targets | None = None
    rates: tuple[float, ...] | None = None


def entries(texts: Sequence[str]) -> list[Entry]:
    """The entries that texts name, in order. Raises ConfigError for equal labels, MethodError for unknown methods."""
    words = [word.strip() for word in texts]
    found = [name for word in words for name in (all_methods() if word == ALL else (word,))]
    for out in [word[1:] for word in words if word.startswith("-")]:
        if out not in found:
            raise ConfigError(f"'-{out}' takes out {out!r}, which is not there.{did_you_mean(out, found)}")
        found = [word for word in found if word not in (out, f"-{out}")]
    for label in found:
        if found.count(label) > 1:
            raise ConfigError(f"{label!r} is named twice; what is compared needs labels that differ.")
    if not found:
        raise ConfigError("There is nothing to compare: name methods, e.g. `lora,dora`, or `all`.")
    return [_entry(label) for label in found]


def _entry(label: str) -> Entry:
    name, *parts = split(label, ":")
    settings: dict[str, Any] = {}
    for part in parts:
        key, equals, text = part.partition("=")
        if not equals or not key:
            raise ConfigError(f"{part!r} in {label!r} is not of the form setting=value, e.g. `lora:rank=4`.")
        if key in settings:
            raise ConfigError(f"{label!r} sets {key!r} twice.")
        settings[key] = read_value(text)
    targets, rates = settings.pop("targets", None), settings.pop("lr", None)
    return Entry(
        label,
        make_method(name, **settings),
        None if targets is None else Targets.of(targets),
        None if rates is None else tuple(sorted(checked_rates(rates if isinstance(rates, list) else [rates]))),
    )


def checked_rates(values: Sequence[Any]) -> list[float]:
    """Rates, or factors on rates, as numbers. Raises ConfigError unless all are positive, finite and different."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):  # YAML takes 1e-3 for a word, which float() reads
        numbers = []
    numbers = [number for number in numbers if 0 < number < float("inf")]
    if not numbers or len(numbers) != len(values) or len(set(numbers)) != len(numbers):
        raise ConfigError(f"Learning rates {list(values)} must be different positive numbers, e.g. `[1e-3, 3e-3]`.")
    return numbers


def split(text: str, sign: str) -> list[str]:
    """Parts of a text between signs that stand outside brackets and braces."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "[{(") - (char in "]})")
        if char == sign and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def default_rate(name: str) -> float:
    """The learning rate that ships for a method on nano; LoRA's where none does."""
    return RATES.get(name) or configure(name).optimizer.lr


def file_name(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^\w.+=-]+", "_", label).strip("_")
