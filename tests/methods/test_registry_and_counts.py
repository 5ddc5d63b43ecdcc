"""The registry finds files by itself, and trainable counts are those published for Llama-3.2-3B."""

from __future__ import annotations

import pkgutil

import pytest

import lorica.methods
from lorica.adapters.layout import Layout
from lorica.adapters.targets import Targets, select
from lorica.core.errors import ConfigError, MethodError
from lorica.core.site import Site
from lorica.methods import Method, all_methods, get_method, make_method

HIDDEN, KV, FFN, LAYERS = 3072, 1024, 8192, 28
SHAPES = {
    **{"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN)},
    **{"self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN)},
    "mlp.down_proj": (HIDDEN, FFN),
}


def llama() -> dict[str, Site]:
    """The sites of Llama-3.2-3B, without its weights."""
    sites = [Site("model.norm", "norm", (HIDDEN,))]
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        sites += [Site(f"{block}.{name}", "linear", shape, layer=layer) for name, shape in SHAPES.items()]
        sites += [Site(f"{block}.{n}_layernorm", "norm", (HIDDEN,), layer=layer) for n in ("input", "post_attention")]
        sites.append(Site(f"{block}.self_attn", "attention", (8, 128), layer=layer, query_heads=24))
    return {site.name: site for site in sites}


def count(method: Method, targets: Targets) -> int:
    return Layout(method, select(llama(), method, targets)).trainable_count()


QV, MLP = Targets(include=("q_proj", "v_proj")), Targets(include=("gate_proj", "up_proj", "down_proj"))
FEED = {"feedforward": ("gate_proj", "up_proj", "down_proj")}


@pytest.mark.parametrize(
    ("method", "targets", "published"),
    [
        (make_method("lora", rank=32), QV, 9_175_040),
        (make_method("lora", rank=64, rslora=True), QV, 18_350_080),
        (make_method("lora", rank=10), MLP, 9_461_760),
        (make_method("dora", rank=32), QV, 9_289_728),
        (make_method("pissa", rank=32), QV, 9_175_040),
        (make_method("milora", rank=32), QV, 9_175_040),
        (make_method("lora_fa", rank=32), QV, 3_670_016),
        (make_method("adalora", rank=64), QV, 18_353_664),
        (make_method("glora", rank=8), QV, 4_587_520),
        (make_method("glora", rank=8, choice="vector,vector,none,none,none"), QV, 229_376),
        (make_method("singlora", rank=32), QV, 5_505_024),
        (make_method("miss"), QV, 7_340_032),
        (make_method("miss", form="bat"), QV, 7_340_032),
        (make_method("miss", form="mini", mini_rank=64), QV, 229_376),
        (make_method("multilora", rank=2, modules=3), QV, 28 * 3 * (2 * (2 * HIDDEN + HIDDEN + KV) + HIDDEN + KV)),
        (make_method("lora_xs", rank=25), QV, 2 * 28 * 25**2),
        (make_method("vera"), QV, 129_024),
        (make_method("ia3"), Targets(), 286_720),
        (make_method("ia3", **FEED), Targets(include=("all-linear",)), 630_784),
        (make_method("norm"), Targets(), 175_104),
        (make_method("prefix", tokens=30), Targets(), 30 * LAYERS * 2 * KV),
    ],
    ids=lambda v: v.name if isinstance(v, Method) else f"{v:,}" if isinstance(v, int) else "",
)
def test_trainable_counts_are_the_published_ones(method: Method, targets: Targets, published: int) -> None:
    assert count(method, targets) == published


def test_prefix_counts_of_gpt2_medium_with_and_without_the_mlp() -> None:
    sites = {f"h.{i}.attn": Site(f"h.{i}.attn", "attention", (16, 64), layer=i, query_heads=16) for i in range(24)}
    for projection, published in ((False, 491_520), (True, 25_750_016)):
        method = make_method("prefix", tokens=10, projection=projection)
        assert Layout(method, select(sites, method, Targets())).trainable_count() == published


def test_every_method_file_is_registered_without_a_list() -> None:
    files = {info.name for info in pkgutil.iter_modules(lorica.methods.__path__)} - {"base"}
    assert {cls.__module__.rsplit(".", 1)[-1] for cls in all_methods().values()} == files
    assert list(all_methods()) == sorted(all_methods())


def test_an_unknown_method_names_its_neighbours() -> None:
    with pytest.raises(MethodError, match="no method 'lroa'. Did you mean 'lora'") as caught:
        get_method("lroa")
    assert caught.value.hint


def test_an_unknown_setting_names_its_neighbours() -> None:
    with pytest.raises(ConfigError, match="no setting 'rnak'. Did you mean 'rank'"):
        make_method("lora", rnak=4)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *[
            ("lora", bad)
            for bad in ({"alpha": 0}, {"dropout": 1.0}, {"dropout": -0.1}, {"init_factor": "c"}, {"rank": 2.5})
        ],
        *[("prompt", bad) for bad in ({"tokens": 0}, {"init_ids": (1,), "init_from": "vocab"}, {"init_from": "ids"})],
        ("prompt", {"tokens": 2, "init_ids": (1, 2, 3)}),
        ("prefix", {"tokens": 0}),
        ("vera", {"rank": 0}),
        ("pissa", {"svd": "quick"}),
        ("milora", {"start": "middle"}),
        ("miss", {"form": "mini"}),
        ("multilora", {"modules": 0}),
        ("lora_xs", {"init_std": -1}),
        ("dora", {"norm": "some"}),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_one_clear_sentence(name: str, fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_method(name, **fields)
    assert str(caught.value).count("\n") == 0 and str(caught.value).endswith(".")
