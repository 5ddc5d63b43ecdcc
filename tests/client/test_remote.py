"""The typed client: what it writes for a server, and a server's answers to it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tinker
import torch

import lorica
from lorica.adapters.lineage import lineage_at, sha256_of
from lorica.adapters.targets import Targets
from lorica.client.remote import ServiceClient, metadata_of
from lorica.core.errors import ConfigError, DataError, FormatError, MissingError
from lorica.engine.worker import method_settings
from lorica.methods import all_methods, get_method, make_method
from lorica.methods.dora import DoRA
from lorica.methods.ia3 import IA3
from lorica.methods.lora import LoRA
from lorica.server.bodies import CreateModelBody
from lorica.server.specs import spec_of
from tests.server.conftest import adam, datum

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:unclosed {what}:ResourceWarning")  # the SDK's, when its client is collected
    for what in ("<socket", "transport", "event loop")
]

TOKENS = [5, 6, 7, 8] * 3


def info(client, run):
    """What the server tells of a run."""
    with client._http() as http:
        return http.post("/get_info", json={"model_id": run.model_id}).json()


def train(run, steps=2):
    losses = []
    for _ in range(steps):
        forward, stepped = run.forward_backward([datum(TOKENS)], "cross_entropy"), run.optim_step(adam(1e-2))
        losses.append(forward.result().metrics["loss:sum"])
        stepped.result()
    return losses


def test_a_method_travels_as_its_name_and_its_settings():
    told = metadata_of(DoRA(rank=4), Targets(include=("q_proj",), rank_pattern={"q_proj": 2}), {"note": "mine"})
    assert told["method"] == "dora" and told["note"] == "mine"
    assert json.loads(told["config"]) == DoRA(rank=4).model_dump(mode="json")
    assert json.loads(told["targets"])["rank_pattern"] == {"q_proj": 2}
    assert "targets" not in metadata_of(LoRA())
    assert all(isinstance(value, str) for value in told.values())
    with pytest.raises(ConfigError, match="'alpha'"):
        metadata_of(LoRA(), None, {"alpha": "3"})


@pytest.mark.parametrize("name", list(all_methods()))
def test_every_method_with_all_its_settings_reaches_the_server_as_it_is(name):
    method = make_method(name, **{"rank": 3} if "rank" in all_methods()[name].model_fields else {})
    notes = {field: "a note" for cls in all_methods().values() for field in cls.model_fields if field != "alpha"}
    sent = {"user_metadata": metadata_of(method, None, notes), "lora_config": {"rank": getattr(method, "rank", 1)}}
    body = CreateModelBody.model_validate({"session_id": "s", "model_seq_id": 0, "base_model": "nano", **sent})
    spec = spec_of(body, "qwen3", method_settings())
    assert spec["method"] == name
    assert get_method(name).parse(spec["config"]) == method


HOOKED = {
    "adalora": {"rank": 4, "steps": 4},
    "glora": {"rank": 2, "supernet": True},
    "lora_pro": {"rank": 2, "state": "factor"},
    "singlora": {"rank": 2, "ramp": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(HOOKED))
def test_a_method_with_a_schedule_of_its_own_is_trained_from_a_typed_config(client, name):
    method = make_method(name, **HOOKED[name])
    run = client.create_training_client(method, "nano", targets=["q_proj", "v_proj"], seed=3).result()
    told = info(client, run)
    assert told["method"] == name and told["method_config"] == method.model_dump(mode="json")
    losses = train(run, 3)
    assert losses[2] < losses[0]


def test_any_method_is_trained_with_its_targets_and_patterns(client):
    targets = {"include": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 1.0}}
    run = client.create_training_client(DoRA(rank=4, alpha=8.0), "nano", targets=targets, seed=3).result()
    told = info(client, run)
    assert (told["method"], told["lora_rank"], told["lora_alpha"]) == ("dora", 4, 8.0)
    assert told["method_config"] == DoRA(rank=4, alpha=8.0).model_dump(mode="json")
    assert told["targets"]["rank_pattern"] == {"v_proj": 2}
    losses = train(run)
    assert losses[1] < losses[0]


def test_a_method_without_a_rank_is_trained_too(client):
    run = client.create_training_client(IA3(), "nano").result()
    assert info(client, run)["method"] == "ia3"
    losses = train(run)
    assert losses[1] < losses[0]


def test_metadata_of_the_users_own_is_kept_and_is_no_setting(client, server):
    notes = {"renderer_name": "role_colon", "dropout": "0.5", "form": "long"}
    run = client.create_training_client(LoRA(rank=2), "nano", user_metadata=notes).result()
    told = server.rest().get_training_run(run.model_id).result()
    assert {key: told.user_metadata[key] for key in notes} == notes
    assert told.lora_rank == 2 and info(client, run)["method_config"]["dropout"] == 0.0


def test_an_adapter_folder_is_uploaded_continued_stacked_and_sampled(client, server, tmp_path):
    host = lorica.Host(lorica.load("nano"))
    for name in ("one", "two"):
        adapter = host.add(name, LoRA(rank=2), "q_proj", seed=1)
        with torch.no_grad():
            adapter.flat.normal_(std=0.05)
        host.save(tmp_path / name, adapter)
    (tmp_path / "one" / "README.md").write_text("hello")
    paths = [client.upload_adapter(tmp_path / name, "nano") for name in ("one", "two")]
    assert {checkpoint.tinker_path for checkpoint in client.list_adapters()} >= set(paths)

    def scores(path):
        prompt = tinker.types.ModelInput.from_ints(TOKENS)
        return client.create_sampling_client(model_path=path).result().compute_logprobs(prompt).result()[1:]

    one, two, both = scores(paths[0]), scores(paths[1]), scores(paths)
    base = client.create_sampling_client(base_model="nano").result()
    plain = base.compute_logprobs(tinker.types.ModelInput.from_ints(TOKENS)).result()[1:]
    assert len({tuple(found) for found in (one, two, both, plain)}) == 4
    run = client.create_training_client_from_state(paths[0]).result()
    losses = train(run)
    assert losses[0] == pytest.approx(-sum(one), abs=20) and losses[1] < losses[0]
    run.save_state("further").result()
    saved = [lineage_at(file.parent) for file in server.settings.data_dir.rglob("lorica.json")]
    parents = [parent for lineage in saved for parent in lineage.of("continued-from")]
    assert [(parent.path, parent.sha256) for parent in parents] == [(paths[0], sha256_of(tmp_path / "one"))]
    with pytest.raises(DataError, match="exists already"):
        client.upload_adapter(tmp_path / "one", "nano")
    assert client.upload_adapter(tmp_path / "one", "nano", overwrite=True) == paths[0]


def test_what_is_no_adapter_is_not_sent(client, tmp_path):
    with pytest.raises(MissingError, match="no folder"):
        client.upload_adapter(tmp_path / "absent", "nano")
    with pytest.raises(FormatError, match="adapter_config.json"):
        client.upload_adapter(tmp_path, "nano")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(FormatError, match=r"adapter_model\.safetensors") as caught:
        client.upload_adapter(tmp_path, "nano")
    assert "pickle" in caught.value.hint
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match="safetensors"):
        client.upload_adapter(tmp_path, "nano", name="broken")
    with pytest.raises(MissingError, match="not served"):
        client.upload_adapter(tmp_path, "nan", name="broken")


def test_without_a_key_a_call_says_what_it_needs(server, monkeypatch):
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="URL and an API key"):
        ServiceClient(base_url=server.url)._http()


@pytest.mark.slow
def test_without_the_sdk_the_client_says_what_to_install():
    program = (
        "import sys; sys.modules['tinker'] = None\n"
        "import lorica, lorica.client\n"
        "from lorica.core.errors import MissingError\n"
        "try:\n    lorica.client.ServiceClient\n"
        "except MissingError as error:\n    print(error, error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "'tinker'" in done.stdout and "lorica[serve]" in done.stdout
