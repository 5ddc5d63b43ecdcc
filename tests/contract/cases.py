"""What the contract is checked on: every registered method on every backbone family that has a site for it.

In: the registry and the list of families. Out: cases, hosts with perturbed adapters, losses, and a dense reference that
knows nothing of the executor. A method file or a family that is added is covered without an edit here. The backbones
are on the device that LORICA_TEST_DEVICE names, e.g. `cuda`; else on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from lorica.adapters.adapter import Adapter
from lorica.core.errors import LoricaError
from lorica.core.update import LinearUpdate
from lorica.engine.host import Host
from lorica.methods import Method, all_methods
from lorica.models import Backbone
from lorica.models.builtin import FAMILIES
from lorica.models.factory import example_inputs
from lorica.training.optimizer import AdamStep, AdapterOptimizer
from tests.contract.everything import Everything
from tests.tiny import original, tiny

DEVICE = torch.device(os.environ.get("LORICA_TEST_DEVICE", "cpu"))
SLACK = 1 if DEVICE.type == "cpu" else 100
"""A GPU adds up in another order for another number of rows, and some norms are float32 whatever their input."""
torch.backends.cudnn.deterministic = True
METHODS: dict[str, type[Method]] = {**all_methods(), Everything.name: Everything}
"""What the contract holds for: the registry, and one method that uses every part of an update."""
SIZES = {"rank": 3, "tokens": 3, "hidden": 8, "dimension": 200}
"""Sizes of methods that have such fields, so that they fit every tiny site."""
SMOOTH: dict[str, dict[str, Any]] = {"dora": {"norm": "full"}}
"""Settings without a stop-gradient, where a finite difference is the gradient."""
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "lora": [{"rslora": True}, {"init_factor": "b"}, {"init_dist": "gaussian"}, {"init_dist": "normal"}],
    "delta": [{"bias": True}],
    "dora": [{"norm": "full"}],
    "lora_xs": [{"svd": "lowrank"}],
    "milora": [{"start": "subspace"}],
    "miss": [{"form": "mini", "mini_rank": 4}, {"form": "bat", "rank": 4}],
    "multilora": [{"scales": "scalar"}],
    "lora_pro": [{"optimizer": "sgd"}, {"state": "factor"}],
    "pissa": [{"svd": "lowrank"}, {"rslora": True}],
    "prefix": [{"projection": True}],
    "singlora": [{"init_dist": "normal"}],
    "prompt": [{"init_from": "normal"}, {"init_ids": (5, 7)}],
    "intrinsic": [{"structured": True}, {"gradient": "published"}],
    "glora": [{"choice": "vector,lora,none,vector,none"}, {"choice": "constant,vector,none,constant,none"}],
}
"""Further settings of some methods; those of one that is not listed are its defaults."""
TINY: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8},
    "qwen3": {"intermediate_size": 48, "head_dim": 8},
    "gemma": {"intermediate_size": 48, "head_dim": 8},
}


@dataclass(frozen=True)
class Case:
    """A method with its settings on one family."""

    family: str
    method: str
    settings: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join([self.method, *(f"{k}={v}" for k, v in self.settings), self.family])

    def make(self) -> Method:
        return small(self.method, **dict(self.settings))


def small(name: str, **changes: Any) -> Method:
    """The method in a size that fits the tiny backbones."""
    fields = {key: value for key, value in SIZES.items() if key in METHODS[name].model_fields}
    return METHODS[name](**{**fields, **changes})


def backbone(family: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> Backbone:
    base = tiny(family, dtype=dtype, **TINY.get(family, {}), **overrides)
    base.module.to(DEVICE)
    return base


def known(family: str, dtype: torch.dtype = torch.float64) -> Backbone:
    """The original of a backbone, to be looked at and not to be changed."""
    return original(family, dtype=dtype, **TINY.get(family, {}))


def places(base: Backbone, method: Method, *, head: bool = True) -> tuple[str, ...]:
    """Names of all sites that a method accepts."""
    found = []
    for site in base.sites.values():
        if site.kind not in method.kinds or (site.head and not head):
            continue
        try:
            method.params(site)
        except LoricaError:
            continue
        found.append(site.name)
    return tuple(found)


@cache
def _fits(family: str, name: str, settings: tuple[tuple[str, Any], ...] = ()) -> bool:
    return bool(places(known(family), small(name, **dict(settings))))


WHOLE = ("qwen3-moe", "gpt2", "conv")
"""Families that have every kind of site between them."""
CASES = [
    Case(family, name)
    for name in METHODS
    for family in FAMILIES
    if _fits(family, name) and (name in all_methods() or family in WHOLE)
]
MORE = [
    Case(case.family, case.method, tuple(extra.items()))
    for case in CASES
    for extra in VARIANTS.get(case.method, [])
    if case.family in WHOLE and _fits(case.family, case.method, tuple(extra.items()))
]
KINDS = [Case(family, name) for name in METHODS for family in WHOLE if Case(family, name) in CASES]
"""Fewer families which together have every kind of site."""

CORE = [case for case in CASES if case.family not in ("qwen3", "gemma", "mlp")]
"""Without families whose sites are those of others; they are in the tests of every family and variant."""

FORMS = frozenset({"lora", "dora", "ia3", "delta", "norm", "bias", "prefix", "prompt", Everything.name})
"""Methods that have every part of an update between them. Of the others, the default run takes one family each."""


def _first(case: Case) -> bool:
    """Whether it is the family on which a method is checked in the default run."""
    return case == next(other for other in CASES if other.method == case.method)


def marked(chosen: Sequence[Case]) -> list[Any]:
    """Those of `FORMS`, each other method once, and the rest for the slow run."""
    return [
        case if (case.method in FORMS or _first(case)) else pytest.param(case, marks=pytest.mark.slow)
        for case in chosen
    ]


def cases(chosen: Sequence[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", marked(chosen), ids=str)


every = cases(CORE)
every_setting = cases(KINDS + MORE)
every_variant = cases(CASES + MORE)
every_kind = cases(KINDS)
every_family = pytest.mark.parametrize("family", list(FAMILIES))
whole_families = pytest.mark.parametrize(
    "family", [name if name in WHOLE else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)


def attached(
    case: Case, *, dtype: torch.dtype = torch.float64, seed: int = 0, move: float = 0.1, **overrides: Any
) -> Host:
    """A host whose one active adapter `a` acts at every site that it can."""
    host = Host(backbone(case.family, dtype, **overrides))
    add(host, "a", case.make(), seed=seed, move=move)
    host.activate("a")
    return host


def add(host: Host, name: str, method: Method, *, seed: int = 0, move: float = 0.1, head: bool = True) -> Adapter:
    """A further adapter, moved off its initial values. Its parameters are float32 at least."""
    dtype = torch.promote_types(host.backbone.dtype, torch.float32)
    adapter = host.add(name, method, places(host.backbone, method, head=head), seed=seed, dtype=dtype)
    if move:
        perturb(adapter, move, seed)
    return adapter


def perturb(adapter: Adapter, size: float = 0.1, seed: int = 0) -> None:
    """Move every trained tensor, and by a step of rate zero what step hooks write (SingLoRA's ramp)."""
    if adapter.method.has_step_hooks():
        AdapterOptimizer(adapter, steps=4).step(AdamStep(0.0))
    rng = torch.Generator().manual_seed(seed + 1)
    adapter.flat += size * torch.randn(adapter.flat.shape, generator=rng, dtype=torch.float64).to(adapter.flat)


def inputs(host: Host | Backbone, *, rows: int = 2, length: int = 6, seed: int = 0) -> dict[str, Tensor]:
    return example_inputs(host.backbone if isinstance(host, Host) else host, rows=rows, length=length, seed=seed)


def output(host: Host | Backbone, given: dict[str, Tensor]) -> Tensor:
    """What the model returns for a batch: logits."""
    module = host.model if isinstance(host, Host) else host.module
    return logits(module(**given))


def logits(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


def loss(y: Tensor, seed: int = 0) -> Tensor:
    """A scalar whose gradient is different in every output, and the same for a row wherever it stands."""
    weights = torch.randn(y.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y)
    return (y * weights + 0.1 * y.square()).sum() / y[0].numel()


def gradient(host: Host, name: str, given: dict[str, Tensor]) -> Tensor:
    """The adapter's gradient row for one batch under the present routing."""
    adapter = host.adapter(name)
    adapter.zero_grad()
    loss(output(host, given)).backward()
    return adapter.grad.clone()


def snapshot(base: Backbone) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in base.module.state_dict().items()}


def unchanged(base: Backbone, before: dict[str, Tensor]) -> None:
    """Keys, order and every bit of the base as in `before`."""
    after = base.module.state_dict()
    assert list(after) == list(before)
    for name, tensor in after.items():
        assert torch.equal(bits(tensor), bits(before[name])), name


def bits(tensor: Tensor) -> Tensor:
    """The raw bytes: equal NaNs are equal, and zeros of different sign are not."""
    return tensor.detach().contiguous().view(torch.uint8)


def dense(host: Host, stack: Sequence[Adapter]) -> dict[str, Tensor]:
    """The model's parameters with the stack's updates folded in by `effective`, differentiable."""
    base = host.backbone
    tensors: dict[str, Tensor] = dict(base.module.named_parameters(remove_duplicate=False))
    names = {id(part): name for name, part in base.module.named_modules()}
    slices: dict[str, dict[int, Tensor]] = {}
    for site in base.sites.values():
        updates = [a.update(site.name, base.weight(site.name)) for a in stack if site.name in a.layout.sites]
        if not updates:
            continue
        weight, bias = base.weight(site.name).matrix(), base.bias(site.name)
        for update in updates:
            assert isinstance(update, LinearUpdate)
            weight, bias = update.effective(weight), update.effective_bias(bias)
        owner, attribute, expert = base.parameter(site.name)
        prefix = f"{names[id(owner)]}." if names[id(owner)] else ""
        weight = weight.T if site.transposed else weight
        if expert is None:
            tensors[prefix + attribute] = weight
        else:
            slices.setdefault(prefix + attribute, {})[expert] = weight
        if bias is not None:
            tensors[prefix + str(base.places[site.name].bias)] = bias
    for name, parts in slices.items():
        tensors[name] = torch.stack([parts.get(i, tensors[name][i]) for i in range(len(tensors[name]))])
    return tensors


def run_dense(host: Host, stack: Sequence[Adapter], given: dict[str, Tensor]) -> Tensor:
    """The base module run on those parameters, adapters off."""
    tensors = dense(host, stack)
    with host.disabled():
        return logits(functional_call(host.model, tensors, args=(), kwargs=given, tie_weights=False))


def holds_weights(method: Method) -> bool:
    """Whether it acts at sites that hold a weight; prompts and prefixes do not."""
    return not method.kinds <= {"input", "attention"}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal up to a tolerance relative to the largest value."""
    size = max(1e-6, float(expected.detach().abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * SLACK * size)


def fails_after(host: Host, given: dict[str, Tensor]) -> Callable[[], None]:
    """A call that runs one forward pass and then raises."""

    def call() -> None:
        output(host, given)
        raise KeyError("stop")

    return call
