"""The service through the stock SDK: what a step costs it, how long small things take, and how it samples beside PEFT.

In: nothing. Out: CPU time of the server's processes, latencies, memory, ratios of one run. The model is a random Qwen3
of 4.2 million weights; a step is 8 × 256 tokens, pipelined. Server and clients share the machine, so CPU time of the
server's processes is what counts; latencies are minima.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tinker
import torch
from tinker import types

from benchmarks.decode import Peft
from benchmarks.models import LINEARS, RANK, device
from benchmarks.timing import command, least
from lorica.client.local import Service
from lorica.data.example import Example
from lorica.engine.sample import generate
from lorica.methods.lora import LoRA
from lorica.models import load, tiny
from lorica.models.backbone import Backbone
from lorica.models.saving import save_backbone
from lorica.recipes.compare.costs import seconds
from lorica.sampling.params import SamplingParams
from scripts.cookbook.served import Served, serve

BATCH, TOKENS, VOCABULARY, PROMPT = 8, 256, 4096, 32
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
TICK = os.sysconf("SC_CLK_TCK")
ADAM = types.AdamParams(learning_rate=1e-4)


def cpu(pids: Iterable[int]) -> float:
    """CPU seconds that these processes have used."""
    spent = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13] for pid in pids]
    return sum(int(user) + int(system) for user, system in spent) / TICK


def resident(pids: Iterable[int]) -> float:
    """Resident memory of these processes, in MB."""
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def datum(rng: random.Random, tokens: int) -> types.Datum:
    """A random sequence, trained on as a whole."""
    ids = [rng.randrange(10, VOCABULARY) for _ in range(tokens + 1)]
    inputs: Any = {"target_tokens": ids[1:], "weights": [1.0] * tokens}
    return types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=inputs)


class Tenant:
    """A client with a session and a run of its own."""

    def __init__(self, served: Served, model: str, number: int) -> None:
        self.rng = random.Random(number)
        self.service = tinker.ServiceClient(base_url=served.url, api_key=served.key)
        self.client = self.service.create_lora_training_client(base_model=model, rank=RANK, seed=number).result()
        self.sampler: tinker.SamplingClient | None = None

    def step(self) -> None:
        passed = self.client.forward_backward([datum(self.rng, TOKENS) for _ in range(BATCH)], "cross_entropy")
        stepped = self.client.optim_step(ADAM)
        passed.result()
        stepped.result()

    def smallest(self) -> None:
        self.client.forward_backward([datum(self.rng, 4)], "cross_entropy").result()

    def snapshot(self) -> None:
        self.sampler = self.client.save_weights_and_get_sampling_client().result()

    def sample(self, tokens: int) -> None:
        assert self.sampler is not None
        prompt = types.ModelInput.from_ints([self.rng.randrange(10, VOCABULARY) for _ in range(PROMPT)])
        wanted = types.SamplingParams(max_tokens=tokens, temperature=1.0, stop=[])
        made = self.sampler.sample(prompt=prompt, num_samples=1, sampling_params=wanted).result()
        assert len(made.sequences[0].tokens) == tokens


def together(tenants: list[Tenant], act: Callable[[Tenant], None], times: int = 1) -> float:
    """All tenants at once, each `times` times; wall seconds."""

    def turns(tenant: Tenant) -> None:
        for _ in range(times):
            act(tenant)

    start = time.perf_counter()
    with ThreadPoolExecutor(len(tenants)) as pool:
        list(pool.map(turns, tenants))
    return time.perf_counter() - start


def model_at(folder: Path) -> Path:
    """The model's directory, with nano's tokenizer."""
    tokenizer: Any = load("nano").tokenizer
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    made = tiny("qwen3", vocab_size=VOCABULARY, **SIZES, **ends)
    return save_backbone(Backbone(made.module, name="bench", tokenizer=lambda: tokenizer), folder / "bench")


def training(
    served: Served, model: str, counts: list[int], steps: int, alone: float
) -> tuple[dict[str, Any], list[Tenant]]:
    """First step, smallest request, cost of a step at each number of tenants, memory of a tenant."""
    report: dict[str, Any] = {"ready after, s": round(served.started, 2)}
    tenants = [Tenant(served, model, 0)]
    report["first step after ready, s"] = round(together(tenants, Tenant.step), 3)
    small = [together(tenants, Tenant.smallest) for _ in range(5 * steps)]
    report["smallest warm request, ms"] = round(1e3 * min(small), 1)
    before, first = resident(served.pids()), len(tenants)
    for count in counts:
        tenants += [Tenant(served, model, number) for number in range(len(tenants), count)]
        report |= step_cost(served, tenants[:count], steps, alone)
    if len(tenants) > first:
        grown = (resident(served.pids()) - before) / (len(tenants) - first)
        report[f"memory of a tenant ({len(tenants)} at work), MB"] = round(grown, 1)
    return report, tenants


def step_cost(served: Served, tenants: list[Tenant], steps: int, alone: float, label: str = "") -> dict[str, Any]:
    """CPU of the server for a step, beside the library's `alone`, and the API process's share of it."""
    together(tenants, Tenant.step, 2)
    api = [served.process.pid]
    engines = [pid for pid in served.pids() if pid not in api]
    before = cpu(api), cpu(engines)
    wall = together(tenants, Tenant.step, steps)
    spent_api, spent_engine = cpu(api) - before[0], cpu(engines) - before[1]
    name, done = f"{len(tenants)} tenants{label}", len(tenants) * steps
    return {
        f"{name}: server CPU of a step, s": round((spent_api + spent_engine) / done, 3),
        f"{name}: over a step of the library": round((spent_api + spent_engine) / done / alone, 2),
        f"{name}: API over engine, CPU": round(spent_api / max(spent_engine, 1e-9), 3),
        f"{name}: tokens/s": round(done * BATCH * TOKENS / wall),
    }


def idle_tenants(
    served: Served, model: str, tenants: list[Tenant], count: int, steps: int, alone: float
) -> dict[str, Any]:
    """A step of one tenant while `count` others are registered, and the memory that these take."""
    before = resident(served.pids())
    service = tenants[0].service
    kept = [service.create_lora_training_client(base_model=model, rank=RANK, seed=i).result() for i in range(count)]
    grown = (resident(served.pids()) - before) / len(kept)
    cost = step_cost(served, tenants[:1], steps, alone, f" of {len(tenants) + count} registered")
    return cost | {f"memory of a registered tenant ({count} idle), MB": round(grown, 2)}


def peft_of(folder: Path, adapters: int) -> Peft:
    """PEFT over the same model, with the adapters that the service's clients have by default."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device())
    return Peft(base, [*LINEARS, "lm_head"], adapters=adapters, sampled=True)


def in_process(folder: Path, tokens: int, rounds: int) -> dict[str, float]:
    """The same step and the same sample by the library in this process: what the service adds shows beside it."""
    service = Service(load(str(folder), device=device()))
    client = service.training_client(LoRA(rank=RANK, alpha=32), targets=[*LINEARS, "lm_head"])
    rng = random.Random(0)

    def ids(count: int) -> list[int]:
        return [rng.randrange(10, VOCABULARY) for _ in range(count)]

    def step() -> None:
        client.forward_backward([Example.whole(ids(TOKENS + 1)) for _ in range(BATCH)])
        client.optim_step()

    def sample() -> None:
        generate(service.host, [(ids(PROMPT), client.adapter)], SamplingParams(max_tokens=tokens, temperature=1.0))

    peft = peft_of(folder, 1)
    return least({"step": step, "sample": sample, "peft": lambda: peft(tokens)}, rounds)


def sampling(served: Served, tenants: list[Tenant], tokens: int, folder: Path, rounds: int) -> dict[str, Any]:
    """All of these tenants sample once at a time, and in turn with that PEFT samples for one of as many adapters. On a
    GPU wall time counts.
    """
    peft = peft_of(folder, len(tenants))
    for tenant in tenants:
        tenant.snapshot()
    together(tenants, lambda tenant: tenant.sample(tokens))
    peft(tokens)
    theirs, best, wall = float("inf"), float("inf"), float("inf")
    for _ in range(rounds):
        theirs = min(theirs, *(seconds(lambda: peft(tokens)) for _ in range(2)))
        before = cpu(served.pids())
        wall = min(wall, together(tenants, lambda tenant: tenant.sample(tokens)))
        best = min(best, cpu(served.pids()) - before)
    name, clock, spent = f"{len(tenants)} adapters, {tokens} tokens sampled", "CPU", best
    if torch.cuda.is_available():
        clock, spent = "wall", wall
    return {
        f"{name}: tokens/s": round(len(tenants) * tokens / wall),
        f"{name}: PEFT, s a sample": round(theirs, 3),
        f"{name}: speed over PEFT one at a time, {clock}": round(len(tenants) * theirs / max(spent, 1 / TICK), 2),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One server, everything in turn."""
    counts, lengths = ([int(n) for n in flag.split(",")] for flag in (options.tenants, options.tokens))
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        model = str(model_at(home))
        alone = in_process(Path(model), lengths[0], options.rounds)
        library = {
            "a step of the library, s": round(alone["step"], 3),
            "one sample of the library: speed over PEFT": round(alone["peft"] / alone["sample"], 2),
        }
        with serve([model], home) as served:
            report, tenants = training(served, model, counts, options.steps, alone["step"])
            report |= idle_tenants(served, model, tenants, options.idle, options.steps, alone["step"])
            report |= sampling(served, tenants[:1], lengths[0], Path(model), options.rounds)
            tenants += [Tenant(served, model, number) for number in range(len(tenants), options.samplers)]
            for tokens in lengths:
                report |= sampling(served, tenants[: options.samplers], tokens, Path(model), options.rounds)
    return library | report


def main() -> None:
    """Run, and print."""
    flags = {"tenants": "1,2,4,8,16", "steps": 4, "idle": 64, "samplers": 32, "tokens": "64,128,256", "rounds": 3}
    command(__doc__, "server", measure, **flags)


if __name__ == "__main__":
    main()
