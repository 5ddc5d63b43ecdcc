"""Rollouts under adaptive quantisation noise: a sampling client whose norms are perturbed anew at every training step.

In: a service, the tenant's adapter, the schedule of the noise. Out: for a training step, a client that samples from the
adapter under that step's noise. What is trained never sees it. Refuses to know rewards and losses.
"""

from __future__ import annotations

import zlib

from lorica.adapters.adapter import Adapter
from lorica.client.local import SamplingClient, Service
from lorica.core.errors import ConfigError
from lorica.engine.host import RowSpec, TargetSpec
from lorica.methods.aqn import AQN, END, STAGES, START, schedule


class RolloutNoise:
    """Noise on the norms of one tenant's rollouts (arXiv 2510.11696); other tenants have their own, or none.

    Args:
        adapter: whose rollouts they are: an adapter, a stack, or None for the base.
        steps: of the whole training run. start, end, stages: see `lorica.methods.aqn.schedule`.
        seed: of the noise, which is a function of seed, step and site.
        targets: the norms; None are all of them.

    Raises: ConfigError for a schedule that is none, TargetError for targets that are no norms.
    """

    def __init__(
        self,
        service: Service,
        adapter: RowSpec,
        *,
        steps: int,
        start: float = START,
        end: float = END,
        stages: int = STAGES,
        seed: int = 0,
        targets: TargetSpec = None,
    ) -> None:
        schedule(0, steps, start=start, end=end, stages=stages)
        if seed < 0:
            raise ConfigError(f"The seed of the noise is {seed}; a number that is not negative is right.")
        self.service, self.seed, self.targets = service, seed, targets
        self.stack = [] if adapter is None else [adapter] if isinstance(adapter, str | Adapter) else list(adapter)
        self.steps, self.start, self.end, self.stages = steps, start, end, stages
        self._drawn: Adapter | None = None
        service.host.layout(AQN(), targets)  # a wrong target is told now, not at the first noisy step

    def sigma(self, step: int) -> float:
        """The standard deviation of the noise at a training step."""
        return schedule(step, self.steps, start=self.start, end=self.end, stages=self.stages)

    def at(self, step: int) -> SamplingClient:
        """A client that samples under the noise of training step `step`, drawn on clean norms; the one before is of no
        use any more. Where the schedule has no noise, it samples from the adapter itself.
        """
        sigma = self.sigma(step)
        self.close()
        if not sigma:
            return self.service.sampling_client(self.stack or None)
        host, number = self.service.host, 0
        while f"noise {number}" in host.adapters:
            number += 1
        seed = zlib.crc32(f"{self.seed}/{step}".encode())
        self._drawn = host.add(f"noise {number}", AQN(sigma=sigma), self.targets, seed=seed)
        return self.service.sampling_client([*self.stack, self._drawn])

    def close(self) -> None:
        """Forget the last draw."""
        host = self.service.host
        if self._drawn is not None and host.adapters.get(self._drawn.name) is self._drawn:
            host.delete(self._drawn.name)
        self._drawn = None
