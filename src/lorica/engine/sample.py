"""Sampling mixed adapters in one closed batch: a stream that is given all its rows at once, and run to its end.

In: prompts, each with its adapter. Out: sampled tokens with log-probabilities.
Prompts run through the engine's own packed pass, so no padding is computed and the numbers are those of
`Engine.forward`. Refuses to know text, users and files.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorica.core.errors import DataError
from lorica.engine.host import Host, RowSpec
from lorica.engine.requests import Failed, Finished, Sample, StreamRequest
from lorica.engine.stream import PROMPT_BUDGET, Stream
from lorica.engine.trunk import Trunk
from lorica.sampling.params import SamplingParams

__all__ = ["PROMPT_BUDGET", "Sample", "generate"]


@torch.no_grad()
def generate(
    host: Host,
    rows: Sequence[tuple[Sequence[int], RowSpec]],
    params: SamplingParams,
    *,
    seeds: Sequence[int] | None = None,
) -> list[Sample]:
    """One sample for each (prompt, adapter), in their order.

    A row's tokens do not depend on the other rows, up to the rounding of joint products. Where a backbone cannot take
    tokens one by one, every token costs a pass over its whole row.

    Args:
        rows: prompts of at least one token, each with an adapter's name, a stack of names, or None for the base.
        seeds: of each row's draws; without, row i of the call draws from a generator seeded by (params.seed, i).

    Raises: DataError for an empty prompt, an id outside the vocabulary, or positions beyond the model's; RouteError
    for an unknown adapter; MethodError for a model that is no causal language model; FormatError for adapters whose
    log-probabilities are no numbers.
    """
    if seeds is not None and len(seeds) != len(rows):
        raise DataError(f"There are {len(rows)} prompts and {len(seeds)} seeds; each prompt needs one.")
    if not rows:
        Trunk(host)
        return []
    stream = Stream(host, slots=len(rows))
    for index, ((prompt, _), stack) in enumerate(zip(rows, host.stacks([spec for _, spec in rows]), strict=True)):
        own, first = (params, index) if seeds is None else (params.replace(seed=seeds[index]), 0)
        stream.add(StreamRequest(index, prompt, stack, own, first=first, name=f"Prompt {index}", tells=False))
    found: dict[int, Sample] = {}
    with stream.serving():
        while not stream.idle:
            for event in stream.turn(PROMPT_BUDGET):
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    assert isinstance(event.key, int)
                    found[event.key] = event.result.samples[0] if event.result.samples else Sample((), (), False)
    return [found[index] for index in range(len(rows))]
