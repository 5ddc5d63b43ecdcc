"""A datum: tokens that a model reads, and for each position what it is asked and what a loss needs to know of it.

In: arrays. Out: `Datum`, checked. An `Example` is the special case whose targets are its own next tokens.
Refuses to know losses, texts and tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorica.core.errors import DataError

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Datum:
    """T tokens and M (position, target) pairs; M = T with one target a position.

    Attributes:
        tokens: [T] what the model reads.
        targets: [M] token ids whose log-probabilities are asked for.
        inputs: float arrays [M] by the loss's names (`weights`, `advantages` …).
        crow: [T + 1] where each position's pairs begin and end, ascending from 0 to M; None with one target a position.
        where: how errors call it.

    Raises DataError: no tokens, lengths that disagree, an input that is not finite.
    """

    tokens: Ints
    targets: Ints
    inputs: Mapping[str, Floats]
    crow: Ints | None = None
    where: str = "datum"

    def __post_init__(self) -> None:
        count, pairs = len(self.tokens), len(self.targets)
        if not count:
            raise DataError(f"{self.where} has no tokens; a model needs at least one to read.")
        if self.crow is None and pairs != count:
            raise DataError(f"{self.where} has {count} tokens and {pairs} targets; each token needs one.")
        if self.crow is not None:
            shape = len(self.crow) == count + 1 and self.crow[0] == 0 and self.crow[-1] == pairs
            if not shape or (np.diff(self.crow) < 0).any():
                raise DataError(
                    f"{self.where} has row pointers that do not divide its {pairs} targets among {count} tokens."
                )
        for name, values in self.inputs.items():
            if len(values) != pairs:
                raise DataError(f"{self.where} has {pairs} targets and {len(values)} {name}; each target needs one.")
            if not np.isfinite(values).all():
                at = int(np.flatnonzero(~np.isfinite(values))[0])
                raise DataError(f"{self.where} has {name}[{at}] = {values[at]}, which is no finite number.")

    def __len__(self) -> int:
        return len(self.tokens)

    def datum(self) -> Datum:
        """Itself: the engine takes examples too."""
        return self
