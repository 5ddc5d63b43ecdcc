"""Names that clients see, settings, and JSON bodies."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from tinker.types.checkpoint import ParsedCheckpointTinkerPath

from lorica.core.errors import ConfigError, DataError, TargetError
from lorica.engine.worker import method_settings
from lorica.server import naming, specs
from lorica.server.bodies import CreateModelBody, OptimStepBody, SaveWeightsBody
from lorica.server.errors import explain_validation
from lorica.server.settings import Settings


def test_the_sdk_takes_our_paths_apart_as_we_do():
    path = naming.TinkerPath(naming.run_id("abc", 0), "sampler", "s1")
    theirs = ParsedCheckpointTinkerPath.from_tinker_path(str(path))
    assert naming.TinkerPath.parse(str(path)) == path
    assert (theirs.training_run_id, theirs.checkpoint_id, theirs.checkpoint_type) == (
        path.run,
        path.checkpoint_id,
        path.kind,
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "tinker://a/b",
        "tinker://a/weights/..",
        "tinker://a/weights/.x",
        "tinker://a/weights/b/c",
        "tinker:///weights/a",
    ],
)
def test_other_texts_are_no_paths(text):
    with pytest.raises(DataError, match="not a path"):
        naming.TinkerPath.parse(text)


def test_a_requests_id_names_its_place():
    assert naming.parse_request_id(naming.request_id("s:train:0", 12)) == ("s:train:0", 12)
    assert naming.parse_request_id("nonsense") is None


def test_settings_refuse_what_cannot_be():
    with pytest.raises(ConfigError, match="at least one model"):
        Settings(models=())
    with pytest.raises(ConfigError, match="twice"):
        Settings(models=("nano", "nano"))


def create(**fields):
    return CreateModelBody.model_validate({"session_id": "s", "model_seq_id": 0, "base_model": "nano", **fields})


def spec_of(family, **fields):
    return specs.spec_of(create(**fields), family, method_settings())


def test_plain_lora_is_asked_for_as_on_the_hosted_service():
    spec = spec_of("qwen3", lora_config={"rank": 8, "seed": 3})
    assert spec["method"] == "lora" and spec["config"] == {"rank": 8, "alpha": 32} and spec["seed"] == 3
    assert spec["targets"]["include"] == [*specs.ATTENTION, *specs.MLP, *specs.HEAD]


def test_the_flags_of_modules_are_not_ignored():
    flags = {"rank": 8, "train_mlp": False, "train_unembed": False}
    assert spec_of("qwen3", lora_config=flags)["targets"]["include"] == list(specs.ATTENTION)
    with pytest.raises(TargetError, match="c_attn"):
        spec_of("gpt2", lora_config=flags)


def test_metadata_choose_any_method_also_as_texts():
    for config in ({"rank": 4, "dropout": 0.1}, '{"rank": 4, "dropout": 0.1}'):
        spec = spec_of("qwen3", user_metadata={"method": "dora", "config": config, "note": "mine"})
        assert spec["method"] == "dora" and spec["config"] == {"rank": 4, "dropout": 0.1} and spec["targets"] == {}
    flat = spec_of("qwen3", user_metadata={"method": "vera", "targets": "k_proj", "rank": "2"})
    assert flat["config"] == {"rank": 2} and flat["targets"] == {"include": ["k_proj"]}


def test_alpha_can_be_set():
    assert spec_of("qwen3", user_metadata={"lora_alpha": 64})["config"]["alpha"] == 64


def test_an_optimizer_that_is_not_here_is_refused():
    with pytest.raises(ConfigError, match="dimuon"):
        spec_of("qwen3", optimizer_config={"type": "dimuon", "version": 1})


def test_what_does_not_validate_is_told_in_one_sentence():
    with pytest.raises(ValidationError) as caught:
        OptimStepBody.model_validate({"model_id": "r", "seq_id": 1, "adam_params": {"momentum": 3}})
    assert "adam_params.momentum" in explain_validation(caught.value.errors())


@pytest.mark.parametrize("name", ["..", ".hidden", "a/b", "a,b", "", "x" * 200])
def test_names_of_checkpoints_are_single_parts(name):
    with pytest.raises(ValidationError):
        SaveWeightsBody.model_validate({"model_id": "r", "path": name})
