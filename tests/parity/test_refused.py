"""Settings and types that cannot be read without changing what they compute are refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

from lorica.adapters.peft_settings import ANY, PEFT_TYPES, READ, WHY
from lorica.core.errors import FormatError, MethodError, MismatchError
from lorica.methods import all_methods
from lorica.models import Backbone, wrap
from tests.parity.both import (
    CONV1D,
    EMBEDDINGS_SAVED,
    GROUPS,
    OLD_CHECKPOINTING,
    loaded,
    lora,
    of_family,
    peft_model,
)
from tests.parity.spoiled import CONFIG, LLAMA, configure, refused

pytestmark = [OLD_CHECKPOINTING, CONV1D, GROUPS, EMBEDDINGS_SAVED]

# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"alora_invocation_tokens": [1, 2]}, "'alora_invocation_tokens': the adapter acts only behind certain tokens"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "'layer_replication': layers of the base are repeated"),
        ({"trainable_token_indices": [3]}, "'trainable_token_indices': rows of the embedding are replaced"),
        ({"trainable_token_indices": {"embed_tokens": [3]}}, "'trainable_token_indices'"),
        ({"kasa_config": {"beta": 1e-4}}, "'kasa_config': the base weights are truncated by an SVD"),
        ({"velora_config": {"num_groups": 2}}, "'velora_config': the input is compressed"),
        ({"monteclora_config": {"num_samples": 4}}, "'monteclora_config': the factors are sampled"),
        ({"arrow_config": {"top_k": 2}}, "'arrow_config': a router mixes several adapters"),
        ({"use_bdlora": {"nblocks": 2}}, "'use_bdlora': its factors are block-diagonal"),
        ({"use_qalora": True}, "'use_qalora': the input is pooled"),
        ({"init_lora_weights": "loftq"}, "'loftq': its tensors fit a base whose weights were changed"),
        ({"init_lora_weights": "corda"}, "'corda': its tensors fit a base whose weights were changed"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga': its tensors fit a base whose weights were changed"),
        ({"init_lora_weights": "olora"}, "'olora': its tensors fit a base whose weights were changed"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4': its tensors fit a base"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "'pissa' with DoRA or a bias"),
        ({"megatron_config": {"a": 1}}, "'megatron_config', which Lorica does not know"),
        ({"lora_gamma": 2.0}, "'lora_gamma', which Lorica does not know and so cannot honour. Did you mean 'lora_"),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern '\(', which is no regular expression"),
        ({"target_modules": "["}, r"target_modules '\[', which is no regular expression"),
        ({"peft_type": "LROA"}, "peft_type 'LROA', which does not exist. Did you mean .*'LORA'"),
        ({"peft_type": None}, "names no peft_type"),
        ({"peft_type": "LORICA"}, "Lorica's own layout, and its lorica.json is missing"),
        ({"target_modules": 3}, "has 3 for 'target_modules'; a name or a list of names is right"),
        ({"exclude_modules": [4]}, r"has \[4\] for 'exclude_modules'; a name or a list"),
        ({"modules_to_save": "lm_head"}, "has 'lm_head' for 'modules_to_save'; a list of names is right"),
        ({"layers_to_transform": "0"}, "has '0' for 'layers_to_transform'; a number or a list of numbers is right"),
        ({"rank_pattern": [1]}, r"has \[1\] for 'rank_pattern'; an object of numbers is right"),
        ({"alpha_pattern": {"q_proj": "x"}}, "'alpha_pattern'; an object of numbers is right"),
        ({"r": "four"}, "has 'four' for 'r'; a number is right"),
        ({"r": 5}, "has rank 4 at .*, where its settings say 5"),
        ({"alpha_pattern": {".*": 2, "q_proj": 3}}, r"'model.layers.0.self_attn.q_proj' several alphas .*\(2 and 3\)"),
        ({"rank_pattern": {"q_proj": 2}}, "has rank 4 at 'model.layers.0.self_attn.q_proj', where its settings say 2"),
        ({"target_modules": ["q_proj", "v_proj", "up_proj"]}, "lacks the tensors of 'model.layers.0.mlp.up_proj'"),
        ({"use_dora": True}, "lacks the tensor 'model.layers.0.self_attn.q_proj.lora_magnitude_vector'"),
        ({"lora_bias": True}, "lacks the tensor 'model.layers.0.self_attn.q_proj.lora_B.bias'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_setting_that_cannot_be_honoured_is_refused(folder: Path, fields: dict[str, Any], words: str) -> None:
    configure(folder, **fields)
    refused(FormatError, words, folder)


def test_a_setting_that_is_switched_off_is_no_obstacle(folder: Path) -> None:
    configure(folder, use_qalora=False, arrow_config=None, layer_replication=[], from_the_future=None, also={})
    assert loaded(folder, LLAMA).active == ("theirs",)


OTHERS = sorted(PEFT_TYPES - {cls.peft.peft_type for cls in all_methods().values() if cls.peft is not None})


@pytest.mark.parametrize("kind", OTHERS)
def test_other_types_of_peft_are_refused_by_name(folder: Path, kind: str) -> None:
    configure(folder, peft_type=kind)
    error = refused(MethodError, f"{CONFIG} holds a {kind} adapter; of PEFT's types Lorica reads .*IA3, .*LORA", folder)
    assert error.code == "method"


def test_the_list_of_types_is_that_of_the_wheel() -> None:
    assert {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} == PEFT_TYPES


@pytest.mark.parametrize("kind", [cls.peft.peft_type for cls in all_methods().values() if cls.peft is not None])
def test_every_setting_of_a_type_that_we_read_is_understood_or_refused_by_name(folder: Path, kind: str) -> None:
    """Nothing that PEFT can set passes unseen: with any other value it is read, without effect, or an error."""
    known = ANY | READ[kind] | WHY.keys()
    fields = PEFT_TYPE_TO_CONFIG_MAPPING[kind].__dataclass_fields__
    for field in fields.keys() - known:
        configure(folder, peft_type=kind, **{field: "anything"})
        refused(FormatError, f"sets {field!r}, which Lorica does not know", folder)
        configure(folder, **{field: None})


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("gpt2", lora("c_attn", use_dora=True, bias="lora_only"), "replaces the bias of .*c_attn' beside dora"),
        ("gpt2", peft.VeraConfig(target_modules=["c_attn"], bias="vera_only", r=4), "replaces the bias .* beside vera"),
        ("bert", peft.GloraConfig(target_modules=["query"], bias="glora_only"), "replaces the bias .* beside glora"),
        ("llama", lora("q_proj", trainable_token_indices=[3, 4]), "'trainable_token_indices'"),
        ("llama", peft.LoHaConfig(target_modules=["q_proj"]), "holds a LOHA adapter"),
        ("llama", peft.TrainableTokensConfig(token_indices=[3], target_modules=["embed_tokens"]), "TRAINABLE_TOKENS"),
        ("qwen3-moe", lora("q_proj", modules_to_save=["experts"]), "experts.*, which is no site that Lorica can adapt"),
        ("conv", lora("5", task_type=None), "adapts '5', whose dilation and padding mode PEFT drops"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # defect 10: rewritten
def test_a_folder_of_the_wheel_that_we_cannot_compute_is_refused(
    family: str, config: Any, words: str, tmp_path: Path
) -> None:
    make = of_family(family)
    peft_model(config, make).save_pretrained(str(tmp_path))
    with pytest.raises((FormatError, MethodError, MismatchError), match=words) as caught:
        loaded(tmp_path, make)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


class Attends(nn.Module):
    """A module around torch's own attention, whose insides are no sites."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mha(x, x, x)[0]
        return y


def test_torchs_attention_and_groups_that_see_each_other_are_refused(tmp_path: Path) -> None:
    def attends() -> Backbone:
        return wrap(Attends())

    def grouped() -> Backbone:
        torch.manual_seed(0)
        return wrap(nn.Sequential(nn.Conv1d(4, 8, 3, groups=2)))

    peft_model(lora("mha", task_type=None), attends).save_pretrained(str(tmp_path / "mha"))
    refused(MismatchError, "adapts 'mha.*', which is no site of 'custom'", tmp_path / "mha", attends)
    peft_model(lora("0", task_type=None), grouped).save_pretrained(str(tmp_path / "conv"))
    refused(MismatchError, "groups of the convolution '0' see each other's channels", tmp_path / "conv", grouped)


def test_a_prompt_for_an_encoder_and_a_decoder_is_refused(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft_model(config, LLAMA).save_pretrained(str(tmp_path))
    configure(tmp_path, num_transformer_submodules=2)
    refused(FormatError, "for an encoder-decoder", tmp_path)
