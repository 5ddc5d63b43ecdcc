"""Sampling on the wire: a JSON request becomes a Sample command, a Sampled reply becomes a protobuf SampleResponse.

In: a validated body, the model's context and end tokens. Out: the command and the answer's bytes. Refuses to know
samplers and text; stop strings are the caller's (`server.stops`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lorica.core.errors import DataError
from lorica.engine.arrays import array, numpy
from lorica.engine.commands import Sample, Sampled, Sequence, TopK
from lorica.server.bodies import SampleBody
from lorica.server.wire.proto import pb

NO_TOKEN = (0, -99999.0)
"""What fills the places of a top-k table that hold nothing."""


def prompt_tokens(body: SampleBody) -> list[int]:
    """The prompt's tokens. Raises DataError where it has none."""
    tokens = [token for chunk in body.prompt.chunks for token in chunk.tokens]
    if not tokens:
        raise DataError("The prompt has no tokens.")
    return tokens


def check(body: SampleBody, context: int | None) -> None:
    """Refuse what this server cannot do and what no model could. Raises DataError."""
    tokens = prompt_tokens(body)
    for asked, name in (
        (body.target_prompt_logprobs is not None, "target_prompt_logprobs"),
        (body.prompt_alt_tokens_k > 0, "prompt_alt_tokens_k"),
    ):
        if asked:
            raise DataError(f"This server does not support {name}; prompt_logprobs and topk_prompt_logprobs it does.")
    if body.record_stability_info:
        raise DataError(
            "This server records no stability info: it is for the loss 'stable_reinforce', whose objective is not "
            "published; train with loss_fn='importance_sampling', 'ppo' or 'cispo'."
        )
    last = body.prompt_logprobs_last_n
    if last is not None and (not body.prompt_logprobs or not 1 <= last <= len(tokens) - 1):
        raise DataError(
            f"prompt_logprobs_last_n is {last}: it needs prompt_logprobs, and 1 to {len(tokens) - 1} for this prompt."
        )
    params = body.sampling_params
    if params.top_k != -1 and params.top_k < 1:
        raise DataError(f"top_k is {params.top_k}: a positive number, or -1 for no limit.")
    if context is not None and len(tokens) + (params.max_tokens or 0) > context:
        raise DataError(
            f"A prompt of {len(tokens)} tokens and max_tokens {params.max_tokens or 0} do not fit the context of "
            f"{context} tokens."
        )


def command(
    body: SampleBody,
    *,
    id: int,
    tenant: str,
    adapters: list[str],
    context: int | None,
    seed: int,
    stop_ids: list[int],
    stream: bool = False,
) -> Sample:
    """The command for a checked request. Without max_tokens a sample may fill the context."""
    tokens = prompt_tokens(body)
    params = body.sampling_params
    room = max((context or len(tokens) + 1024) - len(tokens), 1)
    return Sample(
        id=id,
        prompt=array(np.array(tokens, dtype=np.int32)),
        adapters=adapters,
        tenant=tenant,
        num_samples=body.num_samples,
        max_tokens=room if params.max_tokens is None else params.max_tokens,
        temperature=params.temperature,
        top_k=None if params.top_k == -1 else params.top_k,
        top_p=params.top_p,
        seed=seed if params.seed is None else params.seed,
        stop_ids=stop_ids,
        prompt_logprobs=bool(body.prompt_logprobs),
        topk_prompt=body.topk_prompt_logprobs,
        topk_sample=body.topk_sample_logprobs,
        stream=stream,
    )


def answer(reply: Sampled, *, last: int | None = None) -> bytes:
    """A `SampleResponse`. With `last`, prompt positions before the last so many hold no log-probability."""
    message = pb.SampleResponse(prompt_cache_hit_tokens=reply.cached)
    for sequence in reply.sequences:
        _sequence(message.sequences.add(), sequence)
    if reply.prompt_logprobs is not None:
        values = numpy(reply.prompt_logprobs).astype(np.float32)
        if values.size:
            values[0] = np.nan
        if last is not None:
            values[: max(values.size - last, 0)] = np.nan
        message.prompt_logprobs = values.tobytes()
    if reply.topk_prompt is not None:
        _topk(message.topk_prompt_logprobs, reply.topk_prompt, skip_last=last)
    data: bytes = message.SerializeToString()
    return data


def _sequence(target: Any, sequence: Sequence) -> None:
    target.stop_reason = pb.STOP_REASON_STOP if sequence.reason == "stop" else pb.STOP_REASON_LENGTH
    target.tokens = numpy(sequence.tokens).astype(np.int32).tobytes()
    target.logprobs = numpy(sequence.logprobs).astype(np.float32).tobytes()
    if sequence.topk is not None:
        _topk(target.topk_sampled_logprobs, sequence.topk)


def _topk(target: Any, table: TopK, *, skip_last: int | None = None) -> None:
    ids, logprobs = numpy(table.ids).astype(np.int32), numpy(table.logprobs).astype(np.float32)
    if skip_last is not None:
        early = max(len(ids) - skip_last, 0)
        ids[:early], logprobs[:early] = NO_TOKEN
    target.token_ids, target.logprobs = ids.tobytes(), logprobs.tobytes()
    target.length, target.k = ids.shape
