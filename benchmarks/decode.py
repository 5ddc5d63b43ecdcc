"""Decoding: one adapter over PEFT's `generate`, and 32 adapters in one batch over PEFT one at a time.

In: nothing. Out: time of a token and ratios of one run. Prompts cost the same in both and are taken off: a run of n +
1 new tokens minus one of a single token. PEFT's thirty-two tenants one at a time cost thirty-two times its one.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from torch import nn

from benchmarks.models import LINEARS, RANK, another, qwen3
from benchmarks.timing import as_json, environment, seconds, show
from lorica.engine.host import Host
from lorica.engine.sample import generate
from lorica.methods.lora import LoRA
from lorica.models.backbone import wrap
from lorica.sampling.params import SamplingParams

PROMPT, VOCABULARY = 32, 32_000


class Peft:
    """PEFT's own generate, greedy, one adapter, unmerged, over a copy of the model that shares its weights."""

    def __init__(self, base: nn.Module) -> None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS)
        self.model = get_peft_model(another(base), config).eval()
        self.ids = torch.randint(3, VOCABULARY, (1, PROMPT), device=next(base.parameters()).device)

    def __call__(self, tokens: int) -> None:
        self.model.generate(
            input_ids=self.ids,
            attention_mask=torch.ones_like(self.ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )


class Ours:
    """Our sampler, greedy, every row with an adapter of its own (None: the base)."""

    def __init__(self, host: Host, names: list[str | None]) -> None:
        self.host = host
        rng = torch.Generator().manual_seed(0)
        self.rows = [(torch.randint(3, VOCABULARY, (PROMPT,), generator=rng).tolist(), name) for name in names]

    def __call__(self, tokens: int) -> None:
        generate(self.host, self.rows, SamplingParams(max_tokens=tokens))


def main() -> None:
    """Run, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens that are timed")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tenants", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    base = qwen3(dtype=getattr(torch, options.dtype))
    peft = Peft(base)  # before our hooks, so that the copy carries none
    host = Host(wrap(base))
    for i in range(options.tenants):
        adapter = host.add(f"a{i}", LoRA(rank=RANK, alpha=2 * RANK), seed=i)
        adapter.flat.add_(0.01 * torch.randn_like(adapter.flat))
    tenants: list[str | None] = [f"a{i}" for i in range(options.tenants)]
    runs = {
        "peft, one adapter": peft,
        "ours, base alone": Ours(host, [None]),
        "ours, one adapter": Ours(host, ["a0"]),
        f"ours, {options.tenants} rows of the base": Ours(host, [None] * options.tenants),
        f"ours, {options.tenants} adapters": Ours(host, tenants),
    }
    step = step_times(runs, options.tokens, options.rounds)
    one, many = step["ours, one adapter"], step[f"ours, {options.tenants} adapters"]
    report = {f"{name}, ms a step": round(1e3 * value, 2) for name, value in step.items()} | {
        "one adapter: speed over PEFT": round(step["peft, one adapter"] / one, 2),
        f"{options.tenants} adapters: speed over PEFT one at a time": round(
            options.tenants * step["peft, one adapter"] / many, 2
        ),
        f"{options.tenants} adapters: tax over the base": round(
            many / step[f"ours, {options.tenants} rows of the base"] - 1, 2
        ),
    }
    if options.json:
        print(as_json(environment() | report))
    else:
        show(f"decode, {options.dtype}, r={RANK}: {environment()}", report)


def step_times(runs: dict[str, object], tokens: int, rounds: int) -> dict[str, float]:
    """Seconds of one step: the least of (n + 1 tokens) minus the least of (one token), over n, in interleaved
    rounds.
    """
    short, long = dict.fromkeys(runs, float("inf")), dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run(2)  # type: ignore[operator]
    for _ in range(rounds):
        for name, run in runs.items():
            short[name] = min(short[name], seconds(lambda run=run: run(1)))  # type: ignore[misc,operator]
            long[name] = min(long[name], seconds(lambda run=run: run(tokens + 1)))  # type: ignore[misc,operator]
    return {name: (long[name] - short[name]) / tokens for name in runs}


if __name__ == "__main__":
    main()
