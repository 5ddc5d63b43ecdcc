"""Where the executor meets the live module: which forwards it stands before, and the start of every forward pass.

In: layouts to cover, a route. Out: hooks on instances of modules; classes, parameters and state-dict keys are not
touched. Refuses to know adapters' names, methods and files.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorica.adapters.layout import Layout
from lorica.core.errors import MethodError
from lorica.core.site import Site
from lorica.engine.attention import AttentionHub
from lorica.engine.executor import Executor
from lorica.engine.experts import ExpertsForward
from lorica.engine.inputs import Entrance, leave
from lorica.engine.linear_sites import LinearForward, RouterForward
from lorica.engine.route import Route
from lorica.engine.sites import ConvForward, EmbeddingForward, NormForward, SiteForward

FORWARDS: dict[str, type[SiteForward]] = {
    "linear": LinearForward,
    "embedding": EmbeddingForward,
    "norm": NormForward,
    "conv": ConvForward,
}


class Hooks:
    """Hooks of one backbone. `routed` is what the user asked for; `executor.route` is its copy for the present pass."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.backbone = executor.backbone
        self.routed: Route | None = None
        self.forwards: dict[str, SiteForward] = {}
        self.attention: AttentionHub | None = None
        self._expert_modules: set[nn.Module] = set()
        self._width, self._tokens = 0, 0
        module = self.backbone.module
        if module.__dict__.get("_lorica_hooked"):
            raise MethodError("This model has adapters attached already; use that host's add(), or detach() it first.")
        module.__dict__["_lorica_hooked"] = True
        self._names = list(inspect.signature(type(module).forward).parameters)[1:]
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave),
        ]
        site = self.backbone.sites.get("input")
        embedding = self.backbone.module_of("input") if site is not None else None
        self.entrance = Entrance(executor, site, embedding, "position_ids" in self._names)

    def route(self, route: Route | None) -> None:
        """Set the routing of the passes to come."""
        self.routed = route
        self.executor.route = route

    def begin(self) -> None:
        """Start one forward pass: adapters present count it, if training."""
        if self.routed is not None:
            self.executor.route = self.routed.begin(self.backbone.module.training)

    def cover(self, layout: Layout) -> None:
        """Stand before the forward of every site of a layout that is not covered yet."""
        for site in layout.sites.values():
            if site.name in self.forwards or site.kind == "input":
                continue
            if site.kind == "attention":
                self._cover_attention(site)
            elif site.kind == "expert":
                self._cover_experts(site)
            else:
                stand_in = RouterForward if site.router else FORWARDS[site.kind]
                forward = stand_in(self.executor, self.backbone.module_of(site.name), site)
                forward.install()
                self.forwards[site.name] = forward

    def _cover_experts(self, site: Site) -> None:
        module = self.backbone.module_of(site.name)
        if module in self._expert_modules:
            return
        sites: dict[str, dict[int, Site]] = {}
        for other in self.backbone.sites.values():
            if other.expert is not None and self.backbone.module_of(other.name) is module:
                sites.setdefault(other.role, {})[other.expert] = other
        forward = ExpertsForward(self.executor, module, sites)
        forward.install()
        self.forwards[site.name] = forward
        self._expert_modules.add(module)

    def _cover_attention(self, site: Site) -> None:
        self.attention_hub().sites[self.backbone.module_of(site.name)] = site

    def attention_hub(self) -> AttentionHub:
        """The attention function of this backbone, installed on first use."""
        if self.attention is None:
            self.attention = AttentionHub(self.executor)
            self.attention.install()
        return self.attention

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.begin()
        self._width = 0
        route = self.executor.route
        if route is None:
            return args, kwargs
        kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        lead = _lead(kwargs)
        if lead is not None and route.lengths is None:
            route.stacks_for(lead.shape[0])
            rows = lead.shape[0]
            prefixes = [0] * rows if self.attention is None else self.attention.prefix_lengths(rows)
            self._tokens = lead.shape[1] if lead.ndim > 1 else 0
            kwargs, self._width = self.entrance.enter(kwargs, prefixes)
        return (), kwargs

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return leave(output, self._width, self._tokens)

    def checkpointing(self) -> None:
        """Turn on transformers' activation checkpointing with a context that brings each pass's route back."""
        module: Any = self.backbone.module
        how = {"use_reentrant": False, "context_fn": self._contexts}
        if hasattr(module, "activation_checkpointing_enable"):  # the name since transformers 5.24
            module.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
        elif hasattr(module, "gradient_checkpointing_enable"):
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        else:
            raise MethodError("Only transformers models can checkpoint activations.")

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self.executor.replay(self.executor.route)

    def remove(self) -> None:
        """Take every hook off again."""
        for forward in reversed(list(self.forwards.values())):
            forward.remove()
        for handle in self._handles:
            handle.remove()
        if self.attention is not None:
            self.attention.remove()
        self.forwards.clear()
        del self.backbone.module.__dict__["_lorica_hooked"]


def _lead(kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor whose first axis is the batch: ids or embeddings where there are any, else the first tensor."""
    named = [kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    return next((value for value in [*named, *kwargs.values()] if isinstance(value, Tensor)), None)
