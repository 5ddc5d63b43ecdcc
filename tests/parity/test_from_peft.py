"""PEFT to ours: LoRA folders that the wheel writes, in every setting that says what is adapted and how it is scaled."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.adapters.adapter import Adapter
from lorica.core.errors import FormatError
from lorica.methods.lora import LoRA
from lorica.methods.pissa import PiSSA
from tests.parity.both import (
    CONV1D,
    EMBEDDINGS_SAVED,
    NO_BIAS,
    OLD_CHECKPOINTING,
    SHARDS,
    TIED,
    UNMATCHED,
    from_peft,
    in_peft,
    loaded,
    lora,
    of_family,
    peft_model,
    reads,
    run,
)

pytestmark = [OLD_CHECKPOINTING, CONV1D, TIED, EMBEDDINGS_SAVED, NO_BIAS, SHARDS, UNMATCHED]

TWO = ("q_proj", "v_proj")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
DORA = {"use_dora": True}

TARGETS: dict[str, tuple[str, Any]] = {
    "a list of suffixes": ("llama", lora(*TWO)),
    "a whole name": ("llama", lora("model.layers.0.mlp.up_proj", "v_proj")),
    "a regular expression": ("llama", lora(target_modules=r".*\.layers\.1\..*\.(q|v)_proj")),
    "all-linear": ("llama", lora(target_modules="all-linear")),
    "all-linear, GPT-2": ("gpt2", lora(target_modules="all-linear")),
    "all-linear, Qwen3": ("qwen3", lora(target_modules="all-linear")),
    "all-linear, Gemma": ("gemma", lora(target_modules="all-linear")),
    "all-linear, BERT": ("bert", lora(target_modules="all-linear", task_type=None)),
    "all-linear, ViT": ("vit", lora(target_modules="all-linear", task_type=None)),
    "an exclusion": ("llama", lora(*TWO, exclude_modules=["layers.0.self_attn.q_proj"])),
    "an exclusion by pattern": ("llama", lora(*TWO, exclude_modules=r"model\.layers\.0.*q_proj")),
    "one layer": ("llama", lora(*TWO, layers_to_transform=0)),
    "a list of layers": ("llama", lora(*TWO, layers_to_transform=[1])),
    "layers behind a name": ("llama", lora(*TWO, layers_to_transform=[1], layers_pattern="layers")),
    "layers beside a whole name": ("llama", lora("v_proj", "model.layers.0.mlp.up_proj", layers_to_transform=[1])),
    "a layer of GPT-2": ("gpt2", lora("c_attn", layers_to_transform=[1], layers_pattern=["h", "blocks"])),
}
SETTINGS: dict[str, tuple[str, Any]] = {
    "ranks by pattern, the first wins": (
        "llama",
        lora(*TWO, rank_pattern={"layers.0.self_attn.q_proj": 2, "q_proj": 3, "v_proj": 5}),
    ),
    "a pattern with ^ is the whole path": (
        "llama",
        lora(
            *TWO,
            rank_pattern={r"^model\.layers\.0\.self_attn.q_proj": 2, r"^layers\.1\.self_attn\.q_proj": 5},
            alpha_pattern={r"^model.layers.1.*q_proj": 3, "v_proj": 16},
        ),
    ),
    "a pattern begins at a dot": ("llama", lora(*TWO, rank_pattern={"proj": 7, r"layers\.\d\.self_attn\.v_proj": 2})),
    "rsLoRA": ("llama", lora(*TWO, use_rslora=True)),
    "rsLoRA with patterns": (
        "llama",
        lora(*TWO, use_rslora=True, rank_pattern={"q_proj": 9}, alpha_pattern={"v_proj": 3}),
    ),
    "dropout": ("llama", lora(*TWO, lora_dropout=0.4)),
    "lora_bias": ("llama", lora(*TWO, lora_bias=True)),
    "lora_bias beside a bias": ("gpt2", lora("c_attn", lora_bias=True, use_rslora=True)),
    "fan_in_fan_out": ("gpt2", lora("c_attn", "mlp.c_proj", fan_in_fan_out=True)),
    "Conv1D and Linear": ("gpt2", lora("c_attn", "lm_head")),
    "gaussian init": ("llama", lora(*TWO, init_lora_weights="gaussian")),
    "random init": ("llama", lora(*TWO, init_lora_weights=False)),
    "orthogonal init": ("llama", lora(*TWO, init_lora_weights="orthogonal")),
    "MiCA": ("llama", lora(*TWO, init_lora_weights="mica")),
    "PiSSA": ("llama", lora(*TWO, init_lora_weights="pissa")),
    "PiSSA with rsLoRA": ("llama", lora(*TWO, init_lora_weights="pissa", use_rslora=True)),
    "PiSSA with patterns": (
        "llama",
        lora(*TWO, init_lora_weights="pissa", rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 3}),
    ),
    "PiSSA, Conv1D": ("gpt2", lora("c_attn", init_lora_weights="pissa")),
}
LAYERS: dict[str, tuple[str, Any]] = {
    "DoRA": ("llama", lora("q_proj", "up_proj", **DORA)),
    "DoRA with rsLoRA": ("llama", lora(*TWO, **DORA, use_rslora=True, rank_pattern={"q_proj": 2})),
    "DoRA, Conv1D": ("gpt2", lora("c_attn", "c_proj", **DORA)),
    "DoRA, BERT": ("bert", lora("query", "dense", **DORA, task_type=None)),
    "an embedding": ("llama", lora("embed_tokens", "q_proj")),
    "an embedding, DoRA": ("llama", lora("embed_tokens", "q_proj", **DORA)),
    "an embedding with a scale": ("gemma", lora("embed_tokens", "q_proj")),
    "an embedding with a scale, DoRA": ("gemma", lora("embed_tokens", "q_proj", **DORA)),
    "tokens and positions": ("gpt2", lora("wte", "wpe", "c_fc")),
    "tokens and positions, DoRA": ("gpt2", lora("wte", "wpe", "c_fc", **DORA)),
    "three embeddings": ("bert", lora("word_embeddings", "position_embeddings", "query", task_type=None)),
    "Conv1d and Linear": ("conv", lora("0", "9", task_type=None)),
    "Conv2d without bias": ("conv", lora("7", task_type=None, use_rslora=True)),
    "Conv2d with lora_bias": ("vit", lora("projection", task_type=None, lora_bias=True)),
    "convolutions, DoRA": ("conv", lora("0", "7", "9", task_type=None, **DORA)),
    "patches": ("vit", lora("projection", "q_proj", task_type=None, **DORA)),
    "a plain module": ("mlp", lora("fc1", "fc2", "embed", task_type=None)),
    "gate and up of experts": ("qwen3-moe", lora(target_parameters=EXPERTS[:1])),
    "down of experts": ("qwen3-moe", lora(target_parameters=EXPERTS[1:])),
    "both tensors of experts": ("qwen3-moe", lora("q_proj", target_parameters=EXPERTS)),
    "both, listed the other way": ("qwen3-moe", lora("q_proj", target_parameters=EXPERTS[::-1], use_rslora=True)),
    "one tensor in one layer": ("qwen3-moe", lora(target_parameters=["layers.1.mlp.experts.gate_up_proj", EXPERTS[1]])),
    "experts by pattern": (
        "qwen3-moe",
        lora(target_parameters=EXPERTS, rank_pattern={"experts.gate_up_proj": 2}, alpha_pattern={"down_proj": 3}),
    ),
    "a matrix as a parameter": ("llama", lora(target_parameters=["q_proj.weight"])),
}
EVERY = {**TARGETS, **SETTINGS, **LAYERS}


@pytest.mark.parametrize("row", EVERY)
def test_a_lora_folder_of_peft_gives_the_same_logits(row: str, tmp_path: Path) -> None:
    family, config = EVERY[row]
    adapter = from_peft(config, of_family(family), tmp_path)
    assert adapter.method.name == ("pissa" if "PiSSA" in row else "dora" if config.use_dora else "lora")


KEYS = ["q_proj", "proj", r"layers\.\d\.self_attn\..*", r"^model\.layers\.1\..*", r"1\.mlp\.up_proj", ".*"]
PATTERNS = st.dictionaries(st.sampled_from(KEYS), st.integers(1, 6), max_size=4)
NAMES = st.sets(st.sampled_from(["q_proj", "v_proj", "mlp.up_proj", "1.self_attn.o_proj"]), min_size=1)


@given(PATTERNS, PATTERNS, NAMES)
@settings(max_examples=15)
def test_any_patterns_are_those_that_peft_trained_with_or_refused(
    ranks: dict[str, int], alphas: dict[str, int], names: set[str]
) -> None:
    """PEFT takes the first pattern that matches, and writes patterns in alphabetical order. Ranks are seen in the
    tensors (where PEFT fails to read its own folder); of alphas that disagree, nobody can tell which was meant.
    """
    make, config = of_family("llama"), lora(*names, rank_pattern=ranks, alpha_pattern=alphas)
    model = peft_model(config, make)
    modules = [name.split(".lora_A")[0] for name, _ in model.base_model.model.named_modules() if ".lora_A." in name]
    told = [{alpha for key, alpha in alphas.items() if re.match(rf"(.*\.)?({key})$", name)} for name in modules]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if any(len(values) > 1 for values in told):
            with pytest.raises(FormatError, match="several alphas by alpha_pattern"):
                loaded(Path(folder), make)
        else:
            reads(Path(folder), make, run(model, make()).detach())


def test_an_order_of_rank_patterns_that_peft_itself_loses_is_seen_in_the_tensors(tmp_path: Path) -> None:
    make = of_family("llama")
    model = peft_model(lora(*TWO, rank_pattern={"q_proj": 2, ".*": 3}), make)
    model.save_pretrained(str(tmp_path))
    with pytest.raises(RuntimeError, match="size mismatch"):
        in_peft(make().module, tmp_path)
    adapter = reads(tmp_path, make, run(model, make()).detach())
    assert {rank for rank, _ in sizes(adapter).values()} == {2, 3}


def adapted(row: str, folder: Path) -> Adapter:
    family, config = EVERY[row]
    return from_peft(config, of_family(family), folder)


def sizes(adapter: Adapter) -> dict[str, tuple[int, float]]:
    """Rank and alpha by site, without the trunk's name."""
    found = {}
    for site, method in adapter.layout.methods.items():
        assert isinstance(method, LoRA | PiSSA)
        found[site.removeprefix("model.layers.").replace(".self_attn", "")] = (method.rank, method.alpha)
    return found


def test_the_first_pattern_that_matches_wins_and_others_keep_the_defaults(tmp_path: Path) -> None:
    assert sizes(adapted("ranks by pattern, the first wins", tmp_path)) == {
        **{"0.q_proj": (2, 6.0), "0.v_proj": (5, 6.0)},
        **{"1.q_proj": (3, 6.0), "1.v_proj": (5, 6.0)},
    }


def test_a_circumflex_means_the_whole_path_inside_the_base(tmp_path: Path) -> None:
    assert sizes(adapted("a pattern with ^ is the whole path", tmp_path)) == {
        **{"0.q_proj": (2, 6.0), "0.v_proj": (4, 16.0)},
        **{"1.q_proj": (4, 3.0), "1.v_proj": (4, 16.0)},
    }


def test_the_part_of_a_name_before_a_dot_is_not_half_matched(tmp_path: Path) -> None:
    assert {size for size, _ in sizes(adapted("a pattern begins at a dot", tmp_path)).values()} == {2, 4}


def test_layers_narrow_suffixes_and_leave_whole_names_alone(tmp_path: Path) -> None:
    assert set(adapted("layers beside a whole name", tmp_path).layout.sites) == {
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.v_proj",
    }
