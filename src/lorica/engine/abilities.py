"""Whether rows may share a packed pass of a backbone, found out by asking it.

In: a way to run rows packed, and the model's own pass of one. Out: yes or no, or an error for a model whose packed
passes are not its own. A layer that carries a state along the sequence (recurrent, convolutional) knows no borders
between rows, and nothing in its class says so. Refuses to know adapters and users.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorica.core.errors import LoricaError, MethodError
from lorica.models.backbone import Backbone

BEFORE, OTHER, ROW = range(3, 10), range(9, 2, -1), range(2, 11, 2)
"""Two rows that stand before a third, and the third, as multiples of a step through the vocabulary."""
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)
"""What foreign layers raise for a pass that they were not made for."""
INSTEAD = "Its adapters still work when the model itself is called, as `host(input_ids=…)`."


def probe_row(backbone: Backbone, multiples: Sequence[int] = ROW) -> list[int]:
    """Token ids of a short row."""
    vocabulary = backbone.weight("input").matrix().shape[1]
    return [k * 7 % vocabulary for k in multiples]


def close(found: Tensor, wanted: Tensor, *, exact: bool = False) -> bool:
    """Equal up to the rounding of other shapes (`exact`: of other company in the same shapes)."""
    wide = found.dtype in (torch.float32, torch.float64)
    limit = (1e-5 if wide else 1e-2) if exact else (1e-3 if wide else 0.1)
    same = found.shape == wanted.shape
    return same and bool((found.double() - wanted.double()).norm() <= limit * wanted.double().norm())


@torch.no_grad()
def probe_packing(
    backbone: Backbone, packed: Callable[[Sequence[Sequence[int]]], Tensor], alone: Callable[[Sequence[int]], Tensor]
) -> bool:
    """Whether the rows of a packed pass do not see each other.

    `packed(rows)` are the hidden states of rows in one pass, end to end; `alone(row)` those of the model's own pass.
    Raises MethodError where a packed pass of a single row is not what the model itself gives.
    """
    row, own = probe_row(backbone), alone(probe_row(backbone))
    try:
        single = packed([row])
    except LoricaError:
        raise
    except FAILURES as error:
        said = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise MethodError(
            f"{backbone.name!r} ({backbone.family}) cannot run the engine's packed passes: {said}.", hint=INSTEAD
        ) from error
    if not close(single, own):
        raise MethodError(
            f"The engine's pass of a single row through {backbone.name!r} ({backbone.family}) does not give what the "
            "model itself gives.",
            hint=INSTEAD,
        )
    try:
        pair = [packed([probe_row(backbone, before), row])[len(before) :] for before in (BEFORE, OTHER)]
    except FAILURES:  # it can do one row
        return False
    return close(*pair, exact=True) and close(pair[0], own)
