"""A quantised backbone: which weights are packed, what it says of itself, and its directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorica.core.errors import ConfigError, FormatError
from lorica.models import Backbone, load, tiny, wrap
from lorica.models.builtin import FAMILIES
from lorica.models.factory import example_inputs
from lorica.models.quantize.apply import quantize_backbone
from lorica.models.quantize.config import Quantization
from lorica.models.quantize.linear import QuantizedLinear
from lorica.models.saving import save_backbone

ALL = ["nf4", "nf3", "nf2", "nvfp4", "uniform8", "uniform4", "uniform3", "uniform2"]


def quantised(family: str, text: str = "nf4", dtype: torch.dtype = torch.float32) -> Backbone:
    config = Quantization.of(text)
    assert config is not None
    return quantize_backbone(tiny(family, dtype=dtype), config)


def logits(base: Backbone) -> Tensor:
    with torch.no_grad():
        out: Any = base.module(**example_inputs(base))
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("family", list(FAMILIES))
def test_all_linear_weights_but_the_head_are_packed_and_nothing_else_changes(family: str) -> None:
    base, plain = quantised(family), tiny(family)
    assert base.sites == plain.sites and base.family == plain.family and base.name == plain.name
    for name, site in plain.sites.items():
        packed = base.weight(name).packed is not None if site.kind != "attention" else False
        assert packed == (site.kind == "linear" and not (site.head or site.router or site.tied)), name
        if site.kind != "attention" and not packed:
            assert torch.equal(base.weight(name).matrix(), plain.weight(name).matrix())
        bias = plain.bias(name)
        assert bias is None or torch.equal(bias, base.bias(name))  # type: ignore[arg-type]
    assert base.parameter_count() == plain.parameter_count()
    assert base.is_causal_lm == plain.is_causal_lm and base.head_site == plain.head_site
    assert not any(p.requires_grad for p in base.module.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "mlp"])
def test_row_norms_shapes_dtypes_and_devices_are_those_of_the_dequantised_matrix(family: str) -> None:
    base = quantised(family, dtype=torch.bfloat16)
    assert base.dtype == torch.bfloat16 and base.device == torch.device("cpu")
    for name, site in base.sites.items():
        weight = base.weight(name)
        if weight.packed is not None:
            matrix = weight.matrix()
            assert (weight.shape, weight.dtype, weight.device) == (site.shape, matrix.dtype, matrix.device)
            assert tuple(matrix.shape) == site.shape and matrix.dtype == torch.bfloat16
            torch.testing.assert_close(weight.row_square_norm(), matrix.float().square().sum(1))


def test_a_network_of_packed_weights_alone_still_has_a_dtype_and_a_device() -> None:
    root = wrap(nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 8, bias=False)).bfloat16())
    base = quantize_backbone(root, Quantization())
    assert base.dtype == torch.bfloat16 and base.device == torch.device("cpu")
    alone = quantize_backbone(wrap(nn.Linear(64, 32)), Quantization())
    assert isinstance(alone.module, QuantizedLinear) and list(alone.sites) == ["root"]


def test_a_module_that_stands_in_two_places_is_replaced_in_both() -> None:
    shared = nn.Linear(16, 16)
    base = quantize_backbone(wrap(nn.Sequential(shared, nn.Tanh(), shared)), Quantization())
    first, _, second = base.module.children() if len(list(base.module.children())) == 3 else (*base.module,)  # type: ignore[misc]
    assert first is second and isinstance(first, QuantizedLinear)


def test_the_fingerprint_is_stable_another_than_the_dense_one_and_the_same_in_every_dtype() -> None:
    base = quantised("llama", dtype=torch.bfloat16)
    assert base.fingerprint() == quantised("llama", dtype=torch.bfloat16).fingerprint()
    assert base.origin == tiny("llama", dtype=torch.bfloat16).fingerprint() != base.fingerprint()
    prints = {quantised("llama", text).fingerprint() for text in [*ALL, "nf4,double=false", "nf4,block=128"]}
    assert len(prints) == len(ALL) + 2
    before = base.fingerprint()
    base.module.float()
    base.refresh()
    base.invalidate()
    assert base.fingerprint() == before


def test_memory_falls_as_the_formula_says() -> None:
    plain, base = tiny("llama", dtype=torch.bfloat16), quantised("llama", dtype=torch.bfloat16)
    packed = [m for m in base.module.modules() if isinstance(m, QuantizedLinear)]
    saved = sum(2 * m.in_features * m.out_features - m.form.nbytes(m.shape) for m in packed)
    assert plain.weight_bytes() - base.weight_bytes() == saved > 0
    assert plain.weight_bytes() == sum(2 * p.numel() for p in plain.module.parameters())


def test_skipped_sites_stay_dense_and_a_skip_that_matches_nothing_is_refused() -> None:
    base = quantised("llama", "nf4,skip=down_proj+model.layers.0.*")
    for name, site in base.sites.items():
        if site.kind == "linear" and not site.head:
            dense = name.endswith("down_proj") or name.startswith("model.layers.0.")
            assert (base.weight(name).packed is None) == dense
    with pytest.raises(ConfigError, match="down_prj.*Did you mean 'down_proj'"):
        quantised("llama", "nf4,skip=down_prj")


def test_what_cannot_be_quantised_says_so() -> None:
    base = quantised("llama")
    with pytest.raises(ConfigError, match="quantised already"):
        quantize_backbone(base, Quantization())
    with pytest.raises(ConfigError, match="no linear weight"):
        quantize_backbone(wrap(nn.Conv1d(3, 4, 2)), Quantization())
    bad = tiny("llama")
    with torch.no_grad():
        bad.weight("model.layers.1.mlp.up_proj").matrix()[0, 0] = float("nan")
    with pytest.raises(FormatError, match="model.layers.1.mlp.up_proj"):
        quantize_backbone(bad, Quantization())


def test_the_text_form_of_a_setting_is_read_and_written() -> None:
    assert Quantization.of("nf4") == Quantization() and Quantization().double
    assert Quantization.of(None) is None and Quantization.of("none") is None and Quantization.of("") is None
    for text in ("nf4", "nvfp4", "nf4,double=false,block=128", "nf3,skip=q_proj+*.down_proj", "nf4,backend=torch"):
        config = Quantization.of(text)
        assert str(config) == text and Quantization.of(str(config)) == config
    assert Quantization.of({"kind": "nf3", "block": 32}) == Quantization(kind="nf3", block=32)
    for text, message in (
        ("nf5", "nf5"),
        ("nf4,double", "KEY=VALUE"),
        ("nf4,blok=64", "Did you mean 'block'"),
        ("nf4,block=63", "63"),
    ):
        with pytest.raises(ConfigError, match=message):
            Quantization.of(text)


@pytest.mark.parametrize("text", [*ALL, "nf4,double=false,block=128,skip=fc1+c_fc"])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_saved_quantised_model_loads_bit_for_bit(family: str, text: str, tmp_path: Path) -> None:
    if family == "bert" and "skip" in text:
        text = "nf4,double=false,block=128,skip=query"
    elif "skip" in text:
        text = "nf4,double=false,block=128,skip=c_fc"
    save_backbone(tiny(family, dtype=torch.bfloat16), tmp_path / "full")
    base = load(str(tmp_path / "full"), quantize=text)
    save_backbone(base, tmp_path / "packed")
    assert not hasattr(base.module.config, "quantization_config")
    again = load(str(tmp_path / "packed"))
    assert again.fingerprint() == base.fingerprint() and again.dtype == base.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(base))
    assert again.quantization is not None and base.quantization is not None
    assert again.quantization.kind == base.quantization.kind
    if text.startswith("nf4"):
        assert (again.quantization.block, again.quantization.double) == (
            base.quantization.block,
            base.quantization.double,
        )
    size = sum(f.stat().st_size for f in (tmp_path / "packed").glob("*.safetensors"))
    assert size < 1.5 * sum(f.stat().st_size for f in (tmp_path / "full").glob("*.safetensors"))


@pytest.mark.slow
def test_a_directory_that_bitsandbytes_wrote_loads_with_its_own_bits(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    import warnings

    save_backbone(tiny("llama", dtype=torch.bfloat16, intermediate_size=128), tmp_path / "full")
    setting = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=setting)
        theirs.save_pretrained(tmp_path / "theirs")
    ours = load(str(tmp_path / "theirs"))
    assert ours.quantization == Quantization()
    for name, module in theirs.named_modules():
        if type(module).__name__ == "Linear4bit":
            found = ours.weight(name).packed
            assert found is not None
            assert torch.equal(found.packed.parts["codes"], module.weight.data)
            assert torch.equal(found.packed.parts["absmax"], module.weight.quant_state.absmax)
    made = load(str(tmp_path / "full"), quantize="nf4")
    save_backbone(made, tmp_path / "ours")
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    ids = example_inputs(made)
    with torch.no_grad():
        difference = (back(**ids).logits - made.module(**ids).logits).float().abs().max()
    assert difference <= 0.05 * logits(made).float().abs().max()


def test_directories_that_cannot_be_read_or_are_asked_for_in_another_form_say_why(tmp_path: Path) -> None:
    base = quantised("llama", dtype=torch.bfloat16)
    path = save_backbone(base, tmp_path / "packed")
    with pytest.raises(ConfigError, match="stored as nf4"):
        load(str(path), quantize="nvfp4")
    assert load(str(path), quantize="nf4").fingerprint() == base.fingerprint()
    config = json.loads((path / "config.json").read_text())
    for changed, message in (
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
    ):
        (path / "config.json").write_text(json.dumps({**config, "quantization_config": changed}))
        with pytest.raises(FormatError, match=message):
            load(str(path))


def test_the_built_in_models_load_quantised() -> None:
    base = load("nano", quantize="nf4")
    assert base.quantization == Quantization() and base.tokenizer is not None
    assert base.weight_bytes() < load("nano").weight_bytes()
    assert load("tiny-llama", quantize="nvfp4").quantization == Quantization(kind="nvfp4")
    assert all(m.device.type == "meta" for m in load("tiny-llama", quantize="nf4", device="meta").packed_modules())
