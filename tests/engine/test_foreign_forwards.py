"""What users put on modules, before Lorica came or after its passes were learnt, acts in the engine as in the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorica.adapters.adapter import Adapter
from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.equation import on_top
from lorica.engine.host import Host
from lorica.methods import make_method
from lorica.models import Backbone, wrap
from tests.contract.cases import close, perturb
from tests.tiny import tiny

ROWS = [(5, 9, 20, 7, 8, 3), (30, 11, 6), (9, 9, 5, 5)]
PLACES = [
    *("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj", "mlp.act_fn"),
    *("mlp", "self_attn", "input_layernorm", "lm_head", "norm"),
]
Change = Callable[[nn.Module], object]


def place(base: Backbone, name: str) -> nn.Module:
    full = {"lm_head": "lm_head", "norm": "model.norm"}.get(name, f"model.layers.1.{name}")
    return base.module.get_submodule(full)


def _twice(value: Any) -> Any:
    return (2 * value[0], *value[1:]) if isinstance(value, tuple) else 2 * value


def hook(module: nn.Module) -> object:
    return module.register_forward_hook(lambda module, args, output: _twice(output))


def pre_hook(module: nn.Module) -> object:
    def moved(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        named = {key: value + 1 if key == "hidden_states" else value for key, value in kwargs.items()}
        return (args[0] + 1, *args[1:]) if args else args, named  # a norm would undo a factor

    return module.register_forward_pre_hook(moved, with_kwargs=True)


def own_forward(module: nn.Module) -> None:
    before = module.forward
    module.forward = lambda *args, **kwargs: _twice(before(*args, **kwargs))  # type: ignore[method-assign]


CHANGES: dict[str, Change] = {"hook": hook, "pre-hook": pre_hook, "forward": own_forward}


def resident(base: Backbone, *, head: bool) -> Host:
    host = Host(base)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", *["lm_head"] * head]
    for seed, name in enumerate("ab"):
        perturb(host.add(name, make_method("lora", rank=2), targets, seed=seed), 0.1, seed)
    return host


def by_engine(host: Host) -> tuple[list[Tensor], dict[str, Tensor]]:
    for adapter in host.adapters.values():
        adapter.zero_grad()
    examples = [Example.whole(row) for row in ROWS]
    items = [Item(example, owner) for example, owner in zip(examples, ("a", "b", None), strict=True)]
    results = Engine(host).forward_backward(items)
    return [torch.tensor(r.logprobs) for r in results], {n: a.grad.clone() for n, a in host.adapters.items()}


def beside(base: Backbone, adapter: Adapter) -> None:
    """Autograd's own sum at every site of an adapter: what the module gives, and its change of the weight beside it."""
    for site in adapter.layout.sites:
        module, inner = base.module_of(site), base.module_of(site).forward

        def forward(x: Tensor, site: str = site, inner: Callable[[Tensor], Tensor] = inner) -> Tensor:
            update: Any = adapter.update(site, base.weight(site))
            return inner(x) + x @ update.factors[0].dense().T

        module.forward = forward  # type: ignore[method-assign]


def by_autograd(host: Host, make: Callable[[Adapter | None], Backbone]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The same of plain models, in which nothing of the engine takes part."""
    found = []
    for adapter in host.adapters.values():
        adapter.zero_grad()
    for row, adapter in zip(ROWS, (*host.adapters.values(), None), strict=True):
        module: Any = make(adapter).module
        logits = module(input_ids=torch.tensor([row[:-1]]), use_cache=False).logits[0]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
        if adapter is not None:
            (-logprobs.sum()).backward()
        found.append(logprobs.detach())
    return found, {n: a.grad.clone() for n, a in host.adapters.items()}


def agree(host: Host, make: Callable[[Adapter | None], Backbone]) -> None:
    found, grads = by_engine(host)
    expected, slopes = by_autograd(host, make)
    close(torch.cat(found), torch.cat(expected), 1e-5)
    for name, grad in grads.items():
        assert grad.any()
        close(grad, slopes[name], 1e-4)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.down_proj", "mlp", "input_layernorm", "lm_head"])
@pytest.mark.parametrize("change", ["hook", "forward"])
def test_what_is_put_on_a_module_before_acts_beside_its_adapter(change: str, name: str) -> None:
    base = tiny("llama")
    CHANGES[change](place(base, name))

    def plain(adapter: Adapter | None) -> Backbone:
        made = tiny("llama")
        if change == "forward":  # the adapter stands beside the forward that was there
            CHANGES[change](place(made, name))
        if adapter is not None:
            beside(made, adapter)
        if change != "forward":
            CHANGES[change](place(made, name))
        return made

    agree(resident(base, head=name != "lm_head"), plain)


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("change", list(CHANGES))
def test_what_is_put_on_a_module_after_the_passes_were_learnt_acts_over_its_adapter(change: str, name: str) -> None:
    def plain(adapter: Adapter | None) -> Backbone:
        made = tiny("llama")
        if adapter is not None:
            beside(made, adapter)
        CHANGES[change](place(made, name))
        return made

    host = resident(tiny("llama"), head=False)
    before, _ = by_engine(host)
    CHANGES[change](place(host.backbone, name))
    assert not torch.allclose(torch.cat(by_engine(host)[0]), torch.cat(before))
    agree(host, plain)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.down_proj", "mlp", "norm", "lm_head"])
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_of_the_backward_pass_are_called(register: str, name: str) -> None:
    host, calls = resident(tiny("llama"), head=False), []
    by_engine(host)
    getattr(place(host.backbone, name), register)(lambda module, *grads: calls.append(module))
    by_engine(host)
    assert calls == [place(host.backbone, name)]


def test_another_activation_after_the_passes_were_learnt_is_used() -> None:
    def plain(adapter: Adapter | None) -> Backbone:
        made: Any = tiny("llama")
        made.module.model.layers[1].mlp.act_fn = nn.Tanh()
        if adapter is not None:
            beside(made, adapter)
        return made  # type: ignore[no-any-return]

    host = resident(tiny("llama"), head=False)
    by_engine(host)
    module: Any = host.model
    module.model.layers[1].mlp.act_fn = nn.Tanh()
    agree(host, plain)


@pytest.mark.parametrize("method", ["lora", "ia3", "dora"])
def test_a_forward_that_is_no_multiple_of_its_product_has_the_gradient_of_the_effective_function(method: str) -> None:
    def own(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.tanh(nn.Linear.forward(layer, x)) * 3

    def layers() -> list[nn.Linear]:
        rng = torch.Generator().manual_seed(0)
        made = [nn.Linear(5, 6, dtype=torch.float64), nn.Linear(6, 4, dtype=torch.float64)]
        for parameter in (p for layer in made for p in layer.parameters()):
            nn.init.normal_(parameter, generator=rng)
        made[1].forward = own(made[1])  # type: ignore[method-assign]
        return made

    first, second = layers()
    host = Host(wrap(nn.Sequential(first, second)))
    fields = {"feedforward": ["1"]} if method == "ia3" else {"rank": 2}
    adapter = host.add("a", make_method(method, **fields), ["0", "1"], dtype=torch.float64)  # type: ignore[arg-type]
    perturb(adapter, 0.3)
    host.activate("a")
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = host(x)
    y.square().sum().backward()
    grad = adapter.grad.clone()
    adapter.zero_grad()
    lower, upper = (adapter.update(site, host.backbone.weight(site)) for site in "01")
    h: Any = x
    plain = nn.Linear.forward(first, h if lower.in_scale_I is None else h * lower.in_scale_I)  # type: ignore[union-attr]
    h = on_top(x, plain, first.bias, lower)  # type: ignore[arg-type]
    seen = h if upper.in_scale_I is None else h * upper.in_scale_I  # type: ignore[union-attr]
    expected = on_top(h, own(second)(seen), second.bias, upper)  # type: ignore[arg-type]
    close(y, expected, 1e-12)
    expected.square().sum().backward()
    close(grad, adapter.grad, 1e-12)
