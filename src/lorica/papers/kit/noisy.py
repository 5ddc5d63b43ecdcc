"""Rollouts of several tenants under noise on the norms: their entropy along a schedule, and whether they repeat.

In: a service, trained adapters, rows to take prompts from, a seed. Out: rows of measurements. Refuses to know papers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from lorica.adapters.adapter import Adapter
from lorica.client.local import Service
from lorica.client.noise import RolloutNoise
from lorica.core.config import Config
from lorica.data.example import Example
from lorica.engine.host import Host, RowSpec
from lorica.papers.kit.table import Row
from lorica.sampling.params import SamplingParams

Rollout = tuple[Sequence[int], Sequence[int]]
"""A prompt and what was sampled after it."""


class Rollouts(Config):
    """How rollouts are sampled, and how their noise is scheduled."""

    stages: int = Field(5, ge=3, description="stages of a schedule; the first has no noise")
    draws: int = Field(10, ge=1, description="training steps of a stage at which rollouts are noisy anew")
    prompts: int = Field(8, ge=1, description="prompts, of the test rows")
    tokens: int = Field(16, ge=1, description="tokens sampled after each, at temperature 1")


class Tenants:
    """Trained adapters as policies that share a base, each with its rollouts without noise."""

    def __init__(
        self, service: Service, adapters: Sequence[Adapter], rows: Sequence[Example], settings: Rollouts, seed: int
    ) -> None:
        self.service, self.adapters, self.settings, self.seed = service, adapters, settings, seed
        self.prompts = [prompt(row) for row in rows[: settings.prompts]]
        self.params = SamplingParams(max_tokens=settings.tokens, temperature=1.0, seed=seed)
        self.rollouts = [self._sampled(adapter) for adapter in self.adapters]

    def noise(self, tenant: int, start: float, end: float, *, seed: int | None = None) -> RolloutNoise:
        """A tenant's noise over a run of `draws` steps a stage; its seed is the tenant's own unless given."""
        own = self.seed * len(self.adapters) + tenant if seed is None else seed
        steps, adapter = self.settings.stages * self.settings.draws, self.adapters[tenant]
        return RolloutNoise(
            self.service, adapter, steps=steps, start=start, end=end, stages=self.settings.stages, seed=own
        )

    def followed(self, start: float, end: float) -> list[Row]:
        """Entropy at each stage of a schedule."""
        noises = [self.noise(tenant, start, end) for tenant in range(len(self.adapters))]
        rows: list[Row] = []
        clean, draws = self._entropy(self.adapters), self.settings.draws
        for stage in range(self.settings.stages):
            first = stage * draws
            sigma = noises[0].sigma(first)
            steps = range(first, first + (draws if sigma else 1))  # without noise, all are alike
            found = [self._entropy([noise.at(step).adapter for noise in noises]) for step in steps]
            mean = sum(found) / len(found)
            rows.append({"stage": stage, "sigma": sigma, "entropy": mean, "entropy gain": mean - clean})
        for noise in noises:
            noise.close()
        return rows

    def repeated(self, sigma: float) -> Row:
        """Which rollouts are the same again, by the seed of the noise; the first tenant's, all else being equal."""
        step = self.settings.draws  # the first with noise
        found = []
        for seed in (0, 0, 1):
            noise = self.noise(0, sigma, sigma, seed=seed)
            found.append(self._sampled(noise.at(step).adapter))
            noise.close()
        count = len(self.prompts)
        same, other = (sum(a == b for a, b in zip(found[0], again, strict=True)) / count for again in found[1:])
        return {"same seed": same, "other seed": other}

    def _sampled(self, stack: RowSpec) -> list[Rollout]:
        samples = self.service.sampling_client(stack).sample(self.prompts, self.params)
        return [(prompt, sample.tokens) for prompt, sample in zip(self.prompts, samples, strict=True)]

    def _entropy(self, stacks: Sequence[RowSpec]) -> float:
        """Mean entropy at the sampled positions, tenant i's rollouts under `stacks[i]`, all in one pass."""
        rows = [(stack, rollout) for stack, own in zip(stacks, self.rollouts, strict=True) for rollout in own]
        return entropy(self.service.host, rows)


def prompt(example: Example) -> list[int]:
    """What stands before the first token that is trained."""
    return list(example.tokens[: next(i for i, weight in enumerate(example.weights) if weight)])


@torch.no_grad()
def entropy(host: Host, rows: Sequence[tuple[RowSpec, Rollout]]) -> float:
    """The mean entropy, in nats, of the distributions that the sampled tokens of some rollouts are drawn from."""
    texts = [[*before, *after] for _, (before, after) in rows]
    longest = max(map(len, texts))  # padding on the right, which no token before it sees
    ids_BT = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=host.backbone.device)
    host.eval()
    with host.rows([stack for stack, _ in rows]):
        logp_BTV = host(input_ids=ids_BT, use_cache=False).logits.float().log_softmax(-1)
    entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1)
    spans = [(len(before) - 1, len(before) + len(after) - 1) for _, (before, after) in rows]
    return float(torch.cat([own[a:b] for own, (a, b) in zip(entropy_BT, spans, strict=True)]).mean())
