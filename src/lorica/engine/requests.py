"""What is asked of a stream of samples, and what it tells.

In: nothing. Out: plain records: a request, its result, and the events of a turn. Refuses to know how anything is
computed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lorica.engine.route import Stack
from lorica.sampling.params import SamplingParams

NOTHING = (0, -99999.0)
"""Token id and log-probability of a place in `TopK` that holds nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class TopK:
    """For each of n positions the k likeliest tokens, likeliest first: `ids` int32 [n, k], `logprobs` float32 [n, k].
    Places that hold nothing are `NOTHING`: position 0 of a prompt, and places beyond the vocabulary.
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]

    @classmethod
    def empty(cls, positions: int, k: int) -> TopK:
        shape = (positions, k)
        return cls(np.full(shape, NOTHING[0], np.int32), np.full(shape, NOTHING[1], np.float32))


@dataclass(frozen=True, slots=True)
class Sample:
    """Sampled tokens (a stop token included), their log-probabilities, and whether a stop ended them."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool
    topk: TopK | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class StreamRequest:
    """`num_samples` continuations of one prompt; none where `params.max_tokens` is 0.

    Attributes:
        key: the caller's word for it, which events carry.
        prompt: at least one token.
        stack: adapters, innermost first, resident on the host; they must not change while the request is there.
        first: sample i is draw `first + i` of the settings' seed.
        prompt_logprobs: also the log-probability of every prompt token; topk_prompt: the likeliest at each of them.
        topk_sample: the likeliest tokens at each sampled one.
        name: what errors call the prompt.
        tells: whether every token is an event, and not the end alone; while anybody's is, a turn samples one of each.
    """

    key: Hashable
    prompt: Sequence[int]
    stack: Stack = ()
    params: SamplingParams = field(default_factory=SamplingParams)
    num_samples: int = 1
    first: int = 0
    prompt_logprobs: bool = False
    topk_prompt: int = 0
    topk_sample: int = 0
    name: str = "The prompt"
    tells: bool = True

    @property
    def scores_prompt(self) -> bool:
        """Whether every prompt position is asked for, and not only what follows the last."""
        return self.prompt_logprobs or self.topk_prompt > 0


@dataclass(frozen=True, slots=True)
class Result:
    """`prompt_logprobs` float32 [T], NaN at 0. `cached`: prompt tokens whose keys were there already."""

    samples: tuple[Sample, ...]
    prompt_logprobs: NDArray[np.float32] | None = None
    topk_prompt: TopK | None = None
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Token:
    """The next token of sample `index` of a request."""

    key: Hashable
    index: int
    token: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Finished:
    """All samples of a request are there; its last event."""

    key: Hashable
    result: Result


@dataclass(frozen=True, slots=True)
class Failed:
    """A request that could not be finished; its last event. A LoricaError was the request's own fault."""

    key: Hashable
    error: Exception


Event = Token | Finished | Failed
