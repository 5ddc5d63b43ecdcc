"""External and sampler weights of LoRA and DoRA runs load in PEFT, which then gives the server's log-probabilities."""

from __future__ import annotations

import json
import shutil
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from tinker import types

from scripts.cookbook.offline import MODEL
from scripts.cookbook.served import Served
from tests.compat.flow import TOKENS, datum

pytestmark = [
    pytest.mark.slow,
    # OLD_CHECKPOINTING: peft asks transformers under its old name
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # PEFT warns of merging an adapter on a tied head, which nobody does here
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    # the SDK leaves the socket over which it asked for its flags to the garbage collector
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"train_unembed": False},
    "lora with the head": {},
    "lora without attention": {"train_unembed": False, "train_attn": False},
    "dora": {"train_unembed": False, "user_metadata": {"method": "dora"}},
}
"""Arguments of `create_lora_training_client`. The head of this Qwen3 is its embedding."""


@pytest.fixture(scope="module")
def service(served: Served) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=served.url, api_key=served.key)


def trained(service: tinker.ServiceClient, wanted: dict[str, Any]) -> tinker.TrainingClient:
    """A run after three steps large enough that nothing is close to the base."""
    client = service.create_lora_training_client(base_model=MODEL, rank=4, seed=1, **wanted).result()
    for _ in range(3):
        client.forward_backward([datum(tokens) for tokens in TOKENS], "cross_entropy").result()
        client.optim_step(types.AdamParams(learning_rate=0.02)).result()
    return client


def download(served: Served, path: str, folder: Path) -> Path:
    """All files of a checkpoint by their signed URLs, which need no key. The SDK asks for external weights only."""
    where = f"{served.url}/api/v1/training_runs/{path.removeprefix('tinker://').replace('/', '/checkpoints/', 1)}"
    request = urllib.request.Request(f"{where}/external_weights_urls", headers={"X-API-Key": served.key})
    with urllib.request.urlopen(request, timeout=30) as answer:
        urls = json.load(answer)["urls"]
    for name, url in urls.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as stream, target.open("wb") as file:
            shutil.copyfileobj(stream, file)
    return folder


def peft_logprobs(folder: Path, home: Path) -> torch.Tensor:
    """PEFT's own log-probabilities of the first sequence."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(home / MODEL, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        model: Any = PeftModel.from_pretrained(base, str(folder)).eval()
    ids = torch.tensor([TOKENS[0]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, ids[0, 1:, None])[:, 0]


def base_logprobs(home: Path) -> torch.Tensor:
    """The base's."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(home / MODEL, dtype=torch.float32).eval()
    ids = torch.tensor([TOKENS[0]])
    with torch.no_grad():
        return base(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def said(client: tinker.TrainingClient) -> torch.Tensor:
    """The server's log-probabilities of the first sequence."""
    result = client.forward([datum(TOKENS[0])], "cross_entropy").result()
    return torch.tensor(result.loss_fn_outputs[0]["logprobs"].tolist())


@pytest.mark.parametrize("name", METHODS)
def test_external_weights_load_in_peft_and_give_the_servers_logprobs(
    name: str, served: Served, service: tinker.ServiceClient, tmp_path: Path
) -> None:
    client = trained(service, METHODS[name])
    expected = said(client)
    path = client.save_weights_external("peft").result().path
    folder = download(served, path, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["use_dora"] == (name == "dora")
    home = served.output.parent
    torch.testing.assert_close(peft_logprobs(folder, home), expected, atol=1e-4, rtol=0)
    assert (base_logprobs(home) - expected).abs().max() > 0.01, "the adapter does something"


@pytest.mark.parametrize("name", METHODS)
def test_sampler_weights_load_in_peft_and_give_the_samplers_logprobs(
    name: str, served: Served, service: tinker.ServiceClient, tmp_path: Path
) -> None:
    client = trained(service, METHODS[name])
    path = client.save_weights_for_sampler("s").result().path
    sampling = service.create_sampling_client(model_path=path).result()
    values = list(sampling.compute_logprobs(types.ModelInput.from_ints(TOKENS[0])).result())[1:]
    folder = download(served, path, tmp_path / "adapter")
    home = served.output.parent
    torch.testing.assert_close(peft_logprobs(folder, home), torch.tensor(values), atol=1e-4, rtol=0)
