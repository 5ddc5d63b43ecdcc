"""From the service's messages to what the engine computes with, checked, and back.

In: `commands.Datum`s with a loss. Out: `Intake`: a `data.Datum`, and log-probabilities in the shape of its targets.
Refuses to know how messages travel, adapters and models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorica.core.errors import DataError
from lorica.data.datum import Datum, Floats, Ints
from lorica.engine import commands
from lorica.engine.arrays import array, dense, numpy
from lorica.training.losses import Loss

TARGETS = "target_tokens"
DTYPES = ("float32", "float64", "int32", "int64")
MOST_CELLS = 2**24
"""Most elements of one dense [T, K] array: what a sparse one would become, however few values it holds."""

Given = commands.Array | commands.Csr


@dataclass(frozen=True, slots=True, eq=False)
class Intake:
    """A datum, and where its M pairs lie in targets of `shape` (flat indices; None: everywhere, in order)."""

    datum: Datum
    shape: tuple[int, ...]
    cells: Ints | None = None

    def output(self, logprobs_M: Floats) -> commands.Array:
        """Log-probabilities float32 in the targets' shape, 0 in cells of a sparse array that nobody filled."""
        own = logprobs_M.astype(np.float32, copy=False)
        if self.cells is not None:
            dense = np.zeros(int(np.prod(self.shape)), np.float32)
            dense[self.cells] = own
            own = dense
        return array(own.reshape(self.shape))


def take_in(message: commands.Datum, loss: Loss, where: str) -> Intake:
    """A message's datum. Targets are [T], or [T, K] for several a position, dense or CSR; inputs have their shape.

    A sparse array holds what its dense form holds: cells that are zero in the targets and in every input are no pairs.
    Raises DataError: no targets, bytes that do not make the shape, tokens that are no integers, shapes that disagree,
    and what `Datum` and `Loss.check` refuse.
    """
    tokens = _integers(checked(message.tokens, f"{where}: tokens"), f"{where}: tokens")
    if tokens.ndim != 1:
        raise DataError(f"{where}: tokens have shape {tokens.shape}; one row of ids is right.")
    if TARGETS not in message.inputs:
        raise DataError(f"{where} has no {TARGETS!r}, which every loss reads.")
    arrays = {name: checked(given, f"{where}: {name}") for name, given in message.inputs.items()}
    targets = _integers(arrays.pop(TARGETS), f"{where}: {TARGETS}")
    count, shape = len(tokens), targets.shape
    if targets.ndim not in (1, 2) or shape[0] != count:
        raise DataError(f"{where}: {TARGETS} has shape {shape}; ({count},) or ({count}, K) is right.")
    for name, values in arrays.items():
        if values.shape != shape:
            raise DataError(f"{where}: {name} has shape {values.shape}; that of {TARGETS}, {shape}, is right.")
    inputs = {name: values.reshape(-1).astype(np.float32) for name, values in arrays.items()}
    flat, cells, crow = targets.reshape(-1), None, None
    if targets.ndim == 2:
        crow = np.arange(count + 1, dtype=np.int64) * shape[1]
    if any(isinstance(given, commands.Csr) for given in message.inputs.values()):
        filled = flat != 0
        for values in inputs.values():
            filled |= values != 0
        cells = np.flatnonzero(filled)
        flat, inputs = flat[cells], {name: values[cells] for name, values in inputs.items()}
        crow = np.concatenate([np.zeros(1, np.int64), filled.reshape(count, -1).sum(1).cumsum()])
    datum = Datum(tokens, flat, inputs, crow, where)
    loss.check(datum)
    return Intake(datum, shape, cells)


def checked(given: Given, where: str) -> NDArray[Any]:
    """A message's array, a sparse one filled up with zeros. Raises DataError where its parts do not fit together."""
    if isinstance(given, commands.Array):
        return _array(given, where)
    if len(given.shape) != 2 or min(given.shape) < 0:
        raise DataError(f"{where} is sparse and has shape {given.shape}; (T, K) is right.")
    rows, columns = given.shape
    if rows * columns > MOST_CELLS:
        raise DataError(f"{where} has shape {given.shape}; at most {MOST_CELLS} cells are right.")
    values, col = _array(given.values, where).reshape(-1), _integers(_array(given.col, where).reshape(-1), where)
    crow = _integers(_array(given.crow, where).reshape(-1), where)
    if len(crow) != rows + 1 or crow[0] != 0 or crow[-1] != len(values) or (np.diff(crow) < 0).any():
        raise DataError(f"{where} has row pointers that do not divide its {len(values)} values among {rows} rows.")
    if len(col) != len(values) or (len(col) and not (col.min() >= 0 and col.max() < columns)):
        raise DataError(f"{where} has column indices that do not place its {len(values)} values in {columns} columns.")
    return dense(given)


def _array(message: commands.Array, where: str) -> NDArray[Any]:
    if message.dtype not in DTYPES:
        raise DataError(f"{where} is {message.dtype!r}; {', '.join(DTYPES)} are right.")
    dtype, size = np.dtype(message.dtype), 1
    for axis in message.shape:
        size *= axis
    if any(axis < 0 for axis in message.shape) or len(message.data) != size * dtype.itemsize:
        raise DataError(
            f"{where} is {len(message.data)} bytes; they do not make {message.shape} numbers of {dtype.itemsize} bytes."
        )
    return numpy(message)


def _integers(values: NDArray[Any], where: str) -> Ints:
    if values.dtype.kind != "i":
        raise DataError(f"{where} is {values.dtype}; token ids and indices are integers.")
    return values.astype(np.int64)
