"""Fused experts: the routed tokens of each expert pass through that expert's sites as through any linear site.

In: a fused experts module whose parameters are [experts, out, in], and the sites of its slices.
Out: a stand-in for its forward. Only tokens that reach an expert are computed. Refuses to know routers and methods.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.core.errors import MethodError
from lorica.core.site import Site
from lorica.engine.executor import Executor
from lorica.engine.linear import Base
from lorica.engine.linear_sites import stacked_linear
from lorica.engine.route import Route, subset
from lorica.engine.sites import SiteForward, amp


class ExpertsForward(SiteForward):
    """Stands in for a fused experts module once any of its slices is adapted.

    `sites[parameter][expert]` are the sites of the slices. The module computes
    `Σ_k w_k · down_e(gated(gate_up_e(x)))` over the experts e chosen for each token, with a gate of its own or
    `act(gate) ⊙ up`. An adapter of a module that is not handed the choice of experts (Llama 4) can be loaded, saved and
    merged; a forward pass with it raises MethodError.
    """

    def __init__(self, executor: Executor, module: nn.Module, sites: dict[str, dict[int, Site]]) -> None:
        super().__init__(executor, module, next(iter(next(iter(sites.values())).values())))
        self.sites = sites
        given = list(inspect.signature(type(module).forward).parameters)
        self.says = len(given) >= 4 and {"gate_up_proj", "down_proj"} <= sites.keys()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        route = self.executor.live_route()
        names = {site.name for per_expert in self.sites.values() for site in per_expert.values()}
        if route is None or not any(names & a.layout.sites.keys() for a in route.adapters()):
            return cast(Tensor, self.inner(*args, **kwargs))
        if not self.says:
            raise MethodError(
                f"{type(self.module).__name__} does not say which tokens an expert sees, so its experts cannot be "
                "adapted in a forward pass.",
                hint="Leave them out of the targets; an adapter of theirs that exists can be merged into the weights.",
            )
        return self._routed(route, *args, **kwargs)

    def _routed(self, route: Route, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x_NH = hidden_states.reshape(-1, hidden_states.shape[-1])
        out_NH = torch.zeros_like(x_NH)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= cast(Any, self.module).num_experts:
                continue  # transformers' sentinel for tokens that another device serves
            token_n, choice_n = torch.where(top_k_index == expert)
            gate_up = self._slice("gate_up_proj", expert, x_NH[token_n], token_n, route, len(x_NH))
            y = self._slice("down_proj", expert, self._gated(gate_up), token_n, route, len(x_NH))
            out_NH = out_NH.index_add(0, token_n, (y * top_k_weights[token_n, choice_n, None]).to(out_NH.dtype))
        return out_NH.view(hidden_states.shape)

    def _gated(self, gate_up: Tensor) -> Tensor:
        """What the module makes of the joint map's outputs: GPT-OSS interleaves them, and clamps and shifts."""
        module = cast(Any, self.module)
        own = getattr(module, "_apply_gate", None)
        if own is not None:
            return cast(Tensor, own(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return cast(Tensor, module.act_fn(gate) * up)

    def _slice(self, param: str, expert: int, x_nI: Tensor, token_n: Tensor, route: Route, tokens: int) -> Tensor:
        """One expert's product, with the updates of the tokens that reached it."""
        site = self.sites[param][expert]
        weight_OI, bias_O = self.executor.backbone.weight(site.name).matrix(), self.executor.backbone.bias(site.name)
        work = self.executor.lower(site, subset(route.segments(tokens), token_n), route)
        if not work:
            return F.linear(x_nI, weight_OI, bias_O)
        base = Base(lambda x: F.linear(x, weight_OI, bias_O), lambda dy: dy @ weight_OI.to(dy.dtype), bias_O)
        return stacked_linear(amp(x_nI), base, work, self.executor.compute)
