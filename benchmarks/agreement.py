"""How far what a sampler says of a token is from what training says of it, and whether a request sent again is answered
with the same tokens.

In: nothing. Out: differences of log-probabilities of sampled tokens on `nano`, for each dtype, and how many of the
samples are others the second time, when the start of their prompts is known.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.models import RANK
from benchmarks.timing import command
from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.host import Host
from lorica.engine.requests import Finished, Sample, StreamRequest
from lorica.engine.stream import Stream
from lorica.methods.lora import LoRA
from lorica.models import load
from lorica.sampling.params import SamplingParams

TEXT = "{}. Once upon a time there was a little dog who wanted to play, and she said to her friend that they"
LENGTH = 20
"""Tokens of a random prompt: as those of the text, enough to be worth keeping for the next request."""
NAME = "a"


def host_of(dtype: str) -> Host:
    """nano with an adapter that changes it."""
    host = Host(load("nano", dtype=dtype))
    adapter = host.add(NAME, LoRA(rank=RANK, alpha=2 * RANK), seed=0)
    adapter.flat.add_(0.01 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(0)))
    return host


def prompts_of(kind: str, host: Host, count: int) -> list[list[int]]:
    """Of one text with a number before it, or of random tokens, which the model finds unlikely."""
    if kind == "text":
        tokenizer: Any = host.backbone.tokenizer
        return [tokenizer.encode(TEXT.format(i)) for i in range(count)]
    vocabulary, rng = host.backbone.weight("input").matrix().shape[1], torch.Generator().manual_seed(0)
    drawn: list[list[int]] = torch.randint(vocabulary, (count, LENGTH), generator=rng).tolist()
    return drawn


def sampled(stream: Stream, prompts: Sequence[Sequence[int]], tokens: int) -> list[Sample]:
    """One sample of each prompt, one after the other."""
    found: list[Sample] = []
    stack = stream.host.stacks([NAME])[0]
    for seed, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=tokens, temperature=1.0, seed=seed)
        stream.add(StreamRequest(seed, prompt, stack, params, tells=False))
        while not stream.idle:
            for event in stream.turn():
                assert isinstance(event, Finished)
                found += event.result.samples
    return found


def agreement(host: Host, prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, Any]:
    """Of one dtype and kind of prompt."""
    stream, engine = Stream(host, prefixes=2**14), Engine(host)
    first, again = (sampled(stream, prompts, tokens) for _ in range(2))
    apart = []
    for prompt, sample in zip(prompts, first, strict=True):
        trained = engine.forward([Item(Example.whole((*prompt, *sample.tokens)), NAME)])[0].logprobs
        apart.append((torch.as_tensor(trained)[-len(sample.tokens) :] - torch.tensor(sample.logprobs)).abs())
    apart_N = torch.cat(apart)
    return {
        "tokens": len(apart_N),
        "log-probabilities apart, mean": float(f"{apart_N.mean():.2g}"),
        "at most": float(f"{apart_N.max():.2g}"),
        "samples that are others the second time": sum(a.tokens != b.tokens for a, b in zip(first, again, strict=True)),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every dtype with each kind of prompt."""
    return {
        f"{dtype}, {kind}": agreement(host, prompts_of(kind, host, options.samples), options.tokens)
        for dtype, host in ((dtype, host_of(dtype)) for dtype in options.dtypes.split(","))
        for kind in ("text", "random tokens")
    }


def main() -> None:
    """Run, and print."""
    command(__doc__, "agreement", measure, samples=36, tokens=32, dtypes="float32,bfloat16")


if __name__ == "__main__":
    main()
