"""What stands beside `method` in a run's metadata: a setting, a slip of one (refused), or a note of the user's own."""

from __future__ import annotations

import json
import os
import signal
from typing import Annotated, Literal

import httpx
import pytest
import tinker

from lorica.core.errors import ConfigError, MethodError
from lorica.engine.commands import MethodSettings
from lorica.engine.worker import _takes_text, method_settings
from lorica.methods import all_methods, get_method
from lorica.server.bodies import CreateModelBody
from lorica.server.specs import spec_of
from tests.server.conftest import datum, step

METHODS = method_settings()
NOTES = {
    **{
        "renderer_name": "qwen3",
        "wandb_link": "https://x/y",
        "recipe_name": "sl",
        "git_rev": "0.5.8",
    },  # the cookbook's
    **{"name": "curve", "note": "form follows function", "tags": "a,b", "date": "2026-01-01", "who": "anna"},
}
TEXTS = {"rank": "3", "rslora": "true", "dropout": "0.25", "lr_ratio": "1e1", "init_dist": "normal"}
VALUES = {"rank": 3, "rslora": True, "dropout": 0.25, "lr_ratio": 10.0, "init_dist": "normal"}


def spec(told, **lora):
    fields = {"session_id": "s", "model_seq_id": 0, "base_model": "nano", "user_metadata": told}
    return spec_of(CreateModelBody.model_validate({**fields, "lora_config": {"rank": 8, **lora}}), "qwen3", METHODS)


def config(told):
    """The method's config as the engine reads it."""
    asked = spec(told)
    return get_method(asked["method"]).parse(asked["config"])


# -- through a server and the stock SDK -------------------------------------------------------------------------------


@pytest.fixture
def told_of(server):
    def told(run):
        headers = {"X-API-Key": server.key}
        body = {"model_id": run.model_id}
        return httpx.post(f"{server.url}/api/v1/get_info", json=body, headers=headers, timeout=30).json()

    return told


def test_settings_are_taken_from_texts_and_notes_are_kept(service, server, told_of):
    told = {"method": "miss", "form": "bat", "rank": "4", "dropout": "0.0", **NOTES}
    run = service.create_lora_training_client("nano", rank=8, user_metadata=told).result()
    method = told_of(run)
    assert method["method"] == "miss"
    assert method["method_config"] == {"rank": 4, "form": "bat", "mini_rank": None, "dropout": 0.0}
    assert step(run, [datum(range(10, 20))]) > 0
    assert server.rest().get_training_run(run.model_id).result().user_metadata == told


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"method": "miss", "from": "bat"}, r"'miss' has no setting 'from'\. Did you mean 'form'\?"),
        ({"method": "dora", "form": "bat"}, r"'dora' has no setting 'form' \(one of 'miss'\)\. Did you mean 'norm'\?"),
        ({"method": "miss", "form": "bta"}, r"MiSS\.form is 'bta': Input should be 'full', 'mini' or 'bat'"),
        (
            {"method": "ia3", "rank": "8"},
            r"'ia3' has no setting 'rank' \(one of 'adalora'.*\. Its settings are feedforward\.",
        ),
        ({"method": "ia3", "config": '{"rank": 8}'}, r"IA3 has no setting 'rank'"),
        ({"method": "lora", "config": '{"rank": "512"}'}, r"Rank is '512': a whole number"),
        ({"metod": "dora"}, r"Did you mean 'method'\?"),
    ],
)
def test_what_may_be_meant_as_a_setting_and_is_none_is_refused(service, told, sentence):
    with pytest.raises(tinker.RequestFailedError, match=sentence):
        service.create_lora_training_client("nano", rank=4, user_metadata=told).result()


@pytest.mark.slow
def test_settings_are_taken_while_a_killed_engine_is_started_again(service, server, told_of):
    os.kill(server.server.backbones.find("nano").pid, signal.SIGKILL)
    told = {"method": "miss", "form": "bat"}
    for _ in range(2):  # the second by what the new engine told
        run = service.create_lora_training_client("nano", rank=4, user_metadata=told).result()
        assert told_of(run)["method_config"]["form"] == "bat"
    assert server.server.backbones.find("nano").methods == METHODS


# -- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(all_methods()))
def test_every_setting_of_every_method_can_be_written_beside_it_as_a_text(name):
    fields = get_method(name)().model_dump(mode="json")
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()}
    assert config({"method": name, **texts, **NOTES}).model_dump(mode="json") == fields
    without = {key: value for key, value in fields.items() if key != "rank"}
    assert spec({"method": name, "config": json.dumps(without)})["config"].get("rank") == (
        8 if "rank" in fields else None
    )


@pytest.mark.parametrize("told", [TEXTS, VALUES, {**TEXTS, "rslora": "True"}])
def test_a_text_is_read_as_the_config_reads_its_value(told):
    found = config({"method": "dora", **told})
    assert {key: getattr(found, key) for key in VALUES} == VALUES


def test_lists_are_json_and_a_setting_that_takes_text_takes_it_as_it_stands():
    assert config({"method": "ia3", "feedforward": '["fc2"]'}).feedforward == ("fc2",)
    assert config({"method": "lora_soups", "ranks": "[2, 3]"}).ranks == (2, 3)
    assert config({"method": "intrinsic", "gradient": "true"}).gradient == "true"  # a word, no truth value
    with pytest.raises(ConfigError, match="slices is 'q'"):
        config({"method": "lora_fused", "slices": "q"})
    with pytest.raises(ConfigError, match="slices is "):
        config({"method": "lora_fused", "slices": "[" * 100_000})


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (str, True),
        (Literal["a", "b"], True),
        (str | None, True),
        (Annotated[str, "x"] | int, True),
        (Literal[1, 2], False),
        (int | None, False),
        (tuple[str, ...], False),
        (dict[str, str], False),
    ],
)
def test_which_types_take_a_text_as_it_stands(annotation, text):
    assert _takes_text(annotation) is text


def test_an_unknown_method_is_the_engines_to_refuse():
    asked = spec({"method": "dorra", "dropout": "0.5"})
    with pytest.raises(MethodError, match="dora"):
        get_method(asked["method"])


# -- what is refused, and what is not ---------------------------------------------------------------------------------


@pytest.mark.parametrize("slip", ["frm", "from", "Form", "forms", "mini-rank", "dropuot", "rnk", "target", "configs"])
def test_a_slip_of_a_setting_is_refused_with_the_setting(slip):
    with pytest.raises(ConfigError, match=r"Did you mean '(form|mini_rank|dropout|rank|targets|config)'\?"):
        spec({"method": "miss", slip: "2"})


@pytest.mark.parametrize("name", list(all_methods()))
def test_a_setting_of_other_methods_alone_is_refused(name):
    own = METHODS[name].fields
    others = {field for other in METHODS.values() for field in other.fields} - set(own) - {"alpha"}
    assert others
    for field in others:
        with pytest.raises(ConfigError, match="has no setting") as caught:
            spec({"method": name, field: "1"})
        assert '"config"' in caught.value.hint


def test_pefts_name_of_a_setting_is_refused_with_ours():
    for key, ours in (("r", "rank"), ("lora_dropout", "dropout"), ("use_rslora", "rslora")):
        with pytest.raises(ConfigError, match=f"{key}'.*PEFT's name; here it is '{ours}'"):
            spec({"method": "dora", key: "1"})


def test_with_config_all_other_keys_are_notes():
    notes = {"form": "long", "from": "anna", "rank": "first", "optimizer": "x", **NOTES}
    assert spec({"method": "miss", "config": '{"form": "bat"}', **notes})["config"] == {"rank": 8, "form": "bat"}
    assert spec({"method": "miss", "config": "{}", **notes})["config"] == {"rank": 8}


def test_without_a_method_all_but_its_own_words_are_notes():
    assert spec({"form": "long", "rank": "first", "dropout": "0.5", **NOTES})["config"] == {"rank": 8, "alpha": 32}
    with pytest.raises(ConfigError, match="no 'method'"):
        spec({"config": '{"dropout": 0.5}'})


@pytest.mark.parametrize(
    "told",
    [
        {"alpha": "4", "lora_alpha": "8"},
        {"method": "lora", "alpha": "4", "config": '{"alpha": 8}'},
        {"method": "lora", "lora_alpha": "4", "config": '{"alpha": 8}'},
    ],
)
def test_an_alpha_that_is_told_twice_is_refused(told):
    with pytest.raises(ConfigError, match="alpha twice"):
        spec(told)


def test_a_field_of_a_method_that_is_like_a_reserved_word_is_a_setting():
    methods = {"odd": MethodSettings({"target": True})}
    fields = {"session_id": "s", "model_seq_id": 0, "base_model": "nano"}
    body = CreateModelBody.model_validate({**fields, "user_metadata": {"method": "odd", "target": "x"}})
    assert spec_of(body, "qwen3", methods)["config"] == {"target": "x"}
