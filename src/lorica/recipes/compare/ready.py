"""What a comparison starts from: the base, the data in parts, and what each method costs alone.

In: a `CompareConfig`. Out: `Ready`. A method that the base cannot host, or that cannot be trained there, is noted with
the reason. Refuses to know learning rates that are worth trying, and terminals: progress goes to an `Observer`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorica.adapters.targets import Targets
from lorica.client.local import Service
from lorica.core.errors import MethodError
from lorica.data.example import Example
from lorica.data.packing import Sampler
from lorica.data.render import Renderer
from lorica.methods.lora import LoRA
from lorica.models import load
from lorica.models.backbone import Backbone
from lorica.recipes.compare import costs
from lorica.recipes.compare.config import CompareConfig, Entry, entries
from lorica.recipes.compare.costs import Costs
from lorica.recipes.compare.data import Parts, read_parts
from lorica.recipes.compare.report import Absent
from lorica.recipes.compare.train import FAILURES, Candidate, Field, why
from lorica.recipes.observer import Observer


@dataclass(frozen=True)
class Ready:
    """A comparison with everything loaded: the base, the data, and the methods that the base can host."""

    config: CompareConfig
    observer: Observer
    backbone: Backbone
    renderer: Renderer
    parts: Parts
    service: Service
    costs: dict[Entry, Costs]
    absent: list[Absent]

    def targets(self, entry: Entry) -> Targets:
        return entry.targets or self.config.targets

    def order(self, seed: int) -> list[list[Example]]:
        """The batches of a run with this seed, the same for every candidate."""
        config, train = self.config, self.parts.train
        sampler = Sampler(train, batch_size=config.batch_size, seed=seed)
        return [[train[i] for i in next(sampler)] for _ in range(config.steps)]


def prepare(config: CompareConfig, observer: Observer) -> Ready:
    """Load base and data, and measure what each method costs alone; methods that fail here are `absent`."""
    observer.say("loading model and data")
    backbone = load(config.model, dtype=config.dtype, device=config.device, quantize=config.quantize)
    if backbone.tokenizer is None:
        raise MethodError(f"{config.model!r} has no tokenizer, so text cannot be trained on it.")
    renderer = Renderer(backbone.tokenizer, train_on=config.data.train_on, chat=config.data.chat)
    parts = read_parts(config, renderer)
    for sentence in parts.said:
        observer.say(sentence)
    service = Service(backbone, token_budget=config.token_budget)
    ready = Ready(config, observer, backbone, renderer, parts, service, {}, [])
    _measure_costs(ready)
    return ready


def _measure_costs(ready: Ready) -> None:
    """Fill `costs` and `absent`: each method by itself, a few steps, beside LoRA."""
    config, wanted = ready.config, entries(ready.config.methods)
    work = ready.order(config.seeds[0])[: config.timing_pairs + 1]
    work = [work[i % len(work)] for i in range(config.timing_pairs + 1)]
    with tempfile.TemporaryDirectory(prefix="lorica-compare-") as folder:
        field = Field(ready.service, config.optimizer, config.steps, together=2, folder=Path(folder))
        reference = Candidate("costs of LoRA", _reference(wanted), config.targets, 1e-4, 0)
        try:
            field.open(reference)
        except FAILURES as error:
            ready.observer.say(f"No times: LoRA does not fit here. {why(error)}")
        ready.observer.stage("measuring each method alone", len(wanted))
        for entry in wanted:
            probe = Candidate(f"costs of {entry.label}", entry.method, ready.targets(entry), 1e-4, 0)
            try:
                field.open(probe)
                ready.costs[entry] = costs.measure(probe.live(), reference.client, work)
            except FAILURES as error:
                ready.absent.append(Absent(entry.label, why(error)))
            field.close(probe)
            ready.observer.advance(1)
        field.close(reference)


def _reference(wanted: Sequence[Entry]) -> LoRA:
    """The LoRA whose step is the unit of time: the first that is compared, else one with default settings."""
    return next((entry.method for entry in wanted if type(entry.method) is LoRA), LoRA())
