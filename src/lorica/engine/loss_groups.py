"""The losses of a pass: sequences of one loss together, with its inputs end to end.

In: the loss of each sequence, and its datum. Out: groups, with the names of their inputs in the pass and the terms that
these give. Refuses to know how log-probabilities are made, and what becomes of the terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorica.data.datum import Datum, Floats
from lorica.training.losses import Loss


@dataclass(frozen=True, slots=True, eq=False)
class LossGroup:
    """Sequences of one loss, by their places in a pass: the loss's inputs end to end, and how many targets each has."""

    loss: Loss
    places: list[int]
    inputs: dict[str, Floats]
    lengths: list[int]

    def name(self, name: str) -> str:
        """What an input is called among those of the pass."""
        return f"{name} of {self.places[0]}"

    def terms(self, lps: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """The terms of the loss end to end."""
        lp_M = torch.cat([lps[i] for i in self.places])
        own = {name: inputs[self.name(name)].to(lp_M.dtype) for name in self.inputs}
        return self.loss.terms(lp_M, own, self.lengths)


def loss_groups(losses: Sequence[Loss], data: Sequence[Datum]) -> list[LossGroup]:
    """For each different loss, which sequences have it, and its inputs."""
    places: dict[Loss, list[int]] = {}
    for place, loss in enumerate(losses):
        places.setdefault(loss, []).append(place)
    return [_group(loss, own, data) for loss, own in places.items()]


def _group(loss: Loss, places: list[int], data: Sequence[Datum]) -> LossGroup:
    inputs = {}
    for name in (*loss.inputs, *loss.optional):
        default = loss.optional.get(name, 0.0)
        values = [data[i].inputs.get(name) for i in places]
        filled = [
            np.full(len(data[i].targets), default, np.float32) if own is None else own
            for i, own in zip(places, values, strict=True)
        ]
        inputs[name] = np.concatenate(filled)
    return LossGroup(loss, places, inputs, [len(data[i].targets) for i in places])


def sums(groups: Sequence[LossGroup], terms: Sequence[Tensor]) -> list[float]:
    """The loss of each sequence: the sum of its terms."""
    found: dict[int, float] = {}
    for group, terms_M in zip(groups, terms, strict=True):
        pieces = terms_M.split(group.lengths)
        sizes: list[float] = torch.stack([piece.double().sum() for piece in pieces]).tolist()
        found |= dict(zip(group.places, sizes, strict=True))
    return [found[place] for place in range(len(found))]
