"""A merged model as a directory: transformers and Lorica read it with equal logits, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorica.adapters.save_merged import save_merged
from lorica.core.errors import MethodError, StorageError
from lorica.engine.host import Host
from lorica.models import load
from lorica.models.factory import example_inputs
from tests.contract.cases import perturb, small
from tests.tiny import tiny

CLASSES: dict[str, Any] = {
    "bert": transformers.AutoModelForMaskedLM,
    "vit": transformers.AutoModelForImageClassification,
}


def merged_host(family: str, dtype: torch.dtype = torch.float32, method: str = "lora") -> Host:
    host = Host(tiny(family, dtype=dtype))
    perturb(host.add("a", small(method)))
    host.activate("a")
    host.merge()
    return host


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3-moe", "gemma", "gpt2", "bert", "vit"])
def test_transformers_and_lorica_read_a_merged_model_with_the_same_logits(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    host = merged_host(family, dtype)
    given = example_inputs(host.backbone)
    y = host(**given).logits
    path = save_merged(host.backbone, tmp_path / "merged")
    assert path == tmp_path / "merged"
    again = load(str(path))
    assert again.dtype == dtype
    assert torch.equal(again.module(**given).logits, y)
    assert again.fingerprint() == host.backbone.fingerprint()
    cls = CLASSES.get(family, transformers.AutoModelForCausalLM)
    theirs = cls.from_pretrained(path).eval()
    assert theirs.dtype == dtype
    assert torch.equal(theirs(**given).logits, y)
    assert [p.name for p in tmp_path.iterdir()] == ["merged"], "nothing is left beside it"


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    path = save_merged(merged_host("qwen3").backbone, tmp_path / "merged")
    again = load(str(path)).module
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert json.loads((path / "config.json").read_text())["tie_word_embeddings"] is True


def test_the_tokenizer_and_its_chat_template_come_along(tmp_path: Path) -> None:
    base = load("nano")
    again = load(str(save_merged(base, tmp_path / "nano")))
    assert again.tokenizer is not None and base.tokenizer is not None
    messages = [{"role": "user", "content": "Wake me at seven, please."}]
    assert again.tokenizer.apply_chat_template(messages) == base.tokenizer.apply_chat_template(messages)
    assert again.module.generation_config.eos_token_id == base.module.generation_config.eos_token_id


def test_hooks_and_adapters_leave_no_trace_in_the_files(tmp_path: Path) -> None:
    host = merged_host("llama", method="dora")
    first = contents(save_merged(host.backbone, tmp_path / "one"))
    second = contents(save_merged(load(str(tmp_path / "one")), tmp_path / "two"))
    assert first.keys() == second.keys()
    assert first["model.safetensors"] == second["model.safetensors"]


def test_an_earlier_model_is_replaced_and_left_alone_when_saving_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_merged(tiny("llama"), tmp_path / "model")
    before = contents(path)
    save_merged(tiny("llama", seed=1), path)
    after = contents(path)
    assert after["model.safetensors"] != before["model.safetensors"]

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    other = tiny("llama", seed=2)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="Cannot write .*model: No space left on device"):
        save_merged(other, path)
    assert contents(path) == after
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(sys.platform != "linux", reason="a file size limit stands for a full disk, and only Linux tells so")
def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path) -> None:
    import resource
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    base = tiny("llama")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageError, match="Cannot write") as caught:
            save_merged(base, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "Free some space" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_other_files_and_a_file_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"holds 'notes.txt', which is no part of a model"):
        save_merged(tiny("llama"), tmp_path)
    with pytest.raises(StorageError, match="is a file"):
        save_merged(tiny("llama"), tmp_path / "notes.txt")
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_plain_module_has_no_model_directory(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="'tiny-mlp' is no transformers model"):
        save_merged(tiny("mlp"), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_network_without_values_is_not_saved(tmp_path: Path) -> None:
    base = tiny("llama")
    base.module.to("meta")
    with pytest.raises(StorageError, match="meta device"):
        save_merged(base, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
