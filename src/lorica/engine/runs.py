"""Runs: an adapter, its optimiser and what is accumulated, in memory or in a file, wherever they are needed next.

In: specs, artifact paths, steps. Out: runs that continue bit for bit, whatever became of their tensors in between.
Refuses to know queues, batches, losses and how commands travel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lorica.adapters import files
from lorica.adapters.adapter import Adapter, Mark
from lorica.adapters.layout import GLOBAL, Layout
from lorica.adapters.lineage import parent_at
from lorica.adapters.parents import born, check_beneath
from lorica.adapters.targets import Targets
from lorica.core.errors import FormatError, LoricaError, MissingError, RouteError, did_you_mean
from lorica.core.storage import replacing_folder, storage
from lorica.engine.commands import RunSpec
from lorica.engine.host import Host
from lorica.engine.residency import Recent, State, read_record, read_state, write_state
from lorica.methods import get_method
from lorica.training.optimizer import MOMENTS, OWN, AdamStep, AdapterOptimizer

OPTIMIZER = "optimizer.safetensors"
"""The file that an adapter folder has beside the adapter's own where training can be continued from it."""
TARGETS = "lorica_targets"
"""Key of an adapter's meta under which the targets stand that it was made with."""


@dataclass(slots=True, eq=False)
class Run:
    """One run. Its tensors are on the device (`adapter`), in the host's memory (`state`), or in `file`.

    Attributes:
        info: what `Opened` tells.
        file: holds the run as it is now, if it is not None; `own` files are deleted when they no longer do.
        accumulated: whether there is a gradient; `mark` is the state before a request that is not finished.
    """

    name: str
    info: dict[str, Any]
    adapter: Adapter | None = None
    optimizer: AdapterOptimizer | None = None
    state: State | None = None
    file: Path | None = None
    own: bool = False
    accumulated: bool = False
    mark: Mark | None = None

    def changed(self) -> None:
        """What was written no longer is the run."""
        if self.own and self.file is not None:
            self.file.unlink(missing_ok=True)
        self.file, self.own = None, False

    def live(self) -> tuple[Adapter, AdapterOptimizer]:
        assert self.adapter is not None and self.optimizer is not None, "the run is not resident"  # noqa: PT018
        return self.adapter, self.optimizer

    def remember(self) -> Mark:
        """The gradient and the counter, to go back to."""
        return self.live()[0].remember()

    def restore(self, mark: Mark) -> None:
        """Back to a mark."""
        self.live()[0].restore(mark)
        self.accumulated = mark.grad is not None


class Runs:
    """All runs of one host.

    Args:
        root: where relative artifact paths begin.
        spill: folder for runs that are not in memory; what is there from an earlier process is deleted.
        resident: most runs on the device; hosted: most further ones in the host's memory, where the device has its own.
    """

    def __init__(self, host: Host, root: Path, spill: Path, *, resident: int = 64, hosted: int = 0) -> None:
        self.host = host
        self.root = root
        self.spill = spill
        self._runs: dict[str, Run] = {}
        self._resident = Recent(resident)
        self._hosted = Recent(0 if host.backbone.device.type == "cpu" else hosted)
        self._layouts: WeakValueDictionary[Any, Layout] = WeakValueDictionary()
        with storage(spill):
            spill.mkdir(parents=True, exist_ok=True)
            for old in spill.glob("*.safetensors"):
                old.unlink()

    # -- which runs there are ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._runs)

    def __contains__(self, name: object) -> bool:
        return name in self._runs

    @property
    def resident(self) -> int:
        return len(self._resident)

    @property
    def spilled(self) -> int:
        return len(self._runs) - len(self._resident)

    def open(self, name: str, spec: RunSpec, snapshot: str | None = None) -> Run:
        """A new run, or one as a snapshot has it, whose tensors are read when they are needed."""
        if name in self._runs:
            raise RouteError(f"Run {name!r} is open already; close it first.")
        if snapshot is not None:
            path = self.root / snapshot
            info = read_record(path).get("info")
            if not isinstance(info, dict):
                raise FormatError(f"{path} does not say what kind of run it holds.")
            self._runs[name] = Run(name, info, file=path)
            return self._runs[name]
        came = spec.parent
        adapter = self._made(name, spec) if came is None else self._loaded(name, came, spec.parent_name)
        return self._settle(Run(name, described(adapter)), adapter)

    def get(self, name: str, keep: Collection[str] = ()) -> Run:
        """A run with its tensors on the device; others may leave it, but none of `keep`. Raises MissingError for one
        that is not open, FormatError where its file is damaged.
        """
        run = self.find(name)
        if run.adapter is None:
            state = run.state or read_state(run.file or Path())
            adapter = self._adapter(name, state, run.file or self.spill)
            optimizer = _optimizer(adapter, state.tensors, state.record)
            if "grad" in state.tensors:
                adapter.grad.copy_(state.tensors["grad"])
            if "mark" in state.record:
                run.mark = Mark(state.tensors.get("mark"), int(state.record["mark"]))
            run.accumulated = "grad" in state.tensors
            self._settle(run, adapter, optimizer, keep)
            if not run.own:  # a snapshot is its writer's, who may delete it for a later one
                run.file = None
        self._resident.use(name)
        return run

    def close(self, name: str) -> None:
        """Forget a run."""
        run = self.find(name)
        self._leave(run)
        run.state = None
        self._hosted.drop(name)
        run.changed()
        del self._runs[name]

    def find(self, name: str) -> Run:
        """A run, wherever its tensors are. Raises MissingError."""
        if name not in self._runs:
            raise MissingError(f"There is no run {name!r}.{did_you_mean(name, self._runs)}")
        return self._runs[name]

    # -- what is done to one -------------------------------------------------------------------------------------

    def step(self, name: str, settings: AdamStep) -> float:
        """One step on what is accumulated, zero if nothing is. Returns the gradient's norm.

        Where the method refuses, the gradient is as it was: a run that is rebuilt does not repeat what failed.
        """
        run = self.get(name)
        run.changed()
        adapter, optimizer = run.live()
        before = run.remember() if adapter.method.has_step_hooks() else None
        try:
            norm = optimizer.step(settings)
        except LoricaError:
            if before is not None:
                run.restore(before)
            raise
        run.accumulated = False
        return norm

    def save(self, name: str, path: str, *, state: bool) -> tuple[int, dict[str, Any]]:
        """Write an adapter folder, with `state` the optimiser in it too. Returns its bytes and what it holds."""
        run, target = self.get(name), self.root / path
        adapter, optimizer = run.live()
        if not torch.isfinite(adapter.flat).all():
            raise FormatError(
                f"The adapter of run {name!r} holds NaN or infinity, so it cannot be saved.",
                hint="Its last steps were too large; go back to an earlier checkpoint.",
            )
        with storage(target), replacing_folder(target) as made:
            files.save_adapter(adapter, self.host.backbone, made)
            if state:
                write_state(made / OPTIMIZER, State(optimizer.tensors(), _counted(optimizer)))
        size = sum(file.stat().st_size for file in target.iterdir() if file.is_file())
        return size, {**run.info, "base": adapter.base, "seed": adapter.seed, "optimizer": state}

    def load(self, name: str, path: str, *, optimizer: bool, named: str = "") -> Run:
        """Replace a run's adapter by a folder's, which its client calls `named`; accumulated gradients are dropped."""
        run = self.find(name)
        adapter = self._loaded(name, path, named)
        made = AdapterOptimizer(adapter)
        if optimizer:
            made = self._continued(adapter, self.root / path)
        self._leave(run)
        run.changed()
        run.state, run.mark, run.accumulated, run.info = None, None, False, described(adapter)
        self._hosted.drop(name)
        return self._settle(run, adapter, made)

    def _continued(self, adapter: Adapter, folder: Path) -> AdapterOptimizer:
        file = folder / OPTIMIZER
        if not file.is_file():
            raise FormatError(
                f"{folder} holds no {OPTIMIZER}, so its training cannot be continued with its optimiser.",
                hint="Load it with a fresh optimiser.",
            )
        state = read_state(file)
        for moment, value in state.tensors.items():
            if not torch.isfinite(value).all() or (moment == "exp_avg_sq" and bool((value < 0).any())):
                raise FormatError(f"{file} holds values of {moment!r} that no optimiser has.")
        if state.record.get("layout", "") != _digest(adapter.layout):
            raise FormatError(f"{file} belongs to another adapter than {folder} holds.")
        return _optimizer(adapter, state.tensors, state.record)

    def snapshot(self, name: str, path: str) -> int:
        """Write all that continues a run exactly. Returns the file's bytes."""
        run = self.get(name)
        if run.mark is not None:
            raise RouteError(f"Run {name!r} is in the middle of a request.")
        return write_state(self.root / path, self._state(run))

    # -- in and out of memory ------------------------------------------------------------------------------------

    def _settle(
        self, run: Run, adapter: Adapter, optimizer: AdapterOptimizer | None = None, keep: Collection[str] = ()
    ) -> Run:
        """Put a run on the device, and others off it."""
        for name in self._resident.surplus(1, {run.name, *keep}):
            self._expel(self._runs[name])
        self.host.put(adapter)
        run.adapter, run.optimizer, run.state = adapter, optimizer or AdapterOptimizer(adapter), None
        self._hosted.drop(run.name)
        self._resident.use(run.name)
        self._runs[run.name] = run
        return run

    def _expel(self, run: Run) -> None:
        """Off the device: to the host's memory where it is another one, else to a file."""
        if run.file is None:
            run.state = self._state(run)
        self._leave(run)
        if run.state is not None:
            self._hosted.use(run.name)
        for name in self._hosted.surplus():
            other = self._runs[name]
            if other.state is not None:
                path = self.spill / f"{hashlib.sha256(name.encode()).hexdigest()[:40]}.safetensors"
                write_state(path, other.state, durable=False)
                other.file, other.own, other.state = path, True, None
            self._hosted.drop(name)

    def _leave(self, run: Run) -> None:
        if run.adapter is not None:
            self.host.delete(run.adapter.name)
        run.adapter, run.optimizer, run.mark = None, None, None
        self._resident.drop(run.name)

    def _state(self, run: Run) -> State:
        adapter, optimizer = run.live()
        on_cpu = adapter.flat.device.type == "cpu"
        tensors = {"flat": adapter.flat, **optimizer.tensors()}
        if run.accumulated:
            tensors["grad"] = adapter.grad
        tensors |= {f"frozen/{site}/{p}": value for site, own in adapter.frozen.items() for p, value in own.items()}
        record = {"adapter": files.record_of(adapter, self.host.backbone), "info": run.info, **_counted(optimizer)}
        if run.mark is not None:
            record["mark"] = run.mark.forwards
            tensors |= {} if run.mark.grad is None else {"mark": run.mark.grad}
        return State(tensors if on_cpu else {name: value.cpu() for name, value in tensors.items()}, record)

    # -- adapters ------------------------------------------------------------------------------------------------

    def _made(self, name: str, spec: RunSpec) -> Adapter:
        method, targets = get_method(spec.method).parse(spec.config), Targets.parse(spec.targets)
        backbone = self.host.backbone
        adapter = Adapter(_key(name), self.host.layout(method, targets), seed=spec.seed, base=backbone.fingerprint())
        adapter.meta[TARGETS] = targets.model_dump(mode="json")
        with backbone.original_at_hand():
            adapter.initialise(backbone.weight)
        return born(self._shared(adapter.to(device=backbone.device)), backbone)

    def _loaded(self, name: str, path: str, named: str) -> Adapter:
        """An adapter that goes on from a folder's. Its lineage has the client's name of that, no path of the server."""
        folder, backbone = self.root / path, self.host.backbone
        adapter = files.load_adapter(folder, backbone, _key(name))
        check_beneath(adapter, ())  # a run has nothing beneath it
        parent = replace(parent_at(folder, "continued-from"), path=named)
        return born(self._shared(adapter), backbone, parent)

    def _adapter(self, name: str, state: State, file: Path) -> Adapter:
        """The adapter that a state describes, with its values."""
        adapter = self._shared(files.described(state.record.get("adapter", {}), self.host.backbone, _key(name), file))
        flat = state.tensors.get("flat")
        if flat is None or flat.shape != adapter.flat.shape or state.record.get("layout") != _digest(adapter.layout):
            raise FormatError(f"{file} holds other values than its adapter has.")
        adapter.flat.copy_(flat)
        for site, shapes in adapter.layout.frozen.items():
            for param in shapes:
                value = state.tensors.get(f"frozen/{site}/{param}")
                if value is None or not torch.isfinite(value).all():
                    raise FormatError(f"{file} lacks {param!r} of {site or 'the adapter'!r}, or it is not finite.")
                adapter.set(site, param, value)
        return adapter.to(device=self.host.backbone.device)

    def _shared(self, adapter: Adapter) -> Adapter:
        """The same with the layout that others of its kind have."""
        layout = adapter.layout
        adapter.layout = self._layouts.setdefault(layout.key, layout)
        return adapter


def _key(name: str) -> str:
    return f"run {name}"


def _counted(optimizer: AdapterOptimizer) -> dict[str, Any]:
    return {"done": optimizer.done, "layout": _digest(optimizer.adapter.layout)}


def _optimizer(adapter: Adapter, tensors: dict[str, Tensor], record: dict[str, Any]) -> AdapterOptimizer:
    optimizer = AdapterOptimizer(adapter)
    kept = {name: value for name, value in tensors.items() if name in MOMENTS or name.startswith(OWN)}
    optimizer.restore(kept, int(record.get("done", 0)))
    return optimizer


def _digest(layout: Layout) -> str:
    """Where each tensor lies, as one word."""
    places = [(site, p, at.offset, at.shape) for site, own in layout.places.items() for p, at in own.items()]
    return hashlib.sha256(repr(places).encode()).hexdigest()[:16]


def described(adapter: Adapter) -> dict[str, Any]:
    """What `Opened` tells of a run."""
    method, names = adapter.method, [name for name in adapter.layout.sites if name != GLOBAL]
    return {
        "method": method.name,
        "config": method.model_dump(mode="json"),
        "targets": adapter.meta.get(TARGETS) or Targets(include=tuple(names)).model_dump(mode="json"),
        "rank": getattr(method, "rank", None),
        "parameters": adapter.layout.size,
        "sites": len(names),
    }
