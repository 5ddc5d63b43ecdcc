"""What an engine process is started with, as a record and as command-line arguments.

In: values, or arguments. Out: the other. Imports no torch, so that the API process can start an engine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from lorica.core.config import Config
from lorica.core.errors import ConfigError
from lorica.models.shifted_attention import Shifted


class EngineSettings(Config):
    """Of one engine process. Budgets are in tokens; they bound memory, whatever clients ask for."""

    model: str = Field(description="built-in name, directory or hub id of the backbone")
    dtype: str = Field("auto", description="dtype of the backbone's weights")
    device: str = Field("auto", description="where it computes; auto takes the GPU where there is one")
    quantize: str | None = Field(None, description="packs the backbone's linear weights: `nf4`, `nf4,double=false` …")
    data: Path | None = Field(None, description="folder for runs that are not in memory; none is a temporary one")
    root: Path | None = Field(None, description="folder that relative artifact paths begin in; none is the present one")
    threads: int = Field(0, ge=0, description="threads that compute; 0 is torch's choice")
    token_budget: int = Field(2048, ge=1, description="most training tokens that are computed at once, of all tenants")
    resident: int = Field(64, ge=1, description="runs whose tensors are on the device")
    hosted: int = Field(256, ge=0, description="further runs in the host's memory, where the device has its own")
    samplers: int = Field(64, ge=1, description="adapters for sampling that are on the device")
    slots: int = Field(32, ge=1, description="sequences that are sampled at once")
    kv_budget: int = Field(65536, ge=0, description="most positions whose keys and values are kept; 0 is no limit")
    prompt_budget: int = Field(2048, ge=1, description="most prompt tokens that one sampling turn reads")
    position_scale: float = Field(1.0, description="what rotary positions are divided by, for all runs")
    attention: Literal["dense", "shifted"] = Field(
        "dense", description="what training passes of all runs attend in; evaluation and sampling are dense"
    )
    attention_group: int = Field(0, ge=0, description="tokens of a shifted group; 0 is a quarter of each sequence")
    graphs: bool = Field(True, description="replays passes that come again as CUDA graphs, where there is a GPU")
    native: bool = Field(True, description="kernels in C on a CPU, where the machine has a C compiler")
    deterministic: bool = Field(False, description="no two requests share a computation; results are bitwise equal")

    def shifted(self) -> Shifted | None:
        """The groups of training passes; None where these are dense."""
        return Shifted(group=self.attention_group or None) if self.attention == "shifted" else None

    @model_validator(mode="after")
    def _group_of_what(self) -> Self:
        if self.attention == "dense" and self.attention_group:
            raise ConfigError(
                f"attention_group is {self.attention_group}, but attention is dense; attention=shifted has groups."
            )
        self.shifted()
        return self

    def arguments(self) -> list[str]:
        """As `parse` reads it. Fields that are None are None by default too."""
        values = self.model_dump(mode="json", exclude_none=True)
        return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def parse(arguments: Sequence[str]) -> tuple[int, EngineSettings]:
    """The socket's file descriptor, and the settings. Raises ConfigError; exits for an unknown argument."""
    parser = argparse.ArgumentParser(prog="python -m lorica.engine.worker", description="An engine of `lorica serve`.")
    parser.add_argument("--fd", type=int, required=True, help="socket on which commands come and replies go")
    for name, field in EngineSettings.model_fields.items():
        parser.add_argument(f"--{name.replace('_', '-')}", required=field.is_required(), help=field.description)
    found = vars(parser.parse_args(arguments))
    fd = found.pop("fd")
    return fd, EngineSettings.parse({name: value for name, value in found.items() if value is not None})
