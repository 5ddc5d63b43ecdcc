"""Decoding: one adapter over PEFT's `generate`, and 32 adapters in one batch over PEFT one at a time.

In: nothing. Out: time of a token and ratios of one run. Prompts cost the same in both and are taken off: a run of n +
1 new tokens minus one of a single token. PEFT's thirty-two tenants one at a time cost thirty-two times its one.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.models import LINEARS, RANK, another, qwen3
from benchmarks.timing import command, products_share, seconds
from lorica.engine.host import Host
from lorica.engine.sample import generate
from lorica.methods.lora import LoRA
from lorica.models.backbone import wrap
from lorica.sampling.params import SamplingParams

PROMPT, VOCABULARY = 32, 32_000


class Peft:
    """PEFT's own generate, unmerged, over a copy of the model that shares its weights; one adapter after the other."""

    def __init__(
        self, base: Any, targets: Sequence[str] = LINEARS, *, adapters: int = 1, sampled: bool = False
    ) -> None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(targets))
        self.model = get_peft_model(another(base), config, adapter_name="0")
        for number in range(1, adapters):
            self.model.add_adapter(str(number), config)
        self.model.eval()
        self.ids = torch.randint(
            3, base.get_input_embeddings().num_embeddings, (1, PROMPT), device=next(base.parameters()).device
        )
        self.sampled = sampled
        self._turns = itertools.cycle(map(str, range(adapters))) if adapters > 1 else None

    def __call__(self, tokens: int) -> None:
        if self._turns is not None:
            self.model.set_adapter(next(self._turns))
        self.model.generate(
            input_ids=self.ids,
            attention_mask=torch.ones_like(self.ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=self.sampled,
            use_cache=True,
            pad_token_id=0,
        )


class Ours:
    """Our sampler, greedy, every row with an adapter of its own (None: the base)."""

    def __init__(self, host: Host, names: list[str | None]) -> None:
        self.host = host
        rng, vocabulary = torch.Generator().manual_seed(0), host.backbone.weight("input").matrix().shape[1]
        self.rows = [(torch.randint(3, vocabulary, (PROMPT,), generator=rng).tolist(), name) for name in names]

    def __call__(self, tokens: int) -> None:
        generate(self.host, self.rows, SamplingParams(max_tokens=tokens))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One step of every variant."""
    base = qwen3(options.width, dtype=options.dtype, shape=options.shape)
    peft = Peft(base)  # before our hooks, so that the copy carries none
    host = Host(wrap(base))
    for i in range(options.tenants):
        adapter = host.add(f"a{i}", LoRA(rank=RANK, alpha=2 * RANK), seed=i)
        adapter.flat.add_(0.01 * torch.randn_like(adapter.flat))
    tenants: list[str | None] = [f"a{i}" for i in range(options.tenants)]
    many, rows = f"ours, {options.tenants} adapters", f"ours, {options.tenants} rows of the base"
    runs: dict[str, Callable[[int], None]] = {
        "peft, one adapter": peft,
        "ours, base alone": Ours(host, [None]),
        "ours, one adapter": Ours(host, ["a0"]),
        rows: Ours(host, [None] * options.tenants),
        many: Ours(host, tenants),
    }
    step = step_times(runs, options.tokens, options.rounds)
    theirs = step["peft, one adapter"]
    shares: dict[str, Any] = {}
    for name, run in runs.items() if not torch.cuda.is_available() else ():
        shares[f"{name}: share of matrix products"] = round(products_share(lambda run=run: run(options.tokens)), 2)  # type: ignore[misc]
    return {f"{name}, ms a step": round(1e3 * value, 2) for name, value in step.items()} | {
        "one adapter: speed over PEFT": round(theirs / step["ours, one adapter"], 2),
        f"{options.tenants} adapters: speed over PEFT one at a time": round(options.tenants * theirs / step[many], 2),
        f"{options.tenants} adapters: tax over the base": round(step[many] / step[rows] - 1, 2),
        **shares,
    }


def step_times(runs: dict[str, Callable[[int], None]], tokens: int, rounds: int) -> dict[str, float]:
    """Seconds of one step: the least of (n + 1 tokens) minus the least of (one token), over n, in interleaved
    rounds.
    """
    short, long = dict.fromkeys(runs, float("inf")), dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run(2)
    for _ in range(rounds):
        for name, run in runs.items():
            short[name] = min(short[name], seconds(lambda run=run: run(1)))  # type: ignore[misc]
            long[name] = min(long[name], seconds(lambda run=run: run(tokens + 1)))  # type: ignore[misc]
    return {name: (long[name] - short[name]) / tokens for name in runs}


def main() -> None:
    """Run, and print."""
    command(__doc__, "decode", measure, dtype="bfloat16", width=1024, shape="", tokens=24, rounds=8, tenants=32)


if __name__ == "__main__":
    main()
