"""Two proofs about a trained adapter: `peft` reads it with the same logits, and merging it changes nothing that counts.

In: a loaded plan whose adapter is trained, and where its files are. Out: figures, and plain words where a proof
cannot be made. Refuses to know how training went.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorica.core.errors import MergeError, MethodError
from lorica.methods import get_method
from lorica.models import load
from lorica.recipes.sft import Plan


@dataclass(frozen=True, slots=True)
class PeftProof:
    """`status`: `same`, `different`, `absent` (peft is not installed) or `unsupported` (peft lacks the method).

    `difference` is the largest between peft's logits and ours, `effect` the largest between ours and the base's.
    """

    status: str
    version: str | None = None
    difference: float | None = None
    effect: float | None = None


@dataclass(frozen=True, slots=True)
class MergeProof:
    """`status`: `merged` or `impossible`; the largest difference of probe logits, and where the merged model is."""

    status: str
    reason: str | None = None
    difference: float | None = None
    path: str | None = None


TOLERANCE = 1e-4
"""Largest difference that counts as the same, relative to the largest logit; float32 arithmetic differs by about 1e-6.
"""


def peft_proof(ready: Plan, adapter: Path, prompts: Sequence[Sequence[int]]) -> PeftProof:
    """Load the adapter's folder with peft on a fresh base and compare its logits with ours."""
    if get_method(ready.config.method["name"]).peft is None:
        return PeftProof("unsupported")
    if importlib.util.find_spec("peft") is None:
        return PeftProof("absent")
    import peft

    host = ready.client.service.host
    config = ready.config
    fresh = load(config.model, dtype=config.dtype, device=config.device, quantize=config.quantize)
    host.eval()
    worst = largest = effect = 0.0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft says of transformers' names and layers is not the reader's business
        theirs: Any = peft.PeftModel.from_pretrained(fresh.module, str(adapter)).eval()
        for prompt in prompts:
            ids_1T = torch.tensor([list(prompt)], device=host.backbone.device)
            with host.rows([ready.client.adapter.name]):
                ours_1TV: Tensor = host(input_ids=ids_1T).logits.float()
            with host.rows([None]):
                base_1TV: Tensor = host(input_ids=ids_1T).logits.float()
            # peft also gives the logits of virtual tokens, which stand first
            other_1TV: Tensor = theirs(input_ids=ids_1T).logits[:, -ids_1T.shape[1] :].float()
            worst = max(worst, float((ours_1TV - other_1TV).abs().max()))
            effect = max(effect, float((ours_1TV - base_1TV).abs().max()))
            largest = max(largest, float(ours_1TV.abs().max()))
    same = worst <= TOLERANCE * max(1.0, largest) < effect
    return PeftProof("same" if same else "different", peft.__version__, worst, effect)


def merge_proof(ready: Plan, path: Path) -> MergeProof:
    """Merge, verify on probes, write the merged model to `path`, and unmerge."""
    from lorica.adapters.save_merged import save_merged

    host, name = ready.client.service.host, ready.client.adapter.name
    try:
        report = host.merge(name)
    except (MergeError, MethodError) as error:
        return MergeProof("impossible", reason=error.message)
    try:
        save_merged(ready.backbone, path)
    finally:
        host.unmerge()
        host.activate()
    return MergeProof("merged", difference=report.difference, path=str(path))
