"""LongLoRA: what it trains, tied embeddings, position interpolation, and step 0 under the run's attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

import lorica
from lorica.adapters.layout import Layout
from lorica.adapters.parents import lineage_of
from lorica.adapters.save_merged import save_merged
from lorica.adapters.targets import Targets, select
from lorica.cli.main import cli
from lorica.core.errors import ConfigError, DataError, MergeError, MethodError, MismatchError
from lorica.core.site import Site
from lorica.engine.host import Host
from lorica.engine.sample import generate
from lorica.engine.settings import EngineSettings, parse
from lorica.engine.worker import start
from lorica.methods.longlora import LongLoRA
from lorica.methods.lora import LoRA
from lorica.models import wrap
from lorica.models.factory import make_tiny
from lorica.models.positions import check_scaled, context, position_scale, scale_positions
from lorica.models.shifted_attention import Shifted
from lorica.recipes import sft
from lorica.recipes.config import SFTConfig, read_config
from lorica.sampling.params import SamplingParams
from tests.engine.service import Service as Engines
from tests.engine.service import datum, logprobs, train
from tests.tiny import tiny


def trained(host: Host) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, site in host.adapter().layout.sites.items():
        found.setdefault(site.kind, set()).add(name.rsplit(".", 1)[-1])
    return found


def test_attention_gets_factors_and_embeddings_and_norms_are_trained_whole() -> None:
    host = lorica.attach(tiny("qwen3"), LongLoRA())
    assert trained(host) == {
        "linear": {"q_proj", "k_proj", "v_proj", "o_proj"},
        "embedding": {"embed_tokens"},
        "norm": {"input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm"},
    }
    names = {(site, param) for site, param, _ in host.adapter().named_tensors(trainable_only=True)}
    assert {p for s, p in names if s.endswith("_proj")} == {"A", "B"}
    assert {p for s, p in names if not s.endswith("_proj")} == {"delta"}
    assert not any(p.requires_grad for p in host.model.parameters())
    ids = torch.tensor([[5, 6, 7, 8]])
    for _ in range(2):  # the zero factor hides the other one in the first step
        host.adapter().zero_grad()
        host(input_ids=ids, labels=ids).loss.backward()
        host.adapter().flat.sub_(1e-2 * host.adapter().grad)
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in host.parameters())


@pytest.mark.parametrize(
    ("family", "linear"), [("gpt2", {"c_attn", "c_proj"}), ("bert", {"query", "key", "value", "dense"})]
)
def test_the_defaults_find_attention_in_other_families(family: str, linear: set[str]) -> None:
    host = lorica.attach(tiny(family), LongLoRA())
    assert trained(host)["linear"] == linear
    others = (".mlp.", ".intermediate.", "cls.predictions.decoder")
    assert not [name for name in host.adapter().layout.sites if any(part in name for part in others)]


def test_a_name_that_only_sounds_like_a_norm_or_an_embedding_is_not_trained() -> None:
    class Trap(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normaliser, self.embed_proj = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
            self.q_proj, self.norm = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)

    host = Host(wrap(Trap()))
    assert set(host.add("a", LongLoRA(rank=2)).layout.sites) == {"q_proj", "norm"}


def test_the_published_numbers_of_llama_2_7b_come_out() -> None:
    width, tokens, layers = 4096, 32000, 32
    sites = [Site("model.embed_tokens", "embedding", (width, tokens)), Site("model.norm", "norm", (width,))]
    for i in range(layers):
        block = f"model.layers.{i}"
        sites += [Site(f"{block}.self_attn.{p}_proj", "linear", (width, width), layer=i) for p in "qkvo"]
        sites += [Site(f"{block}.mlp.up_proj", "linear", (11008, width), layer=i)]
        sites += [Site(f"{block}.{n}_layernorm", "norm", (width,), layer=i) for n in ("input", "post_attention")]
    layout = Layout(LongLoRA(), select({s.name: s for s in sites}, LongLoRA(), Targets()))
    groups = {group.name: group.stop - group.start for group in layout.groups}
    assert groups["embedding"] == 131_072_000
    assert groups["norm"] == (2 * layers + 1) * width
    assert groups["A"] + groups["B"] == 4 * layers * 8 * (width + width)
    assert {group.name: group.decay for group in layout.groups}["norm"] is False


def test_a_tied_heads_weight_stays_as_it_is_and_its_embedding_cannot_be_merged() -> None:
    base = tiny("qwen3", dtype=torch.float64)
    assert base.sites["model.embed_tokens"].tied
    host = Host(base)
    adapter = host.add("a", LongLoRA(), "embed_tokens", dtype=torch.float64)
    ids = torch.tensor([[5, 6, 7]])
    plain = host(input_ids=ids).logits
    moved = adapter.tensors("model.embed_tokens")["delta"].detach()
    with torch.no_grad():
        moved[:, 100] += 1.0  # a token that is not in the input: only a head would see it
    host.activate("a")
    assert torch.equal(host(input_ids=ids).logits, plain)
    with torch.no_grad():
        moved[:, 6] += 1.0
    assert not torch.equal(host(input_ids=ids).logits, plain)
    with pytest.raises(MergeError, match="tied"):
        host.merge()


def test_untied_it_merges_whole() -> None:
    host = lorica.attach(tiny("llama", dtype=torch.float64), LongLoRA(), dtype=torch.float64)
    host.adapter().flat.add_(0.05 * torch.randn(host.adapter().flat.shape, dtype=torch.float64))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    y = host(input_ids=ids).logits
    host.merge()
    torch.testing.assert_close(host(input_ids=ids).logits, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("factor", [1.5, 4.0])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "qwen3-moe"])
def test_scaled_positions_are_positions_divided_by_the_factor(family: str, factor: float) -> None:
    plain, scaled = (make_tiny(family, dtype=torch.float64, position_scale=f) for f in (1.0, factor))
    ids = torch.randint(3, 120, (1, 9), generator=torch.Generator().manual_seed(0))
    places = torch.arange(9, dtype=torch.float32)[None]
    # scores depend on m and n through m / f and n / f alone, so fractions of positions in the plain model are the same
    expected = plain.module(input_ids=ids, position_ids=places / factor).logits
    torch.testing.assert_close(scaled.module(input_ids=ids, position_ids=places).logits, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scaled.module(input_ids=ids).logits, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(plain.module(input_ids=ids).logits, expected, rtol=1e-3)
    assert (position_scale(plain.module), position_scale(scaled.module)) == (1.0, factor)
    assert context(scaled.module) == int(512 * factor)
    assert scaled.fingerprint() != plain.fingerprint()


def test_a_longer_context_is_one_that_is_sampled_in() -> None:
    prompt, params = [3, 4, 5, 6] * 8, SamplingParams(max_tokens=2)
    short, long = (Host(make_tiny("llama", max_position_embeddings=16, position_scale=f)) for f in (1.0, 3.0))
    with pytest.raises(DataError, match="positions"):
        generate(short, [(prompt, None)], params)
    assert len(generate(long, [(prompt, None)], params)[0].tokens) == 2


def test_rotations_of_each_kind_of_layer_are_scaled_alike() -> None:
    config = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8
    )
    scale_positions(config, 3.0, "gemma3")
    assert {kind: rope["factor"] for kind, rope in config.rope_parameters.items()} == {
        "sliding_attention": 3.0,
        "full_attention": 3.0,
    }
    module = transformers.Gemma3ForCausalLM(config)
    check_scaled(module, 3.0, "gemma3")
    with pytest.raises(MethodError, match="a way of its own"):
        check_scaled(module, 2.0, "gemma3")


def test_a_model_without_plain_rotations_is_refused() -> None:
    for name in ("tiny-gpt2", "tiny-bert", "tiny-mlp"):
        with pytest.raises(MethodError, match="no rotary positions"):
            lorica.load(name, position_scale=2.0)
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 256}
    with pytest.raises(MethodError, match=r"scaled already \(yarn\)"):
        make_tiny("llama", position_scale=2.0, rope_parameters=yarn)
    for wrong in (0.5, 0.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="at least 1"):
            lorica.load("tiny-llama", position_scale=wrong)


def test_an_adapter_is_bound_to_the_factor_it_was_trained_at(tmp_path: Path) -> None:
    plain, scaled = lorica.load("nano"), lorica.load("nano", position_scale=4.0)
    assert (plain.position_scale, scaled.position_scale) == (1.0, 4.0)
    lorica.attach(scaled, LoRA(rank=2)).save(tmp_path / "four")
    lorica.attach(plain, LoRA(rank=2)).save(tmp_path / "one")
    with pytest.raises(MismatchError, match="divided by 4; this backbone divides them by 1") as wrong:
        Host(lorica.load("nano")).load(tmp_path / "four")
    assert wrong.value.hint is not None and "--position-scale 4" in wrong.value.hint
    with pytest.raises(MismatchError, match="divided by 1; this backbone divides them by 4"):
        Host(lorica.load("nano", position_scale=4.0)).load(tmp_path / "one")
    assert Host(lorica.load("nano", position_scale=4.0)).load(tmp_path / "four")
    assert Host(lorica.load("nano", position_scale=1.0)).load(tmp_path / "one")


def test_what_is_merged_and_saved_keeps_its_positions(tmp_path: Path) -> None:
    host = lorica.attach(lorica.load("nano", dtype="float32", position_scale=2.0), LoRA(rank=2))
    host.merge()
    save_merged(host.backbone, tmp_path / "merged")
    again = lorica.load(str(tmp_path / "merged"))
    assert again.position_scale == 2.0
    ids = torch.tensor([[11, 12, 13, 14]])
    torch.testing.assert_close(again.module(input_ids=ids).logits, host(input_ids=ids).logits)


def test_step_0_is_the_base_with_the_runs_positions_and_groups_not_the_plain_base() -> None:
    base = make_tiny("llama", dtype=torch.float64, position_scale=2.0)
    host = Host(base)
    host.add("a", LongLoRA(), dtype=torch.float64)
    host.set_attention(Shifted(group=4)).train()
    ids = torch.randint(3, 120, (1, 16), generator=torch.Generator().manual_seed(0))
    with_all = host(input_ids=ids).logits
    host.activate("a")
    assert torch.equal(host(input_ids=ids).logits, with_all)
    assert not torch.allclose(tiny("llama", dtype=torch.float64).module(input_ids=ids).logits, with_all, rtol=1e-3)


def config(folder: Path, **more: Any) -> SFTConfig:
    values = {"data": {"path": "everyday:train"}, "steps": 2, "batch_size": 2, "out": str(folder), "dtype": "float32"}
    return SFTConfig(method={"name": "longlora", "rank": 2}, **{**values, **more})


@pytest.mark.slow
def test_a_run_trains_in_groups_with_scaled_positions_and_says_so(tmp_path: Path) -> None:
    losses = {}
    for name, more in {
        "plain": {},
        "long": {"position_scale": 2.0, "attention": {"kind": "shifted", "group": 8}},
    }.items():
        losses[name] = sft.run(config(tmp_path / name, **more)).loss
    assert losses["plain"] != pytest.approx(losses["long"], rel=1e-4)
    again = read_config(tmp_path / "long" / "config.yaml")
    assert again.attention == Shifted(group=8) and again.position_scale == 2.0
    adapter = Host(lorica.load("nano", position_scale=2.0)).load(tmp_path / "long" / "adapter")
    recipe = lineage_of(adapter).recipe
    assert recipe is not None and recipe["attention"] == {"kind": "shifted", "group": 8, "ratio": None}
    with pytest.raises(MismatchError):
        Host(lorica.load("nano")).load(tmp_path / "long" / "adapter")


def test_wrong_settings_of_a_run_are_told() -> None:
    with pytest.raises(ConfigError, match="one of them decides G"):
        config(Path("x"), attention={"group": 8, "ratio": 0.5})
    with pytest.raises(ConfigError, match="Shifted has no setting 'groop'"):
        config(Path("x"), attention={"groop": 8})
    with pytest.raises(ConfigError, match="position_scale"):
        config(Path("x"), position_scale=0.5)
    assert read_config(None, ["data.path=x", "attention.group=16"]).attention == Shifted(group=16)


def test_the_command_line_opens_a_base_as_an_adapter_needs_it(tmp_path: Path) -> None:
    lorica.attach(lorica.load("nano", position_scale=4.0), LoRA(rank=2)).save(tmp_path / "four")
    arguments = ["sample", "--adapter", str(tmp_path / "four"), "--prompt", "hello", "--max-tokens", "2"]
    told = CliRunner().invoke(cli, arguments)
    assert told.exit_code != 0
    done = CliRunner().invoke(cli, [*arguments, "--position-scale", "4"])
    assert done.exit_code == 0, done.output


def test_a_served_engine_trains_every_run_in_groups_and_samples_densely() -> None:
    row, losses = datum(1, 24), {}
    for attention in ("dense", "shifted"):
        engine = Engines(attention=attention, attention_group=0 if attention == "dense" else 4)
        engine.open("a")
        for backward in (False, True):
            losses[attention, backward] = logprobs(engine.ask(train("a", row, backward=backward)))[0]
    assert (losses["dense", False] == losses["shifted", False]).all()
    assert not (losses["dense", True] == losses["shifted", True]).all()


def test_an_engines_settings_travel_as_arguments_and_contradictions_are_refused() -> None:
    settings = EngineSettings(model="nano", attention="shifted", attention_group=64, position_scale=4.0)
    assert parse(["--fd=3", *settings.arguments()]) == (3, settings)
    assert settings.shifted() == Shifted(group=64)
    assert EngineSettings(model="nano", attention="shifted").shifted() == Shifted()
    with pytest.raises(ConfigError, match="attention is dense"):
        EngineSettings(model="nano", attention_group=64)
    with pytest.raises(MethodError, match="no rotary positions"):
        start(EngineSettings(model="tiny-gpt2", position_scale=2.0))
