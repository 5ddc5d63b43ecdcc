"""GLoRA: the identities of its specification, over all 432 configurations, and its supernet."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import GloraConfig, get_peft_model
from scipy.stats import chisquare
from torch import Tensor, nn

from lorica.adapters.layout import Layout
from lorica.adapters.merge import Merge
from lorica.core.errors import ConfigError, MergeError, MethodError
from lorica.core.glora_choices import ALL, OPTIONS, Choice
from lorica.core.site import Site
from lorica.engine.host import Host
from lorica.methods.bias import Bias
from lorica.methods.glora import GLoRA
from lorica.methods.ia3 import IA3
from lorica.methods.lora import LoRA
from lorica.models import wrap
from lorica.recipes.glora_search import set_choices
from lorica.training.optimizer import AdamWConfig, AdapterOptimizer
from tests.methods.one import SITE, effective, grads, hosted, linear, matrix, same, tensors

OUT, IN, R = 6, 5, 2
W, B0, X, DY = matrix(OUT, IN), matrix(OUT, seed=1), matrix(7, IN, seed=2), matrix(7, OUT, seed=3)


def supernet(bias: Tensor | None = B0, *, seed: int = 4, rank: int = R) -> Host:
    """A supernet with random values over one layer."""
    host = hosted(linear(W, bias), GLoRA(rank=rank, supernet=True))
    flat = host.adapter("a").flat
    flat.copy_(0.5 * matrix(*flat.shape, seed=seed))
    return host


def independent(p: dict[str, Tensor], choice: Choice, x: Tensor, bias: Tensor | None) -> Tensor:
    """The paper's equation read another way: scaled rows and columns, and shifted inputs."""
    y = x @ W.T
    if choice.A == "lora":  # Σ_k diag(Xd_k) W₀ diag(Xu_k)
        y = y + sum(((x * p["Au"][k]) @ W.T) * p["Ad"][:, k] for k in range(R))
    elif choice.A != "none":
        y = y + (x @ W.T) * (p["Ad"][:, 0] if choice.A == "vector" else p["Ad"][0, 0])
    if choice.B == "lora":
        y = y + (x @ p["Bu"].T) @ p["Bd"].T
    elif choice.B != "none":
        y = y + x.sum(1, keepdim=True) * (p["Bd"][:, 0] if choice.B == "vector" else p["Bd"][0, 0])
    if choice.C != "none":  # a constant that is added to the input before W₀
        shift = p["Cd"] @ p["Cu"][:, 0] if choice.C == "lora" else p["Cd"][:, 0]
        y = y + (x + shift) @ W.T - x @ W.T
    if bias is not None:
        y = y + bias
        if choice.D != "none":
            y = y + bias * (p["D"] if choice.D == "vector" else p["D"][0])
    if choice.E != "none":
        y = y + (p["E"] if choice.E == "vector" else p["E"][0])
    return y


def values(host: Host) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors(host).items()}


def test_there_are_432_different_choices_and_each_survives_text_and_numbers() -> None:
    assert len(ALL) == len(set(ALL)) == 432
    for choice in ALL:
        assert Choice.parse(str(choice)) == choice == Choice.at(choice.numbers())


@pytest.mark.parametrize("bias", [B0, None], ids=["bias", "no bias"])
def test_every_configuration_is_the_equation_read_another_way(bias: Tensor | None) -> None:
    host = supernet(bias)
    for choice in ALL:
        set_choices(host.adapter("a"), {SITE: choice})
        same(host(X), independent(values(host), choice, X, bias))


def test_every_configuration_merges_and_unmerges_by_bits_and_by_arithmetic() -> None:
    host = supernet()
    frozen = host.backbone.weight(SITE).matrix().clone(), B0.clone()
    for choice in ALL:
        set_choices(host.adapter("a"), {SITE: choice})
        y = host(X).detach()
        host.merge()
        same(host(X), y)
        host.unmerge()
        assert torch.equal(host.backbone.weight(SITE).matrix(), frozen[0])
        assert torch.equal(host.backbone.bias(SITE), frozen[1])  # type: ignore[arg-type]
        if choice not in ALL[::3]:
            continue
        merge = Merge(host.backbone, (host.adapter("a"),), keep=False)
        merge.apply()
        merge.undo()
        same(host.backbone.weight(SITE).matrix(), frozen[0], 1e-13)
        same(host.backbone.bias(SITE), frozen[1], 1e-13)  # type: ignore[arg-type]
        host.backbone.module.load_state_dict({f"{SITE}.weight": frozen[0], f"{SITE}.bias": frozen[1]})


@pytest.mark.parametrize("bias", [B0, None], ids=["bias", "no bias"])
@pytest.mark.parametrize("choice", ALL[::7], ids=str)
def test_a_fixed_choice_owns_only_what_it_uses_and_has_the_gradients_of_the_equation(
    choice: Choice, bias: Tensor | None
) -> None:
    net = supernet(bias)
    used = choice.select(values(net))
    if not used:
        return
    host = hosted(linear(W, bias), GLoRA(rank=R, choice=str(choice)), **used)
    assert set(tensors(host)) == set(used)
    assert host.adapter("a").layout.trainable_count() == sum(t.numel() for t in used.values())
    found = grads(host, X, DY)
    stored = {name: t.requires_grad_() for name, t in values(net).items() if name != "choice"}
    (independent(stored, choice, X, bias) * DY).sum().backward()
    for name, grad in choice.select(
        {n: t.grad for n, t in stored.items() if t.grad is not None} | _zeros(stored)
    ).items():
        same(found[name], grad)


def _zeros(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(t) for name, t in stored.items() if t.grad is None}


def test_c_is_a_constant_that_is_added_to_the_input() -> None:
    shift = matrix(IN, seed=5)
    for bias in (B0, None):
        host = hosted(linear(W, bias), GLoRA(choice="none,none,vector,none,none"), C=shift)
        same(host(X), linear(W, bias)(X + shift))


def test_a_is_an_elementwise_product_and_no_matrix_product() -> None:
    host = hosted(linear(W, B0), GLoRA(rank=R, choice="lora,none,none,none,none"))
    Ad, Au = matrix(OUT, R, seed=6), matrix(R, IN, seed=7)
    host.adapter("a").set(SITE, "Ad", Ad)
    host.adapter("a").set(SITE, "Au", Au)
    same(effective(host), W + W * (Ad @ Au))
    same(effective(host), W + sum(torch.diag(Ad[:, k]) @ W @ torch.diag(Au[k]) for k in range(R)))
    assert torch.linalg.matrix_rank(effective(host) - W) > R  # full rank in general, unlike LoRA's


def test_special_configurations_are_lora_ia3_and_bias_tuning() -> None:
    A, B, d = matrix(R, IN, seed=8), matrix(OUT, R, seed=9), matrix(OUT, seed=10)
    lora = hosted(linear(W, B0), LoRA(rank=R, alpha=R), A=A, B=B)
    same(hosted(linear(W, B0), GLoRA(rank=R, choice="none,lora,none,none,none"), Bu=A, Bd=B)(X), lora(X))
    ia3 = hosted(linear(W, B0), IA3(feedforward=()), l=1 + d)
    same(hosted(linear(W, B0), GLoRA(choice="vector,none,none,vector,none"), A=d, D=d)(X), ia3(X))
    bias = hosted(linear(W, B0), Bias(), bias=d)
    same(hosted(linear(W, B0), GLoRA(choice="none,none,none,none,vector"), E=d)(X), bias(X))


def test_a_constant_trains_one_entry_and_a_vector_one_column_of_what_is_stored() -> None:
    host = supernet()
    set_choices(host.adapter("a"), {SITE: Choice("constant", "vector", "vector", "constant", "constant")})
    found = grads(host, X, DY)
    entry, column = torch.zeros(OUT, R, dtype=torch.bool), torch.zeros(OUT, R, dtype=torch.bool)
    entry[0, 0], column[:, 0] = True, True
    assert torch.equal(found["Ad"] != 0, entry)
    assert torch.equal(found["Bd"] != 0, column)
    assert torch.equal(found["Cd"] != 0, column[:IN])
    assert found["D"].nonzero().flatten().tolist() == found["E"].nonzero().flatten().tolist() == [0]
    assert not any(found[name].any() for name in ("Au", "Bu", "Cu"))


def test_every_configuration_of_a_new_supernet_is_the_base_bit_for_bit() -> None:
    for bias in (B0, None):
        host = hosted(linear(W, bias), GLoRA(rank=R, supernet=True))
        with host.disabled():
            base = host(X)
        for choice in ALL:
            set_choices(host.adapter("a"), {SITE: choice})
            assert torch.equal(host(X), base)


def test_a_supernet_counts_the_parameters_of_every_choice() -> None:
    net = GLoRA(rank=4, supernet=True)
    one = Site("fc", "linear", (768, 768), bias=True)
    assert Layout(net, {"fc": (one, net)}).trainable_count() == 16_900


@pytest.mark.parametrize(
    "choice", [Choice("lora", "lora", "lora", "vector", "vector"), ALL[0], ALL[200], ALL[431]], ids=str
)
def test_the_count_of_a_choice_is_the_formula(choice: Choice) -> None:
    site, r = Site("fc", "linear", (OUT, IN), bias=True), 3
    pair = {"lora": r * (OUT + IN), "vector": OUT, "constant": 1, "none": 0}
    column = {"lora": r * (IN + 1), "vector": IN, "none": 0}
    one = {"vector": OUT, "constant": 1, "none": 0}
    assert choice.trained(site, r) == pair[choice.A] + pair[choice.B] + column[choice.C] + one[choice.D] + one[choice.E]


def test_choices_are_drawn_uniformly() -> None:
    rng = torch.Generator().manual_seed(0)
    seen = Counter(Choice.draw(rng) for _ in range(432 * 25))
    assert chisquare([seen[choice] for choice in ALL]).pvalue > 1e-3


def test_the_supernet_draws_another_choice_at_each_step_and_not_at_each_forward_pass() -> None:
    host = Host(wrap(nn.Sequential(*(linear(matrix(4, 4, seed=n), matrix(4, seed=n)) for n in range(3)))))
    adapter = host.add("a", GLoRA(rank=2, supernet=True), ["0", "1", "2"], dtype=torch.float64)
    host.activate("a")
    optimizer = AdapterOptimizer(adapter, AdamWConfig(lr=1e-3))
    seen = []
    for step in range(40):
        before = [adapter.values(site)["choice"].clone() for site in adapter.layout.sites]
        for _ in range(2):  # two micro-batches
            host(matrix(3, 4, seed=step)).square().sum().backward()
        assert all(
            torch.equal(adapter.values(s)["choice"], b) for s, b in zip(adapter.layout.sites, before, strict=True)
        )
        optimizer.step()
        seen += [Choice.at(adapter.values(site)["choice"]) for site in adapter.layout.sites]
    assert len(set(seen)) > 80
    host.eval()
    set_choices(adapter, dict.fromkeys(adapter.layout.sites, ALL[17]))
    host(matrix(3, 4))
    assert {Choice.at(adapter.values(site)["choice"]) for site in adapter.layout.sites} == {ALL[17]}


def test_a_stopped_supernet_draws_the_same_choices_when_it_goes_on() -> None:
    def steps(host: Host, optimizer: AdapterOptimizer, numbers: range) -> list[Choice]:
        seen = []
        for n in numbers:
            host(matrix(3, IN, seed=n)).square().sum().backward()
            optimizer.step()
            seen.append(Choice.at(tensors(host)["choice"]))
        return seen

    host = supernet(seed=11)
    whole = steps(host, AdapterOptimizer(host.adapter("a")), range(8))
    again = supernet(seed=11)
    first = AdapterOptimizer(again.adapter("a"))
    begun = steps(again, first, range(3))
    second = AdapterOptimizer(again.adapter("a"))
    second.load_state_dict(first.state_dict())
    assert begun + steps(again, second, range(3, 8)) == whole
    assert torch.equal(again.adapter("a").flat, host.adapter("a").flat)


def test_a_supernet_survives_its_files_with_its_present_choice(tmp_path: Path) -> None:
    host = hosted(linear(W, B0).float(), GLoRA(rank=R, supernet=True))
    host.adapter("a").to(dtype=torch.float32)
    set_choices(host.adapter("a"), {SITE: ALL[100]})
    host.save(tmp_path / "net", "a")
    flat = host.adapter("a").flat
    loaded = Host(host.detach()).load(tmp_path / "net", "b")
    assert Choice.at(loaded.values(SITE)["choice"]) == ALL[100]
    assert torch.equal(loaded.flat, flat)


def test_a_bias_appears_where_there_was_none_and_merging_it_is_refused() -> None:
    e = matrix(OUT, seed=12)
    for choice, given in (("none,none,none,none,vector", {"E": e}), ("none,none,vector,none,none", {"C": e[:IN]})):
        host = hosted(linear(W), GLoRA(choice=choice), **given)
        assert not torch.allclose(host(X), X @ W.T)
        with pytest.raises(MergeError, match="no bias"):
            host.merge()
    with pytest.raises(MethodError, match="trains nothing"):
        hosted(linear(W), GLoRA(choice="none,none,none,vector,none"))


def test_convolutions_have_the_same_reading() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2, dtype=torch.float64)
    x, weight, bias = matrix(2, 4, 5, 5, seed=1), conv.weight.detach(), conv.bias.detach()  # type: ignore[union-attr]
    net = hosted(conv, GLoRA(rank=2, supernet=True))
    flat = net.adapter("a").flat
    flat.copy_(0.3 * matrix(*flat.shape, seed=2))
    p = values(net)
    full = {"A": (p["Ad"] @ p["Au"].flatten(1)).view_as(weight), "B": (p["Bd"] @ p["Bu"].flatten(1)).view_as(weight)}
    for choice in ALL[::5]:
        set_choices(net.adapter("a"), {SITE: choice})
        term = {
            letter: {
                "lora": full[letter],
                "vector": p[f"{letter}d"][:, :1, None, None],
                "constant": p[f"{letter}d"][0, 0],
                "none": 0.0,
            }
            for letter in "AB"
        }
        shift = {"lora": p["Cd"] @ p["Cu"][:, 0], "vector": p["Cd"][:, 0], "none": torch.zeros(18).double()}[choice.C]
        own = {
            "D": {"vector": p["D"], "constant": p["D"][0], "none": 0.0},
            "E": {"vector": p["E"], "constant": p["E"][0], "none": 0.0},
        }
        W2 = weight + weight * term["A"][choice.A] + term["B"][choice.B]
        b2 = bias + bias * own["D"][choice.D] + own["E"][choice.E] + weight.flatten(1) @ shift
        same(net(x), nn.functional.conv2d(x, W2, b2, padding=1, groups=2))


def test_choices_differ_by_site_and_the_first_pattern_decides() -> None:
    host = Host(wrap(nn.Sequential(*(linear(matrix(4, 4, seed=n), matrix(4, seed=n)) for n in range(3)))))
    method = GLoRA(
        rank=2,
        choice="none,lora,none,none,none",
        choices={"0": "none,none,none,none,constant", "[01]": "vector,none,none,none,none"},
    )  # type: ignore[arg-type]
    layout = host.add("a", method, ["0", "1", "2"]).layout
    assert [set(layout.specs[name]) for name in ("0", "1", "2")] == [{"E"}, {"A"}, {"Bd", "Bu"}]
    assert GLoRA(**method.model_dump(mode="json")) == method
    assert hash(method)
    with pytest.raises(MethodError, match="decides at no adapted site"):
        host.layout(GLoRA(choices=(("9", "none,none,none,none,constant"),)), ["0"])


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("lora,lora", "has 2 options"),
        ("lora,lora,constant,none,none", "C the option 'constant'"),
        ("lora,lora,none,lora,none", "D the option 'lora'"),
        ("lora,vectr,none,none,none", "'vector'"),
    ],
)
def test_a_wrong_choice_is_a_sentence(choice: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GLoRA(choice=choice)
    with pytest.raises(ConfigError, match=words):
        GLoRA(choices=(("fc", choice),))


@pytest.mark.parametrize("pattern", ["(", "a)|(b", "(?i)FC"])
def test_a_pattern_that_is_no_regular_expression_where_it_is_used_is_refused_by_the_config(pattern: str) -> None:
    with pytest.raises(ConfigError, match="is no regular expression"):
        GLoRA(choices=((pattern, "none,lora,none,none,none"),))


def test_without_a_bias_peft_drops_what_the_equation_keeps() -> None:
    base = nn.Sequential()
    base.add_module(SITE, linear(W))
    theirs = get_peft_model(
        base, GloraConfig(r=R, target_modules=[SITE], config_A_B="none", config_C="vector", config_D_E="vector")
    )
    assert not [p for p in theirs.parameters() if p.requires_grad]
    host = hosted(linear(W), GLoRA(choice="none,none,vector,none,vector"), C=matrix(IN, seed=1), E=matrix(OUT, seed=2))
    same(host(X), (X + matrix(IN, seed=1)) @ W.T + matrix(OUT, seed=2))


def test_option_numbers_are_those_of_the_declared_lists() -> None:
    assert {letter: len(options) for letter, options in OPTIONS.items()} == {"A": 4, "B": 4, "C": 3, "D": 3, "E": 3}
