"""What PEFT's folders hold beside the adapter: biases, whole modules, frozen copies, tied tables, heads of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from lorica.core.errors import MergeError, MismatchError
from lorica.engine.host import Host
from lorica.models import Backbone, wrap
from lorica.models.factory import _fill
from tests.parity.both import (
    CONV1D,
    EMBEDDINGS_SAVED,
    ODD_NORM,
    OLD_CHECKPOINTING,
    SHARDS,
    TIED,
    Make,
    close,
    from_peft,
    loaded,
    lora,
    of_family,
    peft_model,
    reads,
    run,
)

pytestmark = [OLD_CHECKPOINTING, CONV1D, TIED, EMBEDDINGS_SAVED, SHARDS, ODD_NORM]

ANY = {"task_type": None}
TIE = {"ensure_weight_tying": True}
BESIDE: dict[str, tuple[str, Any]] = {
    "every bias, GPT-2": ("gpt2", lora("c_attn", bias="all")),
    "every bias, BERT with its tied output bias": ("bert", lora("query", bias="all", **ANY)),
    "every bias, ViT with a convolution": ("vit", lora("q_proj", "projection", bias="all", **ANY)),
    "every bias of a base without any": ("llama", lora("q_proj", bias="all")),
    "biases of adapted layers": ("gpt2", lora("c_attn", "mlp.c_proj", bias="lora_only")),
    "biases twice": ("gpt2", lora("c_attn", bias="all", lora_bias=True, use_rslora=True)),
    "every bias beside DoRA at a head that has none": ("gpt2", lora("lm_head", use_dora=True, bias="all")),
    "biases of some layers beside an embedding": ("gpt2", lora("wte", "c_attn", bias="lora_only")),
    "the head": ("llama", lora("q_proj", modules_to_save=["lm_head"])),
    "the embedding": ("llama", lora("q_proj", modules_to_save=["embed_tokens"])),
    "norms": ("llama", lora("q_proj", modules_to_save=["model.norm", "input_layernorm"])),
    "norms with a bias": ("gpt2", lora("c_attn", modules_to_save=["ln_f", "ln_1"])),
    "whole blocks": ("llama", lora("q_proj", modules_to_save=["mlp"])),
    "a block of Conv1D layers": ("gpt2", lora("c_attn", modules_to_save=["h.1.mlp"])),
    "a convolution with a bias": ("vit", lora("q_proj", modules_to_save=["projection", "classifier"], **ANY)),
    "the head, DoRA": ("llama", lora("q_proj", modules_to_save=["lm_head"], use_dora=True)),
    "a module inside a target": ("llama", lora(target_modules="all-linear", modules_to_save=["layers.0.mlp"])),
    "a tied embedding, which peft unties": ("qwen3", lora("q_proj", modules_to_save=["embed_tokens"])),
    "a tied head, which peft unties": ("qwen3", lora("q_proj", modules_to_save=["lm_head"])),
    "a tied embedding": ("qwen3", lora("q_proj", modules_to_save=["embed_tokens"], **TIE)),
    "a tied head": ("gemma", lora("q_proj", modules_to_save=["lm_head"], **TIE)),
    "factors of a tied embedding, which peft unties": ("qwen3", lora("embed_tokens")),
    "factors of a tied head, which peft unties": ("qwen3", lora("lm_head")),
    "factors of a tied embedding": ("qwen3", lora("embed_tokens", **TIE)),
    "factors of both, tied": ("gemma", lora("lm_head", "embed_tokens", **TIE)),
    "factors of both, separate": ("qwen3", lora("lm_head", "embed_tokens")),
    "factors of both, DoRA": ("qwen3", lora("lm_head", "embed_tokens", use_dora=True)),
    "the head beside VeRA": (
        "llama",
        peft.VeraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=["lm_head", "norm"]),
    ),
    "biases beside VeRA elsewhere": ("gpt2", peft.VeraConfig(r=8, target_modules=["lm_head"], bias="all")),
    "the head beside IA3": (
        "llama",
        peft.IA3Config(
            target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM", modules_to_save=["lm_head"]
        ),
    ),
    "the head and a norm beside norms": (
        "gpt2",
        peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["ln_1"], modules_to_save=["ln_f", "h.0.mlp.c_proj"]),
    ),
}


@pytest.mark.parametrize("row", BESIDE)
def test_what_a_folder_holds_beside_the_adapter_is_read_too(row: str, tmp_path: Path) -> None:
    family, config = BESIDE[row]
    from_peft(config, of_family(family), tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_frozen_embeddings_in_the_file_add_nothing(family: str, target: str, tmp_path: Path) -> None:
    make = of_family(family)
    model = peft_model(lora(target), make)
    model.save_pretrained(str(tmp_path), save_embedding_layers=True)
    adapter = reads(tmp_path, make, run(model, make()).detach())
    assert {site.rpartition(".")[2] for site in adapter.layout.sites} == {target}


def test_an_embedding_of_another_vocabulary_is_refused_by_its_shape(tmp_path: Path) -> None:
    module = of_family("llama")().module
    module.resize_token_embeddings(131, mean_resizing=False)  # type: ignore[operator]
    model = peft.get_peft_model(module, lora("q_proj"))
    model.save_pretrained(str(tmp_path), save_embedding_layers=True)
    with pytest.raises(MismatchError, match=r"with shape \[131, 64\], where 'tiny-llama' has \[128, 64\]") as caught:
        loaded(tmp_path, of_family("llama"))
    assert "vocabulary was resized" in str(caught.value.hint)


def test_a_tie_is_kept_by_both_sites_and_cannot_be_merged_into_one(tmp_path: Path) -> None:
    """PEFT merges into the tied table what was trained for one use of it (see its issue 2018)."""
    family, config = BESIDE["a tied embedding, which peft unties"]
    from_peft(config, of_family(family), tmp_path)
    host = loaded(tmp_path, of_family(family))
    with pytest.raises(MergeError, match="tied"):
        host.merge()


# -- heads of tasks: PEFT saves a new classifier by itself -------------------------------------------------------------

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_labels": 3,
    "pad_token_id": 0,
}


def task(model: str, config: str, **fields: Any) -> Make:
    def make() -> Backbone:
        module = getattr(transformers, model)(getattr(transformers, config)(**{**SMALL, **fields}))
        _fill(module, torch.Generator().manual_seed(0))
        return wrap(module.float(), name=model)

    return make


BERT = task("BertForSequenceClassification", "BertConfig")
TAGS = task("BertForTokenClassification", "BertConfig")
LLAMA = task("LlamaForSequenceClassification", "LlamaConfig")
HEADS: dict[str, tuple[Make, Any]] = {
    "LoRA, BERT": (BERT, lora("query", task_type="SEQ_CLS")),
    "LoRA with every bias, BERT": (BERT, lora("query", task_type="SEQ_CLS", bias="all")),
    "LoRA, Llama": (LLAMA, lora("q_proj", task_type="SEQ_CLS")),
    "IA3, tags": (TAGS, peft.IA3Config(task_type="TOKEN_CLS")),
    "VeRA, tags": (TAGS, peft.VeraConfig(r=4, task_type="TOKEN_CLS", target_modules=["query", "dense"])),
    "norms, tags": (TAGS, peft.LNTuningConfig(task_type="TOKEN_CLS", target_modules=["LayerNorm"])),
    "prompt, BERT": (BERT, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)),
    "prompt, Llama": (LLAMA, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)),
}


@pytest.mark.parametrize("row", HEADS)
def test_a_classifier_trained_beside_the_adapter_comes_with_it(row: str, tmp_path: Path) -> None:
    make, config = HEADS[row]
    adapter = from_peft(config, make, tmp_path)
    head = "score" if make is LLAMA else "classifier"
    assert adapter.layout.methods[head].name == "delta"


def test_biases_beside_fused_experts_are_read_too(tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    config = lora("q_proj", target_parameters=["experts.down_proj"], bias="lora_only")
    from_peft(config, task("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **sizes), tmp_path)


def test_a_classifier_merges_with_the_adapter(tmp_path: Path) -> None:
    make, config = HEADS["LoRA with every bias, BERT"]
    model = peft_model(config, make)
    model.save_pretrained(str(tmp_path))
    host: Host = loaded(tmp_path, make)
    host.merge()
    close(run(host, host.backbone), run(model, host.backbone))
