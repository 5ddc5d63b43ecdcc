"""What is asked of a batch before anything is computed: nobody's gradient changes when somebody's row is wrong.

In: sequences and a backbone. Out: nothing, or a DataError that names the row. Refuses to know adapters and losses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorica.core.errors import DataError
from lorica.data.datum import Ints
from lorica.models.backbone import Backbone
from lorica.models.positions import most_positions


def check_tokens(backbone: Backbone, rows: Sequence[Sequence[int] | Ints], names: Sequence[str]) -> None:
    """Raises DataError for a token id outside the vocabulary."""
    most = backbone.weight("input").matrix().shape[1]
    for name, row in zip(names, rows, strict=True):
        ids = np.asarray(row)
        if ids.size and not (ids.min() >= 0 and ids.max() < most):
            wrong = int(ids[(ids < 0) | (ids >= most)][0])
            raise DataError(f"{name} has token id {wrong}; this model's ids are 0 to {most - 1}.")


def check_positions(backbone: Backbone, totals: Sequence[int], names: Sequence[str]) -> None:
    """Raises DataError for a row with more positions, virtual ones included, than a model has vectors for."""
    most = most_positions(backbone.module)
    for name, total in zip(names, totals, strict=True):
        if most is not None and total > most:
            raise DataError(
                f"{name} takes {total} positions, and this model has {most}.", hint="Shorten it, or lower max_length."
            )
