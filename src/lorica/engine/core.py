"""The engine as the service sees it: commands in, replies out, one turn of work at a time.

In: commands, in the order in which they came. Out: one final reply for each, and what the engine does in numbers.
Training rounds and sampling turns alternate by the time that each takes. A request that fails, or whose numbers are not
finite, changes nobody else. Refuses to know sockets, users and records.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lorica.core.errors import DataError, LoricaError, RouteError, StorageError
from lorica.core.storage import storage
from lorica.data.example import Example
from lorica.engine import commands
from lorica.engine.engine import Engine, Item
from lorica.engine.host import Host
from lorica.engine.joint import Joint, Part
from lorica.engine.runs import Run, Runs
from lorica.engine.samplers import Samplers
from lorica.engine.scheduler import Pick, Scheduler
from lorica.engine.settings import EngineSettings
from lorica.engine.stream import Stream
from lorica.models.backbone import Backbone
from lorica.models.positions import context
from lorica.training.optimizer import AdamStep

log = logging.getLogger("lorica.engine")

CONTROL = 16
"""Tokens that a command without data costs its tenant."""
OFTEN = 1.0
"""Seconds between two reports of what the engine does."""

RunCommand = commands.Open | commands.Step | commands.Save | commands.Load | commands.Snapshot | commands.Close


class EngineCore:
    """One backbone with its runs and samplers. Not thread-safe: one thread submits and turns."""

    def __init__(self, backbone: Backbone, settings: EngineSettings) -> None:
        self.settings = settings
        self.host = Host(backbone).set_attention(settings.shifted()).set_graphs(settings.graphs)
        self.host.set_native(settings.native)
        self.engine = Engine(self.host, token_budget=settings.token_budget)
        stream = Stream(
            self.host, slots=settings.slots, kv_budget=settings.kv_budget or None, together=not settings.deterministic
        )
        root = (settings.root or Path()).absolute()
        self.samplers = Samplers(stream, root, settings.samplers)
        self._own = None if settings.data is not None else tempfile.TemporaryDirectory(prefix="lorica-engine-")
        spill = Path(self._own.name) if self._own is not None else settings.data or Path()
        with storage(spill):
            self.runs = Runs(self.host, root, spill / "spilled", resident=settings.resident, hosted=settings.hosted)
        self.scheduler = Scheduler(settings.token_budget, runs=settings.resident, alone=settings.deterministic)
        self.joint = Joint(self.engine, self.runs, most=context(backbone.module))
        self._commands: dict[int, RunCommand | commands.Train] = {}
        self._tenants: dict[str, str] = {}
        self._units: list[list[Pick]] = []
        self._outbox: list[commands.Reply] = []
        self._drain: commands.Drain | None = None
        self._spent = {"train": 0.0, "sample": 0.0}
        self._counts = dict.fromkeys(("rounds", "batch_tokens", "requests", "failures", "recomputed"), 0)
        self._told = (0.0, 0, False)

    def warm_up(self) -> None:
        """Do once what the first request would wait for."""
        self.engine.forward([Item(Example((0, 0), (0.0, 1.0), "warm-up"), None)])

    def close(self) -> None:
        """Delete what was spilled."""
        if self._own is not None:
            self._own.cleanup()

    # -- commands ------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a turn has anything to do."""
        return bool(self._outbox or self._units or len(self.scheduler) or not self.samplers.idle)

    def submit(self, command: commands.Commands) -> None:
        """Take a command. It is answered by a turn, at once where it is wrong."""
        self._counts["requests"] += 1
        self._attempt(command.id, lambda: self._submit(command))

    def _submit(self, command: commands.Commands) -> None:
        if isinstance(command, commands.Drain):
            self._drain = command
        elif isinstance(command, commands.Cancel):
            self._cancel(command)
        elif self._drain is not None:
            raise RouteError("The engine is stopping and takes nothing new.")
        elif isinstance(command, commands.Sample):
            self.samplers.add(command)
        elif isinstance(command, commands.Asides):
            raise RouteError("A command for folders is no work for a turn; `aside` does it.")
        elif command.id in self._commands:
            raise RouteError(f"Command {command.id} is here already; every command needs an id of its own.")
        elif isinstance(command, commands.Train):
            parts = self.joint.prepare(command)
            self._queue(parts[0].command, [(part.indices, part.cost) for part in parts])
        else:
            if isinstance(command, commands.Open):
                self._tenants[command.run] = command.tenant
            cost = min(CONTROL, self.settings.token_budget)
            self._queue(command, [(None, cost)])

    def _queue(self, command: RunCommand | commands.Train, parts: list[tuple[Any, int]]) -> None:
        self._commands[command.id] = command
        self.scheduler.add(command.id, command.run, self._tenants.get(command.run, ""), parts)

    def _cancel(self, command: commands.Cancel) -> None:
        target = command.target
        if self.samplers.cancel(target) or self.scheduler.drop(target):
            self._commands.pop(target, None)
            self.joint.forget(target)
            self._fail(target, RouteError("The request was cancelled."))
        self._outbox.append(commands.Closed(command.id))

    # -- turns ---------------------------------------------------------------------------------------------------

    def turn(self) -> list[commands.Reply]:
        """Do one piece of work: commands without data, one joint micro-batch, or one sampling turn."""
        training, sampling = bool(self._units or len(self.scheduler)), not self.samplers.idle
        if training and sampling:
            kind = "train" if self._spent["train"] <= self._spent["sample"] else "sample"
        else:
            kind = "train" if training else "sample"
            self._spent = dict.fromkeys(self._spent, 0.0)  # who was alone owes nothing
        start = time.perf_counter()
        if training and kind == "train":
            self._train()
        elif sampling:
            self._sample()
        self._spent[kind] += time.perf_counter() - start
        replies, self._outbox = self._outbox, []
        if self._drain is not None and not self.busy:
            replies.append(commands.Closed(self._drain.id))
            self._drain = None
        return [*replies, *self._stats()]

    def _train(self) -> None:
        """Commands without data of a round come before its joint batch, so that their replies need not wait for it."""
        if not self._units:
            picks = self.scheduler.next_round()
            self._counts["rounds"] += 1
            control = [pick for pick in picks if pick.indices is None]
            joint = [pick for pick in picks if pick.indices is not None]
            self._units = [unit for unit in (control, joint) if unit]
        unit = self._units.pop(0)
        for pick in unit:
            if pick.indices is None:
                self._attempt(pick.id, partial(self._reply, self._commands.pop(pick.id)))
        parts = [self.joint.part(pick) for pick in unit if pick.indices is not None]
        if parts:
            self._counts["batch_tokens"] += sum(part.cost for part in parts)
            self._joint(parts)

    def _joint(self, parts: list[Part]) -> None:
        for part, outcome in self.joint.compute(parts):
            if isinstance(outcome, Exception):
                self.scheduler.fail(part.command.id)
                self._commands.pop(part.command.id, None)
                self._fail(part.command.id, outcome)
            elif outcome is not None:
                self._commands.pop(part.command.id, None)
                self._outbox.append(outcome)
        self._counts["recomputed"] = self.joint.recomputed

    def _sample(self) -> None:
        for reply in self.samplers.turn(self.settings.prompt_budget):
            if isinstance(reply, tuple):
                self._fail(*reply)
            else:
                self._outbox.append(reply)

    def _reply(self, command: commands.Command) -> None:
        self._outbox.append(self._control(command))

    def _control(self, command: commands.Command) -> commands.Reply:
        """Everything that is asked of one run, but for training."""
        runs = self.runs
        if isinstance(command, commands.Open):
            return _opened(command.id, runs.open(command.run, command.spec, command.snapshot))
        if isinstance(command, commands.Load):
            return _opened(
                command.id, runs.load(command.run, command.path, optimizer=command.optimizer, named=command.name)
            )
        if isinstance(command, commands.Step):
            adam = command.adam
            step = AdamStep(adam.lr, (adam.beta1, adam.beta2), adam.eps, adam.weight_decay, adam.clip)
            return commands.Stepped(
                command.id, {"grad_norm:mean": runs.step(command.run, step), "lr:mean": command.adam.lr}
            )
        if isinstance(command, commands.Save):
            return commands.Saved(command.id, *runs.save(command.run, command.path, state=command.state))
        if isinstance(command, commands.Snapshot):
            size = runs.snapshot(command.run, command.path)
            return commands.Saved(command.id, size, dict(runs.find(command.run).info))
        if isinstance(command, commands.Close):
            runs.close(command.run)
            self.joint.close(command.run)
            self._tenants.pop(command.run, None)
            return commands.Closed(command.id)
        raise DataError(f"{type(command).__name__} is no command for a run.")

    # -- failures and numbers ------------------------------------------------------------------------------------

    def _attempt(self, id: int, work: Callable[[], None]) -> None:
        """Whatever a command raises ends that command alone."""
        try:
            work()
        except Exception as error:
            self._fail(id, error)

    def _fail(self, id: int, error: Exception) -> None:
        self._counts["failures"] += 1
        self._outbox.append(failure(id, error))

    def stats(self) -> dict[str, float]:
        """What the engine does, by name. Counters only grow: `rounds`, `batch_tokens`, `requests`, `failures`,
        `recomputed`; all others are as they are now.
        """
        stream = self.samplers.stream
        return {
            **{name: float(count) for name, count in self._counts.items()},
            "queue_depth": float(len(self.scheduler)),
            "queue_tokens": float(self.scheduler.tokens),
            "runs": float(len(self.runs)),
            "resident_runs": float(self.runs.resident),
            "spilled_runs": float(self.runs.spilled),
            "sampler_adapters": float(self.samplers.adapters),
            "sampler_live": float(stream.live),
            "sampler_waiting": float(self.samplers.waiting),
            "kv_positions": float(stream.positions),
            "kv_bytes": float(stream.bytes),
        }

    def _stats(self) -> list[commands.Reply]:
        now, resident, busy = time.monotonic(), self.runs.resident, self.busy
        before, resident_before, busy_before = self._told
        if now - before < OFTEN and resident == resident_before and (busy or not busy_before):
            return []
        self._told = (now, resident, busy)
        return [commands.Stats(0, self.stats())]


def _opened(id: int, run: Run) -> commands.Opened:
    return commands.Opened(id, **run.info)


def failure(id: int, error: Exception) -> commands.Failed:
    """An error as a reply: what the request did wrong as it was said, all else as ours, with a logged traceback."""
    if isinstance(error, LoricaError) and not isinstance(error, StorageError):
        text = error.message if error.hint is None else f"{error.message} {error.hint}"
        return commands.Failed(id, "user", error.code, text)
    log.error("command %d failed", id, exc_info=error)
    if isinstance(error, StorageError):
        return commands.Failed(id, "server", error.code, error.public)
    return commands.Failed(
        id, "server", "engine", f"The engine failed with {type(error).__name__}: {first_line(error)}"
    )


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "it said nothing.")
