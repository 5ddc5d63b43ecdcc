"""Supervised fine-tuning, configurable: the program of `sft_loop` with evaluation, checkpoints, tracking and resuming.

In: an `SFTConfig`, or the directory of a run to resume. Out: the run's directory. A run killed at any step and
resumed equals the uninterrupted run bit for bit. Refuses to know terminals: progress goes to an `Observer`.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml

from lorica.adapters.lineage import Data
from lorica.client.local import Service, TrainingClient
from lorica.core.errors import MethodError, ResumeError
from lorica.core.storage import storage, write_file
from lorica.data.example import Example
from lorica.data.packing import Sampler
from lorica.data.records import Dataset, load_records
from lorica.data.render import Prepared, Renderer, prepare
from lorica.models import load
from lorica.models.backbone import Backbone
from lorica.models.saving import save_backbone
from lorica.recipes.config import SFTConfig, to_yaml
from lorica.recipes.memory import peak_bytes
from lorica.recipes.own_base import has_own_base, own_base
from lorica.recipes.plots import loss_curve
from lorica.recipes.rundir import ROOM, RunDir
from lorica.recipes.starting import check_start, on_own_base, parents_of, recipe_of, start
from lorica.recipes.trackers import check_tracker, make_tracker


class Observer:
    """What a run tells as it goes. The base class says nothing."""

    def prepared(self, plan: Plan) -> None:
        """Everything is loaded; training starts."""

    def step(self, record: dict[str, Any], total: int) -> None:
        """One optimiser step is done."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """The evaluation loss was measured."""

    def saved(self, path: Path) -> None:
        """A checkpoint was written."""


@dataclass(frozen=True)
class Plan:
    """A run, loaded and ready: what will be trained on what, for how many steps."""

    config: SFTConfig
    backbone: Backbone
    renderer: Renderer
    dataset: Dataset
    prepared: Prepared
    evaluation: list[Example]
    steps: int
    client: TrainingClient
    sampler: Sampler


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `interrupted` runs left a checkpoint and can be resumed."""

    path: Path
    steps: int
    loss: float
    seconds: float
    tokens_per_second: float
    peak_bytes: int
    interrupted: bool
    adapter: Path | None = field(default=None)


def plan(config: SFTConfig) -> Plan:
    """Load model and data and make the adapter. Writes nothing. Raises Lorica's errors for whatever does not fit.

    The plan's config is the given one with the method and targets of a continued adapter written out.
    """
    check_tracker(config.track)
    check_start(config)
    made = own_base(config)
    backbone = made.backbone if made else _loaded(config)
    if backbone.tokenizer is None:
        raise MethodError(f"{config.model!r} has no tokenizer, so text cannot be trained on it.")
    renderer = Renderer(backbone.tokenizer, train_on=config.data.train_on, chat=config.data.chat)
    dataset = load_records(config.data.path)
    prepared = prepare(dataset, renderer, config.data.max_length)
    held_out = config.data.eval_path
    evaluation = prepare(load_records(held_out), renderer, config.data.max_length).examples if held_out else []
    sampler = Sampler(prepared.examples, batch_size=config.batch_size, seed=config.seed)
    per_epoch = len(sampler.batches(0))
    steps = config.steps or max(1, round(config.epochs * per_epoch))
    service = Service(backbone, token_budget=config.token_budget)
    service.host.set_attention(config.attention)
    if made:
        client = TrainingClient(service, service.host.put(made.adapter), config.optimizer, steps)
        on_own_base(client.adapter, RunDir(config.out).base)
    else:
        config, client = start(config, service, steps)
    client.note(recipe_of(config), Data(dataset.path, dataset.fingerprint, len(prepared.examples)))
    if config.checkpointing:
        service.host.checkpointing()
    return Plan(config, backbone, renderer, dataset, prepared, evaluation, steps, client, sampler)


def _loaded(config: SFTConfig) -> Backbone:
    return load(
        config.model,
        dtype=config.dtype,
        device=config.device,
        position_scale=config.position_scale,
        quantize=config.quantize,
    )


def run(config: SFTConfig, observer: Observer | None = None) -> Outcome:
    """A new run. Raises StorageError when `out` holds one already."""
    torch.manual_seed(config.seed)
    ready = plan(config)
    directory = RunDir(config.out)
    directory.create(to_yaml(ready.config))
    return _train(ready, directory, observer or Observer(), 0)


def resume(path: str | Path, observer: Observer | None = None) -> Outcome:
    """Continue a run from its newest checkpoint. Raises ResumeError when that is not possible."""
    directory = RunDir(path)
    if not directory.config.is_file():
        raise ResumeError(f"{path} is not a run directory: it has no config.yaml.")
    config = SFTConfig.parse(yaml.safe_load(directory.config.read_text(encoding="utf-8"))).replace(out=str(path))
    state = directory.latest()
    torch.manual_seed(config.seed)
    ready = plan(config)
    if state is None:  # stopped before the first checkpoint: the run begins anew
        directory.rewind(0)
        return _train(ready, directory, observer or Observer(), 0)
    if state["data"] != ready.dataset.fingerprint:
        raise ResumeError(f"{config.data.path} has changed since the run began; resuming would train on other data.")
    if state["base"] != ready.backbone.fingerprint():
        raise ResumeError(f"{config.model!r} is not the backbone that the run began with.")
    if "parents" in state and state["parents"] != parents_of(ready.client.adapter):
        raise ResumeError(
            "An adapter that the run continues or is stacked on has changed since the run began.",
            hint="`lorica lineage` tells adapters apart by their hashes.",
        )
    ready.sampler.load_state(state["sampler"])
    ready.client.load_state(state["client"])
    directory.rewind(state["step"])
    return _train(ready, directory, observer or Observer(), state["step"])


def _state(ready: Plan, step: int) -> dict[str, Any]:
    return {
        "step": step,
        "client": ready.client.state(),
        "sampler": ready.sampler.state(),
        "data": ready.dataset.fingerprint,
        "base": ready.backbone.fingerprint(),
        "parents": parents_of(ready.client.adapter),
    }


def _train(ready: Plan, directory: RunDir, observer: Observer, first: int) -> Outcome:
    config = ready.config
    observer.prepared(ready)
    tracker = make_tracker(
        config.track,
        project=config.project,
        name=directory.path.name,
        directory=str(directory.path),
        config=config.model_dump(),
    )
    started, tokens, step, loss = time.monotonic(), 0, first, float("nan")
    with ExitStack() as stack:
        stack.callback(tracker.finish)
        stop = stack.enter_context(_interruptible())
        while step < ready.steps and not stop:
            record = _step(ready, step + 1)
            step, loss = step + 1, record["loss"]
            tokens += record["tokens"]
            if ready.evaluation and (step % config.eval_every == 0 or step == ready.steps):
                record["eval_loss"] = ready.client.forward(ready.evaluation).mean
                observer.evaluated(record)
            directory.log(record)
            tracker.log(record)
            observer.step(record, ready.steps)
            if step % config.save_every == 0 or step == ready.steps or stop:
                observer.saved(directory.save(step, _state(ready, step), keep=config.keep))
    seconds = time.monotonic() - started
    with storage(directory.path, hint=ROOM):
        write_file(
            directory.path / "loss.png", loss_curve(directory.records(), f"{config.method['name']} on {config.model}")
        )
    finished = step == ready.steps
    adapter = ready.client.save(directory.adapter) if finished else None
    if finished and has_own_base(config):
        save_backbone(ready.backbone, directory.base)
    return Outcome(
        directory.path, step, loss, seconds, tokens / max(seconds, 1e-9), peak_bytes(), not finished, adapter
    )


def _step(ready: Plan, number: int) -> dict[str, Any]:
    """One optimiser step. Raises MethodError when the loss is not finite; the adapter is then as before the step."""
    began = time.monotonic()
    batch = [ready.prepared.examples[i] for i in next(ready.sampler)]
    loss = ready.client.forward_backward(batch)
    if not math.isfinite(loss.mean):
        raise MethodError(
            f"The loss of step {number} is {loss.mean}; training cannot go on.",
            hint="Lower optimizer.lr, or look at the data.",
        )
    done = ready.client.optim_step()
    if not math.isfinite(done.grad_norm):
        raise MethodError(
            f"The gradient of step {number} is not finite; the adapter is as before that step.",
            hint="Lower optimizer.lr, or look at the data.",
        )
    tokens, seconds = sum(map(len, batch)), time.monotonic() - began
    return {
        "step": number,
        "loss": loss.mean,
        "lr": done.lr,
        "grad_norm": done.grad_norm,
        "tokens": tokens,
        "trained_tokens": sum(example.trained for example in batch),
        "seconds": seconds,
        "tokens_per_second": tokens / max(seconds, 1e-9),
    }


@contextmanager
def _interruptible() -> Iterator[list[bool]]:
    """Inside, Ctrl-C asks to stop after the present step (the list is then not empty); a second one stops at once."""
    stop: list[bool] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(True)

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread: whoever runs us handles signals
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
