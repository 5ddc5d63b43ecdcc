"""GLoRA's search: train a supernet, find the best configuration of every site within a budget, keep it as an adapter.

In: a `GLoRASearchConfig`. Out: an adapter of the chosen configurations with the supernet's values, and a report. Scores
are losses of the validation part; the test part is only measured. Started again, it goes on from the supernet's last
checkpoint and from the scores that are known. Refuses to know terminals: progress goes to an `Observer`.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import Field

from lorica.adapters.adapter import Adapter
from lorica.adapters.layout import Layout
from lorica.adapters.parents import note_training
from lorica.core.errors import MethodError, StorageError
from lorica.core.glora_choices import Choice
from lorica.core.storage import storage, write_file
from lorica.methods.glora import GLoRA
from lorica.recipes.evolution import Evolution, EvolutionConfig, Genome, Scored
from lorica.recipes.ledger import Ledger
from lorica.recipes.observer import Observer
from lorica.recipes.rundir import RunDir
from lorica.recipes.searching import Search, SearchConfig, open_search, training

REPORT = "search.json"


class GLoRASearchConfig(SearchConfig):
    """One search for GLoRA configurations."""

    rank: int = Field(4, ge=1, description="rank r of every low-rank pair")
    evolution: EvolutionConfig = Field(EvolutionConfig(), description="population, generations and budget")
    seed: int = Field(0, ge=0, description="seed of the supernet's init, of its choices and of the order of the data")
    save_every: int = Field(50, ge=1, description="steps between checkpoints of the supernet")
    out: str = Field("runs/glora", description="folder of the search; what it holds already is used again")


@dataclass(frozen=True, slots=True)
class Report:
    """What a search found. Losses are means of trained tokens; `choices` by site; `history` the best score of each
    generation.
    """

    path: str
    adapter: str
    choices: dict[str, str]
    parameters: int
    supernet_parameters: int
    base_parameters: int
    validation_loss: float
    test_loss: float
    base_test_loss: float
    evaluated: int
    reused: int
    history: tuple[float, ...]


def set_choices(adapter: Adapter, choices: Mapping[str, Choice]) -> None:
    """Let a supernet act with these choices, by site name, until another step draws new ones. Raises MethodError."""
    for name, choice in choices.items():
        if "choice" not in adapter.layout.specs.get(name, {}):
            raise MethodError(f"Adapter {adapter.name!r} has no supernet at site {name!r}, so nothing is chosen there.")
        adapter.set(name, "choice", choice.numbers())


def fixed_adapter(supernet: Adapter, choices: Mapping[str, Choice], name: str) -> Adapter:
    """An adapter that owns what these choices select of a supernet's values, and computes the same.

    Raises MethodError for an adapter that is no supernet.
    """
    method = supernet.method
    if not isinstance(method, GLoRA) or not method.supernet:
        raise MethodError(f"Adapter {supernet.name!r} is no GLoRA supernet, so no choice can be taken out of it.")
    # the first pattern that matches decides: longer names first, as a name may be the end of another
    names = sorted(choices, key=lambda site: -len(site))
    fixed = method.replace(supernet=False, choices=tuple((re.escape(site), str(choices[site])) for site in names))
    layout = Layout(fixed, {site: (supernet.layout.sites[site], fixed) for site in supernet.layout.sites})
    adapter = Adapter(name, layout, seed=supernet.seed, base=supernet.base, dtype=supernet.flat.dtype)
    adapter.meta = dict(supernet.meta)
    adapter.to(device=supernet.flat.device)
    for site in layout.specs:
        for param, value in choices[site].select(supernet.values(site)).items():
            adapter.set(site, param, value)
    return adapter


def run(config: GLoRASearchConfig, observer: Observer | None = None) -> Report:
    """A search, or the rest of one that was stopped. Raises StorageError where `out` holds one of another supernet."""
    observer = observer or Observer()
    search = open_search(config, observer.say)
    out = Path(config.out)
    supernet = _supernet(search, config, observer)
    names = list(supernet.layout.sites)
    evolution = Evolution(config.evolution, list(supernet.layout.sites.values()), config.rank)
    ledger = Ledger(out / "scores.jsonl")
    identity = {**search.identity, "supernet": zlib.crc32(supernet.flat.cpu().numpy().tobytes())}
    planned = config.evolution.population * config.evolution.generations
    observer.stage("scoring configurations", planned)

    def score(genome: Genome) -> float:
        def compute() -> float:
            set_choices(supernet, dict(zip(names, genome, strict=True)))
            return -search.loss(supernet, search.parts.validation)

        value = ledger.value({**identity, "choices": [str(choice) for choice in genome]}, compute)
        observer.advance(1)
        return value

    def told(number: int, best: Scored) -> None:
        observer.say(f"generation {number}: best validation loss {-best.score:.4f} with {best.parameters:,} parameters")

    found = evolution.run(score, told)
    choices = dict(zip(names, found.best.genome, strict=True))
    adapter = search.service.host.put(fixed_adapter(supernet, choices, "found"))
    recipe = {"name": "glora search", **config.model_dump(mode="json", exclude={"data", "out", "save_every"})}
    recipe["validation_loss"] = -found.best.score
    note_training(adapter, search.service.host.backbone, recipe, search.parts.trained_on(config.data.path))
    report = Report(
        path=str(out),
        adapter=str(search.service.host.save(out / "adapter", adapter)),
        choices={name: str(choice) for name, choice in choices.items()},
        parameters=adapter.layout.trainable_count(),
        supernet_parameters=supernet.layout.trainable_count(),
        base_parameters=sum(p.numel() for p in search.service.host.model.parameters()),
        validation_loss=search.loss(adapter, search.parts.validation),
        test_loss=search.loss(adapter, search.parts.test),
        base_test_loss=search.loss(None, search.parts.test),
        evaluated=found.evaluated,
        reused=ledger.reused,
        history=found.history,
    )
    with storage(out):
        write_file(out / REPORT, json.dumps(asdict(report), indent=1).encode())
    return report


def _supernet(search: Search, config: GLoRASearchConfig, observer: Observer) -> Adapter:
    """The trained supernet: from its last checkpoint on, or all of it. Raises StorageError, MethodError."""
    client = search.service.training_client(
        GLoRA(rank=config.rank, supernet=True),
        config.targets,
        name="supernet",
        seed=config.seed,
        optimizer=config.optimizer,
        steps=config.steps,
    )
    settings = json.dumps(
        {**search.identity, "lr": config.optimizer.lr, "rank": config.rank, "seed": config.seed}, sort_keys=True
    )
    directory, batches, done = RunDir(Path(config.out) / "supernet"), search.batches(config.seed), 0
    if not directory.config.is_file():
        directory.create(settings)
    elif directory.config.read_text(encoding="utf-8") != settings:
        raise StorageError(
            f"{directory.path} holds a supernet of other settings or data.", hint="Choose another `out`."
        )
    state = directory.latest()
    if state is not None:
        batches.load_state(state["batches"])
        client.load_state(state["client"])
        done = int(state["step"])
        directory.rewind(done)
        observer.say(f"the supernet is there after {done} of {config.steps} steps")
    observer.stage("training the supernet", config.steps - done)
    for step, loss in training(search, client, batches, range(done, config.steps)):
        if not math.isfinite(loss):
            raise MethodError(f"The supernet's loss at step {step} is {loss}.", hint="Lower optimizer.lr.")
        observer.advance(1)
        directory.log({"step": step, "loss": loss})
        if step % config.save_every == 0 or step == config.steps:
            directory.save(step, {"step": step, "client": client.state(), "batches": batches.state()}, keep=1)
    return client.adapter
