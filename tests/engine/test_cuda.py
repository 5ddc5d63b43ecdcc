"""On a GPU: training, sampling, packed weights and files give what they give on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorica.client.local import Service
from lorica.data.example import Example
from lorica.engine.sample import generate
from lorica.methods import all_methods
from lorica.models import load
from lorica.models.quantize import bnb
from lorica.models.quantize.formats import Packed
from lorica.models.quantize.functions import format_of, packed_as
from lorica.sampling.params import SamplingParams
from lorica.training.optimizer import AdamWConfig
from tests.contract.cases import places, small
from tests.tiny import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
STEPS = 3


def service(device: str, dtype: torch.dtype = torch.float64) -> Service:
    base = tiny("qwen3", dtype=dtype)
    base.module.to(device)
    return Service(base)


def examples(seed: int = 0) -> list[Example]:
    rng = torch.Generator().manual_seed(seed)
    return [Example.whole(torch.randint(3, 120, (n,), generator=rng).tolist()) for n in (9, 4, 13)]


def fits(name: str) -> bool:
    return bool(places(tiny("qwen3", dtype=torch.float64), small(name)))


@pytest.mark.parametrize("name", [name for name in all_methods() if fits(name)])
def test_a_run_on_cuda_follows_the_one_on_the_cpu(name: str, tmp_path: Path) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        own = service(device)
        client = own.training_client(small(name), optimizer=AdamWConfig(lr=1e-2), steps=STEPS)
        losses[device] = []
        for step in range(STEPS):
            losses[device].append(client.forward_backward(examples(step)).mean)
            client.optim_step()
        losses[device].append(client.forward(examples(9)).mean)
        client.save(tmp_path / device)
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-5)
    other = service("cuda").host
    other.load(tmp_path / "cpu", "moved")
    assert all(t.device.type == "cuda" for _, _, t in other.adapter("moved").named_tensors())


def test_a_mixed_batch_is_sampled_in_bfloat16_as_the_model_itself_would() -> None:
    own = service("cuda", torch.bfloat16)
    names: list[str | None] = [None, *("lora", "dora", "vera", "ia3", "prefix", "prompt"), "lora"]
    for name in dict.fromkeys(n for n in names if n is not None):
        adapter = own.host.add(name, small(name))
        adapter.flat += 0.05 * torch.randn_like(adapter.flat)
    prompts = [[5 + i, 9, 20 + i, 7, 30][: 1 + i % 5] for i in range(len(names))]
    params = SamplingParams(max_tokens=8, temperature=0.0)
    for prompt, name, sample in zip(
        prompts, names, generate(own.host, list(zip(prompts, names, strict=True)), params), strict=True
    ):
        ids = torch.tensor([[*prompt, *sample.tokens]], device="cuda")
        with own.host.rows([name]), torch.no_grad():
            logp = own.host.model(input_ids=ids[:, :-1]).logits[0, len(prompt) - 1 :].float().log_softmax(-1)
        likely = logp.gather(1, torch.tensor(sample.tokens, device="cuda")[:, None])[:, 0]
        assert sample.logprobs == pytest.approx(likely.tolist(), abs=0.1)  # bfloat16
        assert (logp.max(-1).values - likely).max() < 0.1


def test_equal_seeds_draw_equal_samples_on_both_devices() -> None:
    params, found = SamplingParams(max_tokens=12, temperature=1.0, top_k=20, top_p=0.9, seed=7), []
    for device in ("cpu", "cuda"):
        found.append([s.tokens for s in generate(service(device).host, [([5, 9, 20], None), ([8], None)], params)])
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["nf4", "nf3", "nf2", "nvfp4", "uniform4"])
def test_a_packed_weight_has_the_same_codes_and_values_on_both_devices(kind: str) -> None:
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    form = format_of(kind)
    here = packed_as(form, weight)
    assert torch.equal(packed_as(form, weight.cuda()).parts["codes"].cpu(), here.parts["codes"])
    there = Packed(form, here.shape, {name: part.cuda() for name, part in here.parts.items()})
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(there.dense(dtype).cpu(), here.dense(dtype))
        if bnb.installed() and bnb.takes(there, dtype):
            theirs = bnb.dequantize(there, dtype)
            assert theirs.is_cuda and torch.allclose(theirs.cpu(), here.dense(dtype), rtol=2**-7, atol=1e-7)


@pytest.mark.parametrize("backend", ["torch", "bitsandbytes"])
def test_an_adapter_trains_on_an_nf4_base(backend: str) -> None:
    if backend == "bitsandbytes" and not bnb.installed():
        pytest.skip("bitsandbytes is not installed")
    losses = []
    for device, own in (("cpu", "torch"), ("cuda", backend)):
        base = load("tiny-qwen3", quantize={"kind": "nf4", "backend": own}, device=device)
        client = Service(base).training_client(small("lora"), optimizer=AdamWConfig(lr=1e-2))
        for step in range(STEPS):
            losses.append(client.forward_backward(examples(step)).mean)
            client.optim_step()
    assert losses[STEPS:] == pytest.approx(losses[:STEPS], rel=2e-2)
