"""Measures every method for a small fixed budget on the built-in model and data, and writes the figures into the docs.

In: nothing but the package. Out: docs/methods/measured.json and the part between the markers of each method's page.
It can be stopped at any moment: methods that are measured are kept, and the next call goes on with the others.

    python -m scripts.docs.measure_methods [--only NAME ...] [--fresh] [--write]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import lorica
from lorica.core.errors import TargetError
from lorica.data.example import Example
from lorica.methods import all_methods
from lorica.models.loading import locate
from lorica.recipes import quickstart, sft
from lorica.recipes.compare.config import default_rate
from lorica.recipes.compare.costs import step, step_time_over
from lorica.recipes.config import SFTConfig
from lorica.recipes.summary import what_is_trained
from scripts.docs.measured import fill_pages, read_results, write_results

ENDS = 5
"""Steps at each end whose mean loss is reported."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measure these methods again, and no others")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--write", action="store_true", help="measure nothing; write the stored figures into the pages")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rows", type=int, default=64, help="held-out rows that are answered")
    parser.add_argument("--pairs", type=int, default=9, help="pairs of steps, one with LoRA, that the time comes from")
    parser.add_argument("--data", default="everyday:train")
    parser.add_argument("--test", default="everyday:test")
    return parser.parse_args()


def with_biases(folder: Path) -> Path:
    """A copy of nano whose attention projections have biases, all zero: the same function, with something to train."""
    source = locate("nano")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["attention_bias"] = True
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(source / "model.safetensors")
    names = [name for name in tensors if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "o_proj")]
    tensors |= {name.removesuffix("weight") + "bias": tensors[name].new_zeros(tensors[name].shape[0]) for name in names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def configure(name: str, args: argparse.Namespace, folder: Path) -> tuple[SFTConfig, str]:
    """The run of one method, and a note where it is not the plain one."""
    config = quickstart.configure(name).replace(
        steps=args.steps, batch_size=args.batch_size, device="cpu", out=str(folder / name)
    )
    config = config.replace(data=config.data.replace(path=args.data))
    config = config.replace(optimizer=config.optimizer.replace(lr=default_rate(name)))
    if name != "bias":
        return config, ""
    model = with_biases(folder / "nano-with-biases")
    note = "nano has no biases; this is nano with zero biases added to its attention projections, the same function."
    return config.replace(model=str(model)), note


def batches(plan: sft.Plan, count: int) -> list[list[Example]]:
    return [[plan.prepared.examples[i] for i in next(plan.sampler)] for _ in range(count)]


def exact(plan: sft.Plan, args: argparse.Namespace, adapter: str | None) -> tuple[int, int]:
    """Held-out answers that are right, of how many."""
    asked, _ = quickstart.questions(args.test, plan.renderer, args.rows)
    client = plan.client.service.sampling_client(adapter)
    given = quickstart.answers(client, plan.renderer, asked)
    return sum(q.expected == a for q, a in zip(asked, given, strict=True)), len(asked)


def measure(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train one method and ask it. Raises Lorica's errors when it cannot be trained."""
    config, note = configure(name, args, folder)
    torch.manual_seed(config.seed)
    plan = sft.plan(config)
    losses = [step(plan.client, batch) for batch in batches(plan, args.steps)]
    right, rows = exact(plan, args, plan.client.adapter.name)
    lora = sft.plan(configure("lora", args, folder)[0])
    ratio = step_time_over(plan.client, lora.client, batches(lora, args.pairs + 1))
    trained = what_is_trained(plan.client.adapter, plan.backbone)
    return {
        "config": config.method,
        "lr": config.optimizer.lr,
        "parameters": trained.parameters,
        "share": trained.share,
        "first_loss": sum(losses[:ENDS]) / len(losses[:ENDS]),
        "loss": sum(losses[-ENDS:]) / len(losses[-ENDS:]),
        "exact": right,
        "rows": rows,
        "step_time_over_lora": ratio,
        "note": note,
    }


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on; figures of other settings are never mixed with these."""
    kept = {key: getattr(args, key) for key in ("steps", "batch_size", "rows", "pairs", "data", "test")}
    versions = {"lorica": lorica.__version__, "torch": torch.__version__.partition("+")[0]}
    base = lorica.load("nano", dtype="float32").fingerprint()
    return {"model": "nano", "base": base, "seed": 0, **kept, **versions}


def said(name: str, entry: dict[str, Any]) -> str:
    if "parameters" not in entry:
        return f"{name:<8} {entry['note']}"
    losses = f"loss {entry['first_loss']:.3f} → {entry['loss']:.3f}"
    return f"{name:<8} {losses}, {entry['exact']} of {entry['rows']} exact, {entry['step_time_over_lora']:.2f} × LoRA"


def main() -> int:
    args = options()
    results = read_results()
    if args.write:
        fill_pages(results)
        return 0
    torch.set_num_threads(1)
    wanted = settings(args)
    if args.only and not args.fresh and results["methods"] and results["settings"] != wanted:
        why = "the stored figures have other settings, and figures of two settings cannot share a table"
        print(f"error: {why}; measure all methods, or use --fresh.", file=sys.stderr)
        return 1
    if args.fresh or results["settings"] != wanted:
        results = {"settings": wanted, "methods": {}}
    names = args.only or [name for name in all_methods() if name not in results["methods"]]
    with tempfile.TemporaryDirectory() as folder:
        if "before" not in results:
            results["before"] = exact(sft.plan(configure("lora", args, Path(folder))[0]), args, None)[0]
        for name in names:
            began = time.monotonic()
            try:
                entry = measure(name, args, Path(folder))
            except TargetError as error:
                entry = {"note": f"Not measured, because `nano` has no place for it. {error}"}
            results["methods"][name] = entry
            write_results(results)
            print(f"{said(name, entry)}, {time.monotonic() - began:.0f} s", file=sys.stderr)
    fill_pages(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
