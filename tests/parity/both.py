"""One model in two libraries: an adapter moves between Lorica and PEFT as a folder, and the logits are compared.

In: a method, a family, and a PEFT config or a target. Out: logits of both. The marks at the end are the warnings that
PEFT gives on its way, each with its reason; a module names those that its tests meet. Refuses to know what is asserted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lorica.adapters.adapter import Adapter
from lorica.adapters.peft_format import why_not
from lorica.engine.host import Host
from lorica.methods import Method
from lorica.models import Backbone
from lorica.models.factory import example_inputs
from tests.tiny import tiny

Make = Callable[[], Backbone]
TOLERANCE = 1e-5
"""Largest difference of float32 logits, relative to the largest logit."""


def close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal up to rounding."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach(), theirs.detach()
    assert float((ours - theirs).abs().max()) <= tolerance * max(1.0, float(theirs.abs().max()))


def of_family(family: str, **overrides: Any) -> Make:
    """A maker of equal tiny backbones."""
    return lambda: tiny(family, **overrides)


def run(model: nn.Module | Host, base: Backbone) -> Tensor:
    """What a model returns for the backbone's example batch; of PEFT's soft prompts, the text's positions alone."""
    given = example_inputs(base)
    out = model(**given)
    y: Tensor = out if isinstance(out, Tensor) else out.logits if hasattr(out, "logits") else out[0]
    return y[:, -given["input_ids"].shape[1] :] if "input_ids" in given and y.ndim == 3 else y


def perturb(tensors: Sequence[Tensor], seed: int = 3, size: float = 0.1) -> None:
    """Move tensors off their initial values, so that every one of them is seen."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor += size * torch.randn(tensor.shape, generator=rng).to(tensor)


def ours(base: Backbone, method: Method, targets: Any = None, *, seed: int = 0) -> Host:
    """A host with one active adapter `a`, moved off its initial values."""
    host = Host(base)
    adapter = host.add("a", method, targets, seed=seed, dtype=torch.promote_types(base.dtype, torch.float32))
    perturb([adapter.flat])
    host.activate("a")
    return host


def in_peft(module: nn.Module, folder: Path, **options: Any) -> Any:
    """The module with a folder's adapter, loaded by PEFT."""
    return peft.PeftModel.from_pretrained(module, str(folder), **options).eval()


@torch.no_grad()
def differ(host: Host) -> Tensor:
    """The logits of a host, which must not be those of its base."""
    y = run(host, host.backbone)
    with host.disabled():
        assert float((run(host, host.backbone) - y).abs().max()) > 1e-3
    return y


@torch.no_grad()
def to_peft(host: Host, make: Make, folder: Path) -> tuple[Tensor, Tensor]:
    """Logits of a host's adapter `a`, and of PEFT that loaded its folder."""
    y = differ(host)
    theirs = in_peft(make().module, host.save(folder, "a"))
    return y, run(theirs, host.backbone)


def peft_model(config: Any, make: Make, seed: int = 3, size: float = 0.1) -> Any:
    """A PEFT model, moved off its initial values."""
    torch.manual_seed(seed)
    return moved(peft.get_peft_model(make().module, copy.deepcopy(config)).eval(), seed, size)


def moved(model: Any, seed: int = 3, size: float = 0.1) -> Any:
    """A PEFT model after a step of what it trains."""
    perturb([p for p in model.parameters() if p.requires_grad], seed, size)
    return model


def loaded(folder: Path, make: Make) -> Host:
    """A host with the adapter of a folder, active."""
    host = Host(make())
    host.load(folder, "theirs")
    host.activate("theirs")
    return host


def contents(folder: Path) -> dict[str, bytes]:
    """Names and bytes of the files in a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@torch.no_grad()
def reads(folder: Path, make: Make, theirs: Tensor, tolerance: float = TOLERANCE) -> Adapter:
    """Check that a folder of PEFT's gives PEFT's logits here, and again from a folder of ours; the adapter.

    Our folder saves to the same bytes again, and PEFT reads it with those logits where it has the maths.
    """
    host = loaded(folder, make)
    y, base = differ(host), host.backbone
    close(y, theirs, tolerance)
    own = host.save(folder / "ours")
    again = loaded(own, make)
    assert torch.equal(run(again, base), y)
    assert contents(again.save(folder / "again")) == contents(own)
    if why_not(host.adapter("theirs"), base) is None:
        close(run(in_peft(make().module, own), base), theirs, tolerance)
    return host.adapter("theirs")


@torch.no_grad()
def from_peft(config: Any, make: Make, folder: Path) -> Adapter:
    """A new PEFT adapter, saved by PEFT and checked as `reads` does."""
    model = peft_model(config, make)
    model.save_pretrained(str(folder))
    return reads(folder, make, run(model, make()))


def lora(*targets: str, **fields: Any) -> Any:
    """A LoraConfig for a causal language model, small and not at PEFT's defaults."""
    fields = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": list(targets), **fields}
    return peft.LoraConfig(**fields)


# -- what PEFT warns of, and why nothing is wrong ----------------------------------------------------------------------


def _ignored(message: str, category: str) -> pytest.MarkDecorator:
    return pytest.mark.filterwarnings(f"ignore:{message}:{category}")


OLD_CHECKPOINTING = _ignored(".is_gradient_checkpointing. is deprecated", "FutureWarning")
"""PEFT 0.21 asks transformers for an attribute by its old name, in every `get_peft_model`."""
OLD_CACHE = _ignored(".past_key_values. is deprecated", "FutureWarning")
"""PEFT hands its prefix over under the old name."""
CONV1D = _ignored("fan_in_fan_out is set to", "UserWarning")
"""PEFT corrects `fan_in_fan_out` for each layer: GPT-2 has Conv1D and Linear layers, and there is one field."""
TIED = _ignored("Model has `tie_word_embeddings=True` and a tied layer is part of the adapter", "UserWarning")
"""PEFT warns of merging; nothing is merged where this mark stands."""
EMBEDDINGS_SAVED = _ignored("Setting `save_embedding_layers` to `True`", "UserWarning")
"""PEFT says that it writes the frozen embedding too."""
ODD_NORM = _ignored("Unsupported layer type '<class '.*Norm'>' encountered", "UserWarning")
"""PEFT's norm tuning does not list norms as layers that it knows."""
SHARDS = _ignored(r"Adapter 'default'. \d+ LoRA tensor.s. have invalid shape", "UserWarning")
"""A false alarm at `lora_bias`: PEFT takes a bias for a sharded matrix (defect 5)."""
NO_BIAS = _ignored("`lora_bias=True` was passed but the targeted layer", "UserWarning")
"""PEFT warns of merging a bias into a layer that has none; we refuse that merge."""
UNMATCHED = _ignored("The following (rank|alpha)_pattern keys did not match any targeted module", "RuntimeWarning")
"""PEFT looks for patterns of expert parameters among modules, and then applies them all the same."""
GROUPS = _ignored("LoRA adapter added to ConvNd layer with groups > 1", "UserWarning")
"""PEFT warns of merging; nothing is merged where this mark stands."""
REGENERATED = _ignored("Specified to not save vera_A and vera_B", "UserWarning")
"""What `save_projection=False` is for."""
