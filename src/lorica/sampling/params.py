"""How to sample: temperature, truncation, length, stops, seed."""

from __future__ import annotations

from pydantic import Field

from lorica.core.config import Config


class SamplingParams(Config):
    """Settings of one sampling call. Temperature 0 is greedy."""

    max_tokens: int = Field(64, ge=1, description="most tokens to sample, the stop token included")
    temperature: float = Field(
        0.0, ge=0, description="0 takes the likeliest token; 1 samples from the model's distribution"
    )
    top_k: int | None = Field(None, ge=1, description="sample among the k likeliest tokens only")
    top_p: float = Field(1.0, gt=0, le=1, description="sample among the fewest tokens whose probabilities sum to top_p")
    seed: int = Field(0, description="row i of a call draws from a generator seeded by (seed, i)")
    stop_ids: tuple[int, ...] = Field(
        (), description="token ids that end a sample; the id itself is kept as the last token"
    )
