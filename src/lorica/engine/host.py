"""A host: one backbone with its adapters, and which of them act on the next batch.

In: a model, methods, targets. Out: adapters attached to the live module, whose tensors and state-dict keys stay as
they are. Refuses to know tokenizers, losses, optimisers and file formats (it calls `adapters` for files and merging).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorica.adapters.adapter import Adapter
from lorica.adapters.layout import Layout
from lorica.adapters.lineage import parent_at
from lorica.adapters.parents import born, check_beneath, stacked
from lorica.adapters.targets import Targets, select
from lorica.core.errors import MergeError, RouteError, did_you_mean
from lorica.engine.attention import AttentionHub
from lorica.engine.executor import Executor
from lorica.engine.hooks import Hooks
from lorica.engine.route import Numbers, Route, Stack
from lorica.methods.base import Method
from lorica.models.backbone import Backbone, wrap
from lorica.models.shifted_attention import Shifted

if TYPE_CHECKING:
    from lorica.adapters.merge import Merge, MergeReport

TargetSpec = Targets | str | Sequence[str] | Mapping[str, Any] | None
RowSpec = str | Adapter | None | Sequence[str | Adapter]
"""Whose row it is: an adapter by name or itself, a stack of them, innermost first, or None for the base."""


def attach(
    model: nn.Module | Backbone,
    method: Method,
    targets: TargetSpec = None,
    *,
    name: str = "default",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Host:
    """Freeze a model, add one adapter to it, and make that adapter act on every row.

    Args:
        model: any `torch.nn.Module`, or a backbone from `lorica.load`.
        method: e.g. `LoRA(rank=8)`.
        targets: what to adapt; None is the method's default. See `Targets`.
        name: the adapter's name; seed: of its initial values; dtype: of its parameters (float32 masters by default).

    Raises: TargetError when a target matches nothing, MethodError when the method does not fit a site.
    """
    host = Host(model if isinstance(model, Backbone) else wrap(model))
    host.add(name, method, targets, seed=seed, dtype=dtype)
    host.activate(name)
    return host


class Host:
    """Adapters attached to one backbone. Adding, switching and deleting one costs the same however many there are."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.executor = Executor(backbone)
        self.adapters: dict[str, Adapter] = {}
        self._layouts: dict[tuple[str, str, str], Layout] = {}
        self.removals = 0  # adapters that were here, and are not any more
        self._merge: Merge | None = None
        self._hooks = Hooks(self.executor)

    @property
    def model(self) -> nn.Module:
        """The live module; call it as before."""
        return self.backbone.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    # -- adapters ------------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        method: Method,
        targets: TargetSpec = None,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        on: RowSpec = None,
    ) -> Adapter:
        """Make a new adapter with the method's initial values. It acts once it is activated or routed.

        With `on`, it is to be trained on top of these, which are held from now on, and its lineage says so; activate
        `(*on, name)`.
        """
        beneath = self.hold(on)
        layout = self.layout(method, targets)
        adapter = Adapter(name, layout, seed=seed, base=self.backbone.fingerprint(), dtype=dtype)
        with self.backbone.original_at_hand():
            adapter.initialise(self.backbone.weight)
        self.put(adapter.to(device=self.backbone.device))
        return born(adapter, self.backbone, *stacked(beneath, self.backbone))

    def continue_from(self, path: str | Path, name: str = "default", *, on: RowSpec = None) -> Adapter:
        """Read an adapter folder to train further what is in it, as a new adapter: its lineage begins at the folder.

        `on` as in `add`. Raises FormatError, MismatchError as `load`; MethodError where it was trained on top of others
        and `on` does not name them in their order.
        """
        beneath = stacked(self.hold(on), self.backbone)
        adapter = self.load(path, name)
        try:
            check_beneath(adapter, beneath)
        except BaseException:
            self.delete(name)
            raise
        return born(adapter, self.backbone, parent_at(path, "continued-from"), *beneath)

    def hold(self, adapters: RowSpec) -> Stack:
        """Let resident adapters, innermost first, act from now on without being trained; see `Adapter.held`.

        Raises MethodError where one was trained on top of others that are not beneath it.
        """
        stack = self._stack(adapters)
        stacked(stack, self.backbone)
        for adapter in stack:
            adapter.held = True
        return stack

    def layout(self, method: Method, targets: TargetSpec = None) -> Layout:
        """The layout of a method over targets; adapters of equal method and targets share it."""
        spec = Targets.of(targets)
        key = (method.name, method.model_dump_json(), spec.model_dump_json())
        if key not in self._layouts:
            self._layouts[key] = Layout(method, select(self.backbone.sites, method, spec))
        return self._layouts[key]

    def put(self, adapter: Adapter) -> Adapter:
        """Make an existing adapter resident under its name."""
        if adapter.name in self.adapters:
            raise RouteError(f"There is an adapter {adapter.name!r} already; delete it or choose another name.")
        self._hooks.cover(adapter.layout)
        self.adapters[adapter.name] = adapter
        return adapter

    def delete(self, name: str) -> None:
        """Forget an adapter and free its memory. An active adapter is deactivated first."""
        adapter = self.adapter(name)
        if self._merge is not None and adapter in self._merge.stack:
            raise MergeError(f"Adapter {name!r} is merged into the weights; call unmerge() first.")
        self._hooks.route(self._without(self._hooks.routed, adapter))
        del self.adapters[name]
        self.removals += 1

    @staticmethod
    def _without(route: Route | None, gone: Adapter) -> Route | None:
        if route is None or gone not in route.adapters():
            return route
        stacks = [tuple(a for a in stack if a is not gone) for stack in route.stacks]
        return Route(stacks, lengths=route.lengths, uniform=route.uniform) if any(stacks) else None

    def adapter(self, name: str | None = None) -> Adapter:
        """The adapter called `name`, or the only active one."""
        if name is None:
            active = self.active
            if len(active) != 1:
                raise RouteError(f"Name an adapter: {len(active)} are active ({', '.join(active) or 'none'}).")
            name = active[0]
        if name not in self.adapters:
            raise RouteError(f"There is no adapter {name!r}.{did_you_mean(name, self.adapters)}")
        return self.adapters[name]

    def parameters(self, name: str | None = None) -> list[Tensor]:
        """The trained tensors of one adapter, for any torch optimiser."""
        return self.adapter(name).parameters()

    # -- routing -------------------------------------------------------------------------------------------------

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adapters that act on every row, innermost first; empty while rows are routed one by one."""
        route = self._hooks.routed
        return tuple(a.name for a in route.stacks[0]) if route is not None and route.uniform else ()

    def activate(self, *names: str) -> None:
        """Let these adapters, innermost first, act on every row of every batch; several are a stack. None: the base."""
        stack = self._stack(names)
        self._hooks.route(Route([stack], uniform=True) if stack else None)

    def _stack(self, names: RowSpec) -> Stack:
        if names is None:
            return ()
        wanted = [names] if isinstance(names, str | Adapter) else list(names)
        stack = tuple(self._resident(name) for name in wanted)
        if len(set(stack)) != len(stack):
            raise RouteError(f"A stack names an adapter twice: {', '.join(a.name for a in stack)}.")
        return stack

    def _resident(self, which: str | Adapter) -> Adapter:
        if isinstance(which, str):
            return self.adapter(which)
        if self.adapters.get(which.name) is not which:
            raise RouteError(
                f"The adapter {which.name!r} of this row was deleted; another one of that name is another one."
            )
        return which

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base, bit for bit. Nests; leaving, by an exception too, restores what was active."""
        frozen = nullcontext() if self._merge is None else self._merge.suspended()
        with self.routed(None), frozen:
            yield

    @contextmanager
    def rows(
        self,
        names: Sequence[RowSpec],
        *,
        lengths: Sequence[int] | None = None,
        counts: Mapping[Adapter, int] | None = None,
        numbers: Sequence[Numbers] | None = None,
    ) -> Iterator[None]:
        """Inside, row i of the batch uses adapter `names[i]` (None is the base; a list is a stack).

        With `lengths`, rows are packed end to end into one sequence. `counts` and `numbers` are a `Route`'s, where the
        batch is a part of what one call computes. Raises RouteError for unknown names and deleted adapters, and in the
        forward pass when the batch has another number of rows.
        """
        if lengths is not None:
            self.attention_hub()
        with self.routed(Route(self.stacks(names), lengths=lengths, counts=counts, numbers=numbers)):
            yield

    def stacks(self, names: Sequence[RowSpec]) -> list[Stack]:
        """The stack of each row. Raises RouteError for unknown names and deleted adapters."""
        return [self._stack(entry) for entry in names]

    @contextmanager
    def routed(self, route: Route | None) -> Iterator[None]:
        """Inside, batches have this routing, of resident adapters; None is the base."""
        if self._merge is not None and route is not None:
            raise MergeError("An adapter is merged into the weights; call unmerge() before routing rows.")
        before = self._hooks.routed
        self._hooks.route(route)
        try:
            yield
        finally:
            for adapter in [] if before is None else before.adapters():
                if self.adapters.get(adapter.name) is not adapter:  # deleted inside
                    before = self._without(before, adapter)
            self._hooks.route(before)

    def begin(self) -> None:
        """Start a forward pass that does not enter through the whole model (the engine calls the trunk alone)."""
        self._hooks.begin()

    @contextmanager
    def relengthened(self, lengths: Sequence[int]) -> Iterator[None]:
        """Inside, the present pass's packed rows have these lengths (soft prompts stand before them)."""
        before = self.executor.route
        assert before is not None
        self.executor.route = before.with_lengths(lengths)
        try:
            yield
        finally:
            self.executor.route = before

    def windowed(self, head: Callable[[Tensor], Tensor]) -> Callable[[Tensor, int], Tensor]:
        """`head` for a run of packed positions from a given one on, under the present pass's route; repeatable."""
        route = self.executor.route

        def run(x_CD: Tensor, start: int) -> Tensor:
            with self.executor.replay(route, (start, start + x_CD.shape[0])):
                return head(x_CD)

        return run

    def attention_hub(self) -> AttentionHub:
        """This backbone's attention function, which keeps packed sequences apart; installed on first use."""
        return self._hooks.attention_hub()

    def set_attention(self, shifted: Shifted | None) -> Host:
        """Let training passes of all adapters, and of the base, attend in shifted groups; None: dense, as always.

        Evaluation and sampling stay dense. Raises MethodError for a model whose attention cannot be shifted.
        """
        if shifted is not None:
            self.attention_hub().check_shifted()
        if shifted is not None or self._hooks.attention is not None:
            self.attention_hub().shifted = shifted
        return self

    def adapts_head(self) -> bool:
        """Whether some adapter of the present rows acts on the output embedding."""
        route, head = self.executor.live_route(), self.backbone.head_site
        return route is not None and head is not None and route.touches(head)

    def train(self, mode: bool = True) -> Host:
        """Training mode: adapters' dropout acts. The backbone's own dropout acts too, as in any torch module."""
        self.model.train(mode)
        return self

    def eval(self) -> Host:
        return self.train(False)

    def set_compute(self, dtype: torch.dtype | None) -> Host:
        """The dtype of the adapters' arithmetic: None is that of the activations, but float32 where they are float16,
        whose range is small; float32 everywhere is slower and more exact.
        """
        self.executor.compute = dtype
        return self

    def set_graphs(self, on: bool) -> Host:
        """Whether passes and steps that come again are replayed as CUDA graphs, as they are at first: the same
        operations in one launch, in memory of their own, as much as the largest of them takes. Only CUDA has them.
        """
        self.executor.graphs = on
        return self

    def set_native(self, on: bool) -> Host:
        """Whether kernels in C compute what surrounds matrix products on a CPU, as they do at first where the machine
        has a C compiler: up to rounding the same numbers as torch's own operations, and several times as fast for few
        tokens.
        """
        self.executor.native = on
        self.backbone.kept.clear()
        return self

    def checkpointing(self) -> Host:
        """Activation checkpointing that remembers the route of each pass. Needs a transformers model and `train()`."""
        self._hooks.checkpointing()
        return self

    # -- merging and files ---------------------------------------------------------------------------------------

    def merge(self, *names: str) -> MergeReport:
        """Fold adapters (default: the active ones) into the weights in float64, verify on probes, and deactivate them.

        Raises MergeError when an update cannot be folded; the weights are then as before.
        """
        if self._merge is not None:
            raise MergeError("An adapter is merged already; call unmerge() first.")
        stack = self._stack(names or self.active)
        if not stack:
            raise MergeError("No adapter is active, so there is nothing to merge.")
        from lorica.adapters.merge import Merge

        merge = Merge(self.backbone, stack)
        report = merge.apply()
        self._merge = merge
        self._hooks.route(None)
        return report

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the adapters that are folded into the weights now."""
        return () if self._merge is None else tuple(adapter.name for adapter in self._merge.stack)

    def unmerge(self) -> None:
        """Restore the weights bit for bit, and activate again what was merged."""
        if self._merge is None:
            raise MergeError("Nothing is merged.")
        self._merge.undo()
        stack, self._merge = self._merge.stack, None
        self._hooks.route(Route([stack], uniform=True))

    def save(self, path: str | Path, name: str | Adapter | None = None) -> Path:
        """Write one adapter as a folder that PEFT reads, where PEFT has the method."""
        from lorica.adapters import files

        adapter = self._resident(name) if isinstance(name, Adapter) else self.adapter(name)
        return files.save_adapter(adapter, self.backbone, Path(path))

    def load(self, path: str | Path, name: str = "default", *, from_quantized: bool = False) -> Adapter:
        """Read an adapter folder (ours or PEFT's) and make it resident. Raises FormatError, MismatchError.

        With `from_quantized`, one is taken too that was trained beside quantised weights of this backbone.
        """
        from lorica.adapters import files

        return self.put(files.load_adapter(Path(path), self.backbone, name, from_quantized=from_quantized))

    def detach(self) -> Backbone:
        """Remove every hook; the module is as it was before `attach`."""
        if self._merge is not None:
            self.unmerge()
        self._hooks.remove()
        self.removals += len(self.adapters)
        self.adapters.clear()
        return self.backbone
