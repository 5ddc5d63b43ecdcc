"""Two LoRA adapters made into one by singular values: through their factors, and as PEFT's `add_weighted_adapter` does.

In: nothing. Out: seconds for all layers of a random Qwen3, their ratio, and how far the results are from each other: as
they are timed, and with PEFT in float64.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import LINEARS, RANK, another, qwen3
from benchmarks.timing import command, least
from lorica.adapters.adapter import Adapter
from lorica.adapters.merging import change_of, make_merging
from lorica.adapters.merging.combine import combine
from lorica.engine.host import Host
from lorica.methods.lora import LoRA
from lorica.models import wrap

WEIGHTS = (0.7, 0.4)


def parents_of(host: Host, rank: int) -> list[Adapter]:
    """Two adapters on all linear maps, with factors of size 0.02."""
    rng = torch.Generator().manual_seed(0)
    made = []
    for name in ("a", "b"):
        adapter = host.add(name, LoRA(rank=rank, alpha=2 * rank), LINEARS)
        adapter.flat.copy_(0.02 * torch.randn(adapter.flat.shape, generator=rng))
        made.append(adapter)
    return made


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both on one model, in turn."""
    import peft

    module = qwen3(options.width, options.layers, 1000)
    host = Host(wrap(another(module)))
    adapters = parents_of(host, options.rank)
    with tempfile.TemporaryDirectory() as folder:
        paths = [host.save(Path(folder) / adapter.name, adapter) for adapter in adapters]
        theirs: Any = peft.PeftModel.from_pretrained(another(module), str(paths[0]), adapter_name="a")
        theirs.load_adapter(str(paths[1]), adapter_name="b")
    for adapter in adapters:
        adapter.folder = ""  # nothing is there any more for a lineage to hash
    ours: list[Adapter] = []

    def lorica() -> None:
        ours[:] = [combine(adapters, host.backbone, make_merging("svd", rank=options.rank), WEIGHTS)[0]]

    def by_peft() -> None:
        if "m" in theirs.peft_config:
            theirs.delete_adapter("m")
        theirs.add_weighted_adapter(["a", "b"], list(WEIGHTS), "m", combination_type="svd", svd_rank=options.rank)

    times = least({"lorica": lorica, "PEFT": by_peft}, options.rounds, warmup=0)
    report = {"sites": len(adapters[0].layout.sites), **{f"{name}, s": round(t, 3) for name, t in times.items()}}
    report["PEFT over lorica"] = round(times["PEFT"] / times["lorica"], 1)
    report["lorica to PEFT, largest distance"] = f"{_apart(host, ours[0], theirs):.1e}"
    theirs.double()
    by_peft()
    report["lorica to PEFT in float64, largest distance"] = f"{_apart(host, ours[0], theirs):.1e}"
    return report


def _apart(host: Host, merged: Adapter, theirs: Any) -> float:
    """The largest `‖ΔW − ΔW_PEFT‖ / ‖ΔW_PEFT‖` (Frobenius norms) over all sites."""
    largest = 0.0
    for site in merged.layout.sites:
        found = change_of(merged, host.backbone, site)
        assert found is not None
        layer = theirs.base_model.model.get_submodule(site)
        A_RI, B_OR = (getattr(layer, name)["m"].weight.detach().double() for name in ("lora_A", "lora_B"))
        peft_OI = layer.scaling["m"] * (B_OR @ A_RI)
        largest = max(largest, float((found.matrix() - peft_OI).norm() / peft_OI.norm()))
    return largest


def main() -> None:
    """Run, and print."""
    command(__doc__, "merging by singular values", measure, width=1024, layers=2, rank=RANK, rounds=1)


if __name__ == "__main__":
    main()
