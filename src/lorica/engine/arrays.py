"""numpy arrays as the service's messages carry them, and back.

In: arrays, `commands.Array` and `commands.Csr`. Out: the other form. Refuses to know whether a message is well formed:
whoever takes it in has checked. Imports no torch, so that the API process can use it too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorica.engine.commands import Array, Csr


def array(values: NDArray[Any]) -> Array:
    """A numpy array as a message."""
    return Array(np.ascontiguousarray(values).tobytes(), values.dtype.name, tuple(values.shape))


def numpy(value: Array) -> NDArray[Any]:
    """The numpy view of a message's array, read-only."""
    return np.frombuffer(value.data, dtype=value.dtype).reshape(value.shape)


def dense(value: Array | Csr) -> NDArray[Any]:
    """The numpy array of either kind; a CSR matrix has zeros where it holds nothing."""
    if isinstance(value, Array):
        return numpy(value)
    values, crow, col = numpy(value.values), numpy(value.crow), numpy(value.col)
    filled = np.zeros(value.shape, values.dtype)
    filled[np.repeat(np.arange(value.shape[0]), np.diff(crow)), col] = values
    return filled
