"""How to sample: temperature, truncation, length, stops, seed."""

from __future__ import annotations

from pydantic import Field, field_validator

from lorica.core.config import Config
from lorica.core.errors import ConfigError


class SamplingParams(Config):
    """Settings of one sampling call. Temperature 0 is greedy."""

    max_tokens: int = Field(64, ge=0, description="most tokens to sample, the stop token included; 0 samples none")
    temperature: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="0 takes the likeliest token; 1 samples from the model's distribution",
    )
    top_k: int | None = Field(None, ge=1, description="sample among the k likeliest tokens only")
    top_p: float = Field(1.0, gt=0, le=1, description="sample among the fewest tokens whose probabilities sum to top_p")
    seed: int = Field(0, description="row i of a call draws from a generator seeded by (seed, i)")
    stop_ids: tuple[int, ...] = Field(
        (), description="token ids that end a sample; the id itself is kept as the last token"
    )
    stop_sequences: tuple[tuple[int, ...], ...] = Field(
        (), description="runs of token ids that end a sample; the run itself is kept as the last tokens"
    )

    @field_validator("stop_sequences")
    @classmethod
    def _not_empty(cls, value: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        if not all(value):
            raise ConfigError("SamplingParams.stop_sequences has an empty sequence, which would end a sample at once.")
        return value

    def stops(self, tokens: list[int]) -> bool:
        """Whether what was sampled so far ends here."""
        if tokens[-1] in self.stop_ids:
            return True
        return any(tuple(tokens[-len(run) :]) == run for run in self.stop_sequences if run[-1] == tokens[-1])
