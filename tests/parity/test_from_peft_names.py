"""Names in PEFT's folders: of adapters, of the task model around the trunk, of experts before they were fused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorica.core.errors import FormatError
from lorica.methods import all_methods, make_method
from lorica.models import Backbone, wrap
from lorica.models.factory import make_tiny
from tests.parity.both import (
    OLD_CHECKPOINTING,
    UNMATCHED,
    Make,
    close,
    contents,
    differ,
    loaded,
    lora,
    moved,
    of_family,
    ours,
    peft_model,
    reads,
    run,
)
from tests.parity.spoiled import CONFIG, WEIGHTS

pytestmark = [OLD_CHECKPOINTING, UNMATCHED]

LLAMA = of_family("llama")


def saved(config: Any, make: Make, folder: Path) -> Tensor:
    """A PEFT folder, and its logits."""
    model = peft_model(config, make)
    model.save_pretrained(str(folder))
    return run(model, make()).detach()


def renamed(folder: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({change(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)


# -- the adapter's name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q_proj", "lora_A", "weight", "model"])
def test_an_adapter_with_a_name_is_in_a_sub_folder_whatever_the_name(name: str, tmp_path: Path) -> None:
    base = LLAMA()
    torch.manual_seed(3)
    model = moved(peft.get_peft_model(base.module, lora("q_proj", "v_proj"), adapter_name=name).eval())
    model.save_pretrained(str(tmp_path))
    assert not (tmp_path / CONFIG).exists()
    reads(tmp_path / name, LLAMA, run(model, base).detach())
    with pytest.raises(FormatError, match=CONFIG) as caught:
        loaded(tmp_path, LLAMA)
    assert name in str(caught.value.hint)


def test_several_adapters_of_one_model_are_folders_of_their_own(tmp_path: Path) -> None:
    model = peft_model(lora("q_proj"), LLAMA)
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["up_proj"], use_dora=True))
    model.set_adapter("second")
    moved(model)
    model.save_pretrained(str(tmp_path))
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        model.set_adapter(name)
        host = loaded(folder, LLAMA)
        close(differ(host), run(model, host.backbone))


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
        lambda key: key.replace(".lora_A.", ".lora_A.my.dotted.name.").replace(".lora_B.", ".lora_B.my.dotted.name."),
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.removeprefix("base_model."),
        lambda key: key.replace("base_model.model.model.", "base_model.model."),
        lambda key: key.replace("base_model.model.model.", ""),
        lambda key: key.replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight"),
    ],
    ids=["name", "dots", "no-prefix", "half", "trunk", "bare", "magnitude"],
)
def test_names_of_hand_made_and_older_files_are_understood(change: Callable[[str], str], tmp_path: Path) -> None:
    y = saved(lora("q_proj", "v_proj", use_dora=True), LLAMA, tmp_path)
    renamed(tmp_path, change)
    host = loaded(tmp_path, LLAMA)
    close(differ(host), y)


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    saved(lora("q_proj"), LLAMA, tmp_path)
    renamed(tmp_path, lambda key: key.replace("lora_A.", "lora_A.one.").replace("lora_B.", "lora_B.two."))
    with pytest.raises(FormatError, match="several adapters: one, two; one is right"):
        loaded(tmp_path, LLAMA)


def test_other_files_of_pefts_folder_survive_our_save(tmp_path: Path) -> None:
    saved(lora("q_proj"), LLAMA, tmp_path)
    (tmp_path / "README.md").write_text("a card")
    loaded(tmp_path, LLAMA).save(tmp_path)
    assert contents(tmp_path)["README.md"] == b"a card"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_file_of_another_precision_is_read_without_rounding(dtype: torch.dtype, tmp_path: Path) -> None:
    saved(lora("q_proj", modules_to_save=["norm"]), LLAMA, tmp_path)
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    adapter = loaded(tmp_path, LLAMA).adapter()
    site = "model.layers.1.self_attn.q_proj"
    assert adapter.flat.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(adapter.values(site)["A"].to(dtype), tensors[f"base_model.model.{site}.lora_A.weight"])


# -- the trunk and the model around it ---------------------------------------------------------------------------------


def trunk() -> Backbone:
    """The Llama trunk with the weights that it has inside `LlamaForCausalLM`."""
    whole = make_tiny("llama").module
    inner = transformers.LlamaModel(whole.config)
    inner.load_state_dict(whole.model.state_dict())  # type: ignore[operator, union-attr]
    return wrap(inner)


PATTERNS = {
    "exclude_modules": r"layers\.0\..*v_proj",
    "rank_pattern": {r"^layers\.0\.self_attn\.q_proj": 2},
    "alpha_pattern": {r"^layers\.1\.self_attn\.q_proj": 17},
}


@pytest.mark.parametrize("fields", [{}, PATTERNS], ids=["plain", "patterns"])
@torch.no_grad()
def test_an_adapter_of_the_trunk_acts_in_the_whole_model(fields: dict[str, Any], tmp_path: Path) -> None:
    model = peft_model(lora("q_proj", "v_proj", task_type="FEATURE_EXTRACTION", **fields), trunk)
    model.save_pretrained(str(tmp_path))
    host = loaded(tmp_path, LLAMA)
    differ(host)
    ids = torch.tensor([[5, 9, 20, 7]])
    close(host.model.model(input_ids=ids)[0], model(input_ids=ids)[0])  # type: ignore[operator, union-attr]
    host.detach()
    close(differ(loaded(tmp_path, trunk)), run(model, trunk()))


@torch.no_grad()
def test_an_adapter_of_the_whole_model_acts_in_the_trunk(tmp_path: Path) -> None:
    fields = {"rank_pattern": {r"^model\.layers\.0\..*": 2}, "alpha_pattern": {r"^model\.layers\.1\..*": 17}}
    model = peft_model(lora("q_proj", "v_proj", **fields), LLAMA)
    model.save_pretrained(str(tmp_path))
    host = loaded(tmp_path, trunk)
    theirs = model.base_model.model.model(input_ids=torch.tensor([[5, 9, 20, 7]]))[0]
    close(host.model(input_ids=torch.tensor([[5, 9, 20, 7]]))[0], theirs)


@pytest.mark.parametrize("method", [name for name, cls in all_methods().items() if cls.peft is not None])
def test_our_own_folder_without_our_record_is_pefts_folder(method: str, tmp_path: Path) -> None:
    host = ours(LLAMA(), make_method(method))
    folder = host.save(tmp_path)
    (folder / "lorica.json").unlink()
    y = differ(host)
    close(differ(loaded(folder, LLAMA)), y)
