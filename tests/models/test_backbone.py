"""A backbone is frozen; its weights are views of the base in one convention; its fingerprint tells bases apart."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lorica.core.errors import MethodError, MissingError
from lorica.models import tiny, wrap
from lorica.models.backbone import SAMPLES

FAMILIES = ["llama", "qwen3", "qwen3-moe", "gemma", "gpt2", "bert", "vit", "mlp", "conv"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_backbone_is_frozen_and_in_eval_mode(family: str) -> None:
    module = tiny(family).module
    assert not any(p.requires_grad for p in module.parameters())
    assert not any(part.training for part in module.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_are_views_of_the_frozen_parameters(family: str) -> None:
    backbone = tiny(family)
    for site in backbone.sites.values():
        if site.kind in ("attention", "input"):
            continue
        owner, attribute, expert = backbone.parameter(site.name)
        stored = getattr(owner, attribute)
        stored = stored if expert is None else stored[expert]
        matrix = backbone.weight(site.name).matrix()
        assert matrix.data_ptr() == stored.data_ptr(), site.name
        assert not matrix.requires_grad
        torch.testing.assert_close(matrix.T if site.transposed else matrix, stored, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_linear_site_is_x_times_its_matrix_transposed(family: str) -> None:
    backbone = tiny(family, dtype=torch.float64)
    for site in backbone.sites.values():
        if site.kind == "linear":
            x_NI = torch.randn(3, site.in_features, dtype=torch.float64)
            y_NO = F.linear(x_NI, backbone.weight(site.name).matrix(), backbone.bias(site.name))
            found = backbone.module_of(site.name)(x_NI)
            # a router gives its logits first, and then what it chose by them
            torch.testing.assert_close(y_NO, found[0] if site.router else found)


@pytest.mark.parametrize("family", ["gemma", "gpt2", "mlp"])
def test_an_embedding_site_is_a_linear_map_of_one_hot_tokens_times_its_scale(family: str) -> None:
    backbone = tiny(family, dtype=torch.float64)
    for site in backbone.sites.values():
        if site.kind == "embedding":
            ids_N = torch.arange(5)
            hot_NV = F.one_hot(ids_N, site.in_features).double()
            y_ND = site.scale * (hot_NV @ backbone.weight(site.name).matrix().T)
            torch.testing.assert_close(y_ND, backbone.module_of(site.name)(ids_N))


def test_the_embedding_scale_is_rounded_as_the_module_rounds_it() -> None:
    backbone = tiny("gemma", dtype=torch.bfloat16, hidden_size=48)
    site = backbone.sites["model.embed_tokens"]
    assert site.scale != 48**0.5
    row_D = backbone.weight(site.name).matrix()[:, 5]
    assert torch.equal(row_D * site.scale, backbone.module_of(site.name)(torch.tensor(5)))


def test_expert_sites_compute_what_the_experts_module_computes() -> None:
    backbone = tiny("qwen3-moe", dtype=torch.float64)
    experts = backbone.module_of("model.layers.0.mlp.experts.0.gate_up_proj")
    x_ND = torch.randn(5, 32, dtype=torch.float64)
    picks_NK = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [2, 0]])
    share_NK = torch.rand(5, 2, dtype=torch.float64)
    wanted = torch.zeros_like(x_ND)
    for row, (picks, shares) in enumerate(zip(picks_NK.tolist(), share_NK, strict=True)):
        for expert, share in zip(picks, shares, strict=True):
            at = f"model.layers.0.mlp.experts.{expert}"
            gate, up = (backbone.weight(f"{at}.gate_up_proj").matrix() @ x_ND[row]).chunk(2)
            wanted[row] += share * (backbone.weight(f"{at}.down_proj").matrix() @ (F.silu(gate) * up))
    torch.testing.assert_close(experts(x_ND, picks_NK, share_NK), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_row_norms_are_those_of_the_normalised_weight(family: str) -> None:
    backbone = tiny(family, dtype=torch.bfloat16)
    for site in backbone.sites.values():
        if site.kind != "attention":
            weight = backbone.weight(site.name)
            wanted = (
                weight.matrix().double().square().flatten(1).sum(1)
                if site.kind != "norm"
                else weight.matrix().double() ** 2
            )
            norm = weight.row_square_norm()
            assert norm.dtype == torch.float32
            torch.testing.assert_close(norm.double(), wanted, rtol=1e-6, atol=1e-12)


@given(rows=st.integers(1, 40), cols=st.integers(1, 9), seed=st.integers(0, 99))
def test_row_norms_do_not_depend_on_the_blocks_they_are_computed_in(rows: int, cols: int, seed: int) -> None:
    torch.manual_seed(seed)
    module = nn.Linear(cols, rows, bias=False, dtype=torch.float64)
    norm = wrap(module).weight("root").row_square_norm()
    torch.testing.assert_close(norm, module.weight.square().sum(1))


def test_row_norms_are_kept_until_the_backbone_is_told_of_a_write() -> None:
    backbone = tiny("mlp")
    weight = backbone.weight("fc1")
    before, mark = weight.row_square_norm(), backbone.fingerprint()
    owner, attribute, expert = backbone.parameter("fc1")
    assert expert is None
    with torch.no_grad():
        getattr(owner, attribute).mul_(2)
    assert weight.row_square_norm() is before
    assert backbone.fingerprint() == mark
    backbone.invalidate()
    torch.testing.assert_close(weight.row_square_norm(), 4 * before)
    assert backbone.fingerprint() != mark


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprints_differ_when_one_weight_of_any_tensor_changes(family: str) -> None:
    marks = {tiny(family).fingerprint()}
    names = [name for name, _ in tiny(family).module.named_parameters()]
    for name in names:
        backbone = tiny(family)
        parameter = backbone.module.get_parameter(name)
        assert parameter.numel() <= SAMPLES or parameter.ndim > 1
        parameter.data.view(-1)[0] += 0.5
        marks.add(backbone.fingerprint())
    assert len(marks) == len(names) + 1


@pytest.mark.slow
def test_fingerprints_are_the_same_in_another_process_and_another_dtype() -> None:
    mark = tiny("mlp").fingerprint()
    code = "from lorica.models import tiny; print(tiny('mlp').fingerprint())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == mark
    assert tiny("mlp", dtype=torch.bfloat16).fingerprint() == mark
    assert tiny("mlp", seed=1).fingerprint() != mark
    assert len(mark) == 16 and int(mark, 16) >= 0


def test_fingerprints_name_the_tensors_and_not_only_their_values() -> None:
    a, b = nn.ModuleDict({"a": nn.Linear(2, 3)}), nn.ModuleDict({"b": nn.Linear(2, 3)})
    b["b"].load_state_dict(a["a"].state_dict())
    assert wrap(a).fingerprint() != wrap(b).fingerprint()


def test_unknown_sites_are_named_with_their_neighbours() -> None:
    with pytest.raises(MissingError, match=r"'tiny-mlp' has no site 'fc3'\. Did you mean 'fc2', 'fc1'\?"):
        tiny("mlp").weight("fc3")


def test_sites_without_a_weight_say_so_only_when_asked_for_it() -> None:
    backbone = tiny("llama")
    attention = backbone.weight("model.layers.0.self_attn")
    with pytest.raises(MethodError, match="has no weight of its own"):
        attention.matrix()
    with pytest.raises(MethodError, match="is of kind 'attention' and has no weight to merge into"):
        backbone.parameter("model.layers.0.self_attn")
    with pytest.raises(MethodError, match="is of kind 'input' and has no weight to merge into"):
        backbone.parameter("input")
    assert backbone.bias("input") is None
    assert backbone.weight("input").matrix().data_ptr() == backbone.weight("model.embed_tokens").matrix().data_ptr()


def test_any_module_can_be_wrapped_and_its_weights_stay_as_they_are() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.GRU(4, 2))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    backbone = wrap(module, name="mine")
    assert (backbone.name, backbone.family, list(backbone.sites)) == ("mine", "custom", ["0"])
    assert backbone.trunk is None and backbone.head is None and not backbone.is_causal_lm and backbone.tokenizer is None
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert (backbone.dtype, backbone.device) == (torch.float32, torch.device("cpu"))


def test_importing_the_package_and_listing_names_imports_no_torch() -> None:
    code = (
        "import sys, lorica.models as m; m.names(); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_wrapping_a_plain_module_imports_no_transformers() -> None:
    code = "import sys; from lorica.models import tiny; tiny('conv'); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
