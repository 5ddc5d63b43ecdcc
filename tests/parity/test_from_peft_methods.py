"""PEFT to ours: folders of the types beside LoRA: VeRA, IA³, GLoRA, MiSS, norm, prompt and prefix tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import GloraConfig, IA3Config, LNTuningConfig, MissConfig, PrefixTuningConfig, PromptTuningConfig, VeraConfig
from safetensors.torch import load_file, save_file

from lorica.core.errors import FormatError, MethodError, MismatchError
from lorica.methods.glora import GLoRA
from lorica.methods.vera import VeRA
from tests.parity.both import (
    CONV1D,
    EMBEDDINGS_SAVED,
    ODD_NORM,
    OLD_CACHE,
    OLD_CHECKPOINTING,
    REGENERATED,
    close,
    differ,
    from_peft,
    loaded,
    of_family,
    peft_model,
    run,
)

pytestmark = [OLD_CHECKPOINTING, OLD_CACHE, CONV1D, ODD_NORM, EMBEDDINGS_SAVED, REGENERATED]

LM = "CAUSAL_LM"


def vera(*targets: str, **fields: Any) -> VeraConfig:
    return VeraConfig(**{"r": 8, "task_type": LM, "target_modules": list(targets), **fields})


def ia3(targets: Any = None, inner: Any = None, **fields: Any) -> IA3Config:
    return IA3Config(**{"task_type": LM, "target_modules": targets, "feedforward_modules": inner, **fields})


def miss(*targets: str, **fields: Any) -> MissConfig:
    return MissConfig(**{"r": 8, "task_type": LM, "target_modules": list(targets), **fields})


def glora(*targets: str, **fields: Any) -> GloraConfig:
    return GloraConfig(**{"r": 3, "task_type": LM, "target_modules": list(targets), **fields})


def norms(*targets: str, **fields: Any) -> LNTuningConfig:
    return LNTuningConfig(**{"task_type": LM, "target_modules": list(targets) or None, **fields})


def prompt(kind: Any = PromptTuningConfig, **fields: Any) -> Any:
    return kind(**{"task_type": LM, "num_virtual_tokens": 5, **fields})


DOWN = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
WEIGHTS: dict[str, tuple[str, Any]] = {
    "VeRA": ("llama", vera("q_proj", "k_proj", "up_proj")),
    "VeRA, all-linear": ("llama", vera(target_modules="all-linear")),
    "VeRA, Conv1D": ("gpt2", vera("c_attn", "c_fc", fan_in_fan_out=True)),
    "VeRA, BERT": ("bert", vera("query", "dense", task_type=None)),
    "VeRA in one layer": ("llama", vera("q_proj", layers_to_transform=[1])),
    "VeRA with dropout and a start of its own": ("llama", vera("q_proj", vera_dropout=0.3, d_initial=0.5)),
    "IA3, defaults": ("llama", ia3()),
    "IA3, defaults of GPT-2": ("gpt2", ia3()),
    "IA3, names": ("llama", ia3(["k_proj", "v_proj", "down_proj"], ["down_proj"])),
    "IA3, a scale of one layer's input": ("llama", ia3([*DOWN, "v_proj"], [DOWN[1]])),
    "IA3, patterns": ("llama", ia3(r".*\.(k_proj|up_proj|down_proj)", r".*layers\.0.*\.down_proj")),
    "IA3, Conv1D": ("gpt2", ia3(["c_attn", "mlp.c_proj"], ["mlp.c_proj"], fan_in_fan_out=True)),
    "IA3, an exclusion": ("llama", ia3(["k_proj"], [], exclude_modules=["layers.0.self_attn.k_proj"])),
    "IA3, BERT": ("bert", ia3(["key", "value", "output.dense"], ["output.dense"], task_type=None)),
    "IA3, Conv2d": ("conv", ia3(["5", "7"], ["7"], task_type=None)),
    "IA3, a grouped Conv2d": ("conv", ia3(["5", "7"], [], task_type=None)),
    "MiSS": ("llama", miss("q_proj", "down_proj")),
    "MiSS, blocks that do not fill the input": ("llama", miss("q_proj", "down_proj", r=5)),
    "MiSS, random start": ("llama", miss("q_proj", init_weights=False, miss_dropout=0.2)),
    "MiSS mini": ("llama", miss("k_proj", "down_proj", init_weights="mini", mini_r=4)),
    "MiSS bat": ("llama", miss("q_proj", "down_proj", init_weights="bat", miss_dropout=0.2)),
    "MiSS, BERT": ("bert", miss("query", "dense", task_type=None)),
    "GLoRA, defaults where nothing has a bias": ("llama", glora("q_proj", "down_proj")),
    "GLoRA, defaults": ("bert", glora("query", "dense", task_type=None)),
    "GLoRA, a head without a bias beside layers with one": ("bert", glora("key", "decoder", task_type=None)),
    "GLoRA, vectors": (
        "bert",
        glora("query", config_A_B="vector", config_C="vector", config_D_E="vector", task_type=None),
    ),
    "GLoRA, constants": (
        "bert",
        glora("dense", config_A_B="constant", config_C="none", config_D_E="constant", task_type=None),
    ),
    "GLoRA, biases alone": ("bert", glora("value", config_A_B="none", config_D_E="none", task_type=None)),
    "GLoRA, weights alone": ("vit", glora("q_proj", config_C="none", config_D_E="none", task_type=None)),
    "GLoRA, all-linear": ("llama", glora(target_modules="all-linear", config_A_B="vector", r=64)),
    "GLoRA, random start": ("llama", glora("q_proj", init_weights=False)),
    "norms, defaults": ("llama", norms()),
    "norms, Qwen3": ("qwen3", norms("q_norm", "norm")),
    "norms, names": ("llama", norms("input_layernorm", "model.norm")),
    "norms, GPT-2": ("gpt2", norms("ln_1", "ln_f")),
    "norms, 1 + w": ("gemma", norms("input_layernorm", "norm")),
    "norms, BERT": ("bert", norms("LayerNorm", task_type=None)),
    "norms, GroupNorm": ("conv", norms("1", task_type=None)),
    "a linear called a norm": ("llama", norms("norm", "q_proj")),
    "a square Conv1D called a norm": ("gpt2", norms("attn.c_proj")),
    "an embedding called a norm": ("llama", norms("embed_tokens")),
    "a convolution called a norm": ("conv", norms("0", "7", task_type=None)),
}
INPUTS: dict[str, tuple[str, Any]] = {
    **{f"prompt, {family}": (family, prompt()) for family in ("llama", "gpt2", "gemma", "qwen3", "qwen3-moe")},
    "prompt, sampled": ("llama", prompt(prompt_tuning_init="SAMPLE_VOCAB")),
    **{f"prefix, {f}": (f, prompt(PrefixTuningConfig)) for f in ("llama", "gpt2", "gemma", "qwen3", "qwen3-moe")},
    "prefix, projected": ("llama", prompt(PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=16)),
}
EVERY = {**WEIGHTS, **INPUTS}


@pytest.mark.parametrize("row", EVERY)
def test_a_folder_of_peft_gives_the_same_logits(row: str, tmp_path: Path) -> None:
    family, config = EVERY[row]
    from_peft(config, of_family(family), tmp_path)


BOTH, THREE = ("lora", "vector", "constant", "none"), ("vector", "constant", "none")


@pytest.mark.parametrize("both", BOTH)
@pytest.mark.parametrize("C", ["lora", "vector", "none"])
@pytest.mark.parametrize("bias", THREE)
def test_every_choice_that_peft_has_of_glora_is_ours(both: str, C: str, bias: str, tmp_path: Path) -> None:
    fields = {"config_A_B": both, "config_C": C, "config_D_E": bias, "task_type": None}
    if {both, C, bias} == {"none"}:
        peft_model(glora("query", **fields), of_family("bert")).save_pretrained(str(tmp_path))
        with pytest.raises(MethodError, match="trains nothing"):
            loaded(tmp_path, of_family("bert"))
        return
    adapter = from_peft(glora("query", **fields), of_family("bert"), tmp_path)
    assert isinstance(adapter.method, GLoRA)
    assert adapter.method.choice == ",".join((both, both, C, bias, bias))


@pytest.mark.parametrize("key", [0, 7])
def test_projections_that_peft_did_not_save_are_drawn_again_bit_for_bit(key: int, tmp_path: Path) -> None:
    config = vera("q_proj", "k_proj", "up_proj", save_projection=False, projection_prng_key=key)
    adapter = from_peft(config, of_family("llama"), tmp_path)
    kept = peft_model(vera("q_proj", "k_proj", "up_proj", projection_prng_key=key), of_family("llama"))
    for name in ("A", "B"):
        theirs = getattr(kept.base_model, f"vera_{name}")["default"]
        assert torch.equal(adapter.values("")[name], theirs)
    assert isinstance(adapter.method, VeRA) and adapter.method.projection_key == key


def test_a_glora_folder_that_was_spoiled_is_refused(tmp_path: Path) -> None:
    make = of_family("llama")
    peft_model(glora("q_proj", "v_proj", config_A_B="vector"), make).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    good = load_file(file)
    q = "base_model.model.model.layers.0.self_attn.q_proj.glora_"
    spoiled: list[tuple[dict[str, torch.Tensor], type[Exception], str]] = [
        ({**good, f"{q}C.zeros": good[f"{q}C.zeros"] + 1}, FormatError, r"zero in 'model.*glora_C\.zeros'"),
        (
            {**good, f"{q}A.Xd": good[f"{q}A.X"].clone()},
            FormatError,
            r"glora_A\.Xd', which its settings and the backbone",
        ),
        ({**good, f"{q}A.X": good[f"{q}A.X"][:5]}, MismatchError, r"holds 'A' of site .* with shape \[5\]"),
        ({k: v for k, v in good.items() if k != f"{q}B.X"}, FormatError, r"lacks the tensor 'model.*glora_B\.X'"),
        ({k: v for k, v in good.items() if q not in k}, FormatError, "lacks the tensors of .*, which its settings"),
        ({f"base_model.model.nowhere.{q[-6:]}A.X": good[f"{q}A.X"]}, MismatchError, "'nowhere', which is no linear"),
    ]
    for tensors, error, words in spoiled:
        save_file(tensors, file)
        with pytest.raises(error, match=words):
            loaded(tmp_path, make)


def test_projections_in_the_file_win_over_those_of_the_key(tmp_path: Path) -> None:
    make = of_family("llama")
    model = peft_model(vera("q_proj"), make)
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.vera_A"] = tensors["base_model.vera_A"] * 1.5
    save_file(tensors, file)
    for name, value in model.named_buffers():
        if "vera_A" in name:
            value.mul_(1.5)
    host = loaded(tmp_path, make)
    close(differ(host), run(model, host.backbone))


def test_norms_of_a_half_precision_base_keep_its_dtype_in_pefts_file(tmp_path: Path) -> None:
    make = of_family("llama", dtype=torch.bfloat16)
    model = peft_model(norms(), make)
    model.save_pretrained(str(tmp_path))
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}
    host = loaded(tmp_path, make)
    assert host.adapter("theirs").flat.dtype == torch.float32
    close(differ(host).float(), run(model, host.backbone).float(), 3e-2)


@pytest.mark.parametrize("row", ["prompt, llama", "prefix, llama", "prefix, gpt2"])
def test_padded_rows_are_those_of_peft(row: str, tmp_path: Path) -> None:
    family, config = EVERY[row]
    model = peft_model(config, of_family(family))
    model.save_pretrained(str(tmp_path))
    host = loaded(tmp_path, of_family(family))
    ids = torch.tensor([[0, 0, 5, 9, 20], [30, 11, 6, 8, 7]])
    given = {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])}
    with torch.no_grad():
        found, theirs = host(**given).logits, model(**given).logits[:, -5:]
    close(found[0, 2:], theirs[0, 2:])
    close(found[1], theirs[1])


@pytest.mark.parametrize("row", ["prompt, llama", "prompt, gpt2", "prefix, llama", "prefix, gpt2"])
@torch.no_grad()
def test_generating_is_taking_pefts_likeliest_token_again_and_again(row: str, tmp_path: Path) -> None:
    """PEFT's own `generate` is not: with transformers 5.24 it loses positions of virtual tokens behind the first."""
    family, config = EVERY[row]
    model = peft_model(config, of_family(family))
    model.save_pretrained(str(tmp_path))
    host = loaded(tmp_path, of_family(family))
    start = ids = torch.tensor([[5, 9, 20, 7]])
    for _ in range(4):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1)[None]], dim=1)
    found = host.model.generate(input_ids=start, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert found.tolist() == ids.tolist()
