"""What a request did to its run's loss curve.

In: a command and the engine's reply. Out: what the store keeps of it. The weight of a pass is what its loss sums over:
the sum of |weight| where tokens have weights, else the number of targets. Refuses to know runs and databases.
"""

from __future__ import annotations

import numpy as np

from lorica.engine.arrays import numpy
from lorica.engine.commands import Command, Csr, Datum, Load, Reply, Step, Stepped, Train, Trained
from lorica.store import points

LOSS = "loss:sum"


def did(command: Command, reply: Reply) -> points.Did | None:
    """None where the request leaves the curve as it is."""
    if isinstance(command, Train) and isinstance(reply, Trained):
        if not command.backward or LOSS not in reply.metrics:
            return None
        tokens = sum(token_count(datum) for datum in command.datums)
        return points.Passed(reply.metrics[LOSS], sum(weight(datum) for datum in command.datums), tokens)
    if isinstance(command, Step) and isinstance(reply, Stepped):
        return points.Stepped(reply.metrics.get("grad_norm:mean"), command.adam.lr)
    return points.Dropped() if isinstance(command, Load) else None


def token_count(datum: Datum) -> int:
    return datum.tokens.shape[0]


def weight(datum: Datum) -> float:
    """What a datum's loss sums over."""
    given = datum.inputs.get("weights")
    if given is not None:
        values = numpy(given.values if isinstance(given, Csr) else given)
        total = float(np.abs(values).sum(dtype=np.float64))
        return total if np.isfinite(total) else 0.0
    targets = datum.inputs.get("target_tokens")
    return float(token_count(datum) if targets is None else targets.shape[0])
