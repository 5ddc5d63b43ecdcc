"""Tensors and files that do not fit their settings or the backbone are refused in one sentence."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from lorica.core.errors import FormatError, LoricaError, MismatchError
from tests.parity.both import OLD_CHECKPOINTING, of_family, peft_model
from tests.parity.spoiled import LLAMA, WEIGHTS, Q, edit, refused

pytestmark = OLD_CHECKPOINTING

# -- tensors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: t.pop(f"{Q}.lora_A.weight"), FormatError, "lacks the tensors of 'model.layers.0.self_attn.q_proj'"),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), FormatError, "lacks the tensor 'model.layers.0.*lora_B.weight'"),
        (lambda t: t.update({f"{Q}.lora_C.weight": torch.ones(2)}), FormatError, "holds the tensor '.*lora_C.weight'"),
        (lambda t: t.update({"extra": torch.ones(2)}), FormatError, "holds the tensor 'extra', which its settings"),
        (
            lambda t: t.update({f"{Q.replace('q_proj', 'qq')}.lora_A.weight": torch.ones(4, 64)}),
            MismatchError,
            "adapts 'model.layers.0.self_attn.qq', which is no site",
        ),
        (
            lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(64, 3)}),
            MismatchError,
            r"'B' of site 'model.layers.0.self_attn.q_proj' with shape \[64, 3\]; .* need \[64, 4\]",
        ),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 65)}), MismatchError, r"shape \[4, 65\]"),
        (lambda t: t[f"{Q}.lora_A.weight"].fill_(torch.nan), FormatError, "holds NaN or infinity"),
        (lambda t: t.update({f"{Q}.lora_A.one.weight": torch.ones(4, 64)}), FormatError, "two values of one tensor"),
        (lambda t: t.clear(), FormatError, "lacks the tensors of"),
    ],
    ids=["A", "B", "C", "extra", "site", "rank", "width", "nan", "twice", "empty"],
)
def test_tensors_that_do_not_fit_are_refused(
    folder: Path, change: Callable[[dict[str, Tensor]], object], error: type[LoricaError], words: str
) -> None:
    edit(folder, change)
    refused(error, words, folder)


@pytest.mark.parametrize(
    ("config", "change", "error", "words"),
    [
        (
            peft.VeraConfig(r=8, target_modules=["q_proj"]),
            lambda t: t.pop("base_model.vera_A"),
            FormatError,
            "lacks 'base_model.vera_A', which save_projection promises",
        ),
        (
            peft.VeraConfig(r=8, target_modules=["q_proj"]),
            lambda t: t.update({"base_model.vera_B": torch.ones(3, 8)}),
            MismatchError,
            r"'B' of the whole adapter with shape \[3, 8\]",
        ),
        (
            peft.VeraConfig(r=8, target_modules=["q_proj"]),
            lambda t: t.pop(f"{Q}.vera_lambda_d"),
            FormatError,
            "lacks the tensors of 'model.layers.0.self_attn.q_proj'",
        ),
        (
            peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
            lambda t: t.update({f"{Q}.ia3_l": torch.ones(63, 1)}),
            MismatchError,
            r"shape \[63\]",
        ),
        (
            peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
            lambda t: t.update({"prompt_embeddings": torch.ones(5, 64)}),
            FormatError,
            "holds 5 virtual tokens, where its settings say 4",
        ),
        (
            peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
            lambda t: t.update({"prompt_embeddings": torch.ones(4, 64)}),
            MismatchError,
            r"shape \[4, 64\]; the 2 attention sites of 'tiny-llama' need \[4, 128\]",
        ),
    ],
    ids=["vera_A", "vera_B", "lambda", "ia3", "prompt", "prefix"],
)
def test_tensors_of_other_types_that_do_not_fit_are_refused(
    config: Any, change: Callable[[dict[str, Tensor]], object], error: type[LoricaError], words: str, tmp_path: Path
) -> None:
    peft_model(config, LLAMA).save_pretrained(str(tmp_path))
    edit(tmp_path, change)
    refused(error, words, tmp_path)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_pickle_is_not_opened(folder: Path) -> None:
    opened = folder / "opened"

    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (opened,)

    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Runs()))
    error = refused(FormatError, "adapter_model.bin is a pickle, which can run code", folder)
    assert "safe_serialization=True" in str(error.hint)
    assert not opened.exists()


def test_an_adapter_of_a_larger_or_another_model_is_refused(folder: Path) -> None:
    refused(FormatError, "lacks the tensors of 'model.layers.2", folder, of_family("llama", num_hidden_layers=3))
    refused(MismatchError, "no site of 'tiny-gpt2'", folder, of_family("gpt2"))
    refused(MismatchError, r"shape \[4, 64\]", folder, of_family("llama", hidden_size=32))
