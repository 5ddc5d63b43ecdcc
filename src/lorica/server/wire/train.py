"""`forward_backward` on the wire: a protobuf request becomes a Train command, a Trained reply becomes protobuf.

In: the request's bytes. Out: who is meant (`head`), then the command; and the answer's bytes. Every wrong request is a
DataError with one sentence. Refuses to know losses, runs and tenants; the engine judges what a loss needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray

from lorica.core.errors import DataError
from lorica.engine.arrays import array, numpy
from lorica.engine.commands import Array, Datum, Train, Trained
from lorica.server.wire.proto import pb
from lorica.server.wire.tensors import read_tensor, wire_dtype, write_batched


@dataclass(frozen=True, slots=True)
class Head:
    """What a request says before its data is looked at."""

    model_id: str
    seq_id: int
    tokens: int
    backward: bool


def parse(body: bytes) -> Any:
    """The protobuf message. Raises DataError for bytes that are none."""
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError:
        raise DataError("The body is not a protobuf ForwardBackwardRequest.") from None
    return message


def head(message: Any) -> Head:
    """Whose request it is, its place in the order, and how many tokens it holds."""
    tokens = sum(len(chunk.encoded_text.tokens) // 4 for datum in message.data for chunk in datum.model_input)
    return Head(message.model_id, int(message.seq_id), tokens, not message.forward_only)


def command(message: Any, *, id: int, run: str) -> Train:
    """The command for a request. Raises DataError naming the datum and the field."""
    if not message.data:
        raise DataError("The request holds no data; forward_backward needs at least one datum.")
    config: dict[str, float | str]
    if message.loss_fn_config_v2:
        config = {
            key: value.text if value.WhichOneof("value") == "text" else value.number
            for key, value in sorted(message.loss_fn_config_v2.items())
        }
    else:
        config = dict(sorted(message.loss_fn_config.items()))
    return Train(
        id=id,
        run=run,
        datums=[_datum(datum, f"Datum {i}") for i, datum in enumerate(message.data)],
        loss=message.loss_fn,
        config=config,
        backward=not message.forward_only,
    )


def _datum(message: Any, where: str) -> Datum:
    inputs = {
        name: read_tensor(tensor, f"{where}'s {name!r}") for name, tensor in sorted(message.loss_fn_inputs.items())
    }
    return Datum(_tokens(message.model_input, where), inputs)


def _tokens(chunks: Any, where: str) -> Array:
    parts = []
    for chunk in chunks:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise DataError(f"{where} holds a chunk of kind {kind or 'nothing'!r}; this server reads text tokens only.")
        data = chunk.encoded_text.tokens
        if len(data) % 4:
            raise DataError(f"{where} has {len(data)} bytes of tokens, which is no whole number of 4-byte tokens.")
        parts.append(np.frombuffer(data, dtype="<i4"))
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    if not tokens.size:
        raise DataError(f"{where} has no tokens.")
    return array(tokens)


def answer(reply: Trained) -> bytes:
    """A `ForwardBackwardOutput`: one record for each stretch of datums whose fields have equal trailing axes."""
    output = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    arrays = [{name: wire_dtype(numpy(value)) for name, value in sorted(datum.items())} for datum in reply.outputs]
    for datums in _rectangular(arrays):
        record = output.loss_fn_outputs.add(num_datums=len(datums))
        for name in datums[0]:
            write_batched(record.fields[name], [datum[name] for datum in datums])
    for key, value in reply.metrics.items():
        # the client splits every key at its one colon
        output.metrics[key if key.count(":") == 1 else f"{key.replace(':', '_')}:mean"] = value
    data: bytes = output.SerializeToString()
    return data


def _rectangular(arrays: list[dict[str, NDArray[Any]]]) -> Iterator[list[dict[str, NDArray[Any]]]]:
    def form(datum: dict[str, NDArray[Any]]) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        return tuple((name, value.dtype.name, value.shape[1:]) for name, value in datum.items())

    for _, group in groupby(arrays, key=form):
        yield list(group)
