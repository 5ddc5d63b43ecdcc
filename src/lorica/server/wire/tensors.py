"""Tensors between the wire and the engine: dense or CSR, and the wire's four dtypes.

In: protobuf tensors. Out: `commands.Array` and `commands.Csr`, checked to hold as many bytes as their shape says, and
back. bfloat16 becomes float32, which holds every bfloat16 exactly. Refuses to know what a tensor is for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorica.core.errors import DataError
from lorica.engine.arrays import array
from lorica.engine.commands import Array, Csr
from lorica.server.wire.proto import pb

_BFLOAT16 = pb.DTYPE_BFLOAT16
_READ: dict[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
    _BFLOAT16: np.dtype("<u2"),
}
_WRITE: dict[str, int] = {
    "float32": pb.DTYPE_FLOAT32,
    "int64": pb.DTYPE_INT64,
    "int32": pb.DTYPE_INT32,
}


def read_tensor(message: Any, where: str) -> Array | Csr:
    """A protobuf `Tensor`. Raises DataError, naming `where`, for bytes that do not fit dtype and shape."""
    if message.HasField("sparse_csr"):
        return _read_csr(message, where)
    values = _numbers(message.dense, message.dtype, where)
    shape = _shape(message.shape, where) if message.shape else (values.size,)
    if math.prod(shape) != values.size:
        raise DataError(f"{where} has {values.size} values, and shape {list(shape)} needs {math.prod(shape)}.")
    return array(values.reshape(shape))


def _read_csr(message: Any, where: str) -> Csr:
    values = _numbers(message.sparse_csr.values, message.dtype, where)
    crow = _numbers(message.sparse_csr.crow_indices, pb.DTYPE_INT64, f"{where}'s crow indices")
    col = _numbers(message.sparse_csr.col_indices, pb.DTYPE_INT64, f"{where}'s column indices")
    shape = _shape(message.shape, where)
    if len(shape) != 2:
        raise DataError(f"{where} is sparse and has shape {list(shape)}; CSR needs two axes.")
    rows, columns = shape
    if crow.size != rows + 1 or crow[0] != 0 or crow[-1] != values.size or bool((np.diff(crow) < 0).any()):
        raise DataError(f"{where}'s crow indices do not split {values.size} values into {rows} rows.")
    if col.size != values.size or (col.size and (col.min() < 0 or col.max() >= columns)):
        raise DataError(f"{where}'s column indices are not {values.size} numbers in 0 … {columns - 1}.")
    return Csr(array(values), array(crow), array(col), (rows, columns))


def _numbers(data: bytes, dtype: int, where: str) -> NDArray[Any]:
    kind = _READ.get(dtype)
    if kind is None:
        raise DataError(f"{where} has dtype {dtype}, which is none of float32, int64, int32 and bfloat16.")
    if len(data) % kind.itemsize:
        raise DataError(f"{where} has {len(data)} bytes, which is no whole number of {kind.itemsize}-byte values.")
    values = np.frombuffer(data, dtype=kind)
    if dtype == _BFLOAT16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _shape(given: Sequence[int], where: str) -> tuple[int, ...]:
    shape = tuple(int(n) for n in given)
    if len(shape) > 4 or any(n < 0 or n > 2**31 for n in shape):
        raise DataError(f"{where} has shape {list(shape)}, which no tensor here can have.")
    return shape


def write_batched(target: Any, values: Sequence[NDArray[Any]]) -> None:
    """Fill a `BatchedTensor` with one array for each datum; all share dtype and trailing axes. Offsets are bytes."""
    first = values[0]
    sizes = np.array([v.nbytes for v in values], dtype=np.int64)
    target.data = b"".join(np.ascontiguousarray(v).tobytes() for v in values)
    target.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]).tobytes()
    target.dtype = _WRITE[first.dtype.name]
    target.trailing_shape.extend(first.shape[1:])


def wire_dtype(values: NDArray[Any]) -> NDArray[Any]:
    """The array in a dtype that the wire has."""
    if values.dtype.name in _WRITE:
        return values
    return values.astype(np.float32 if values.dtype.kind == "f" else np.int64)
