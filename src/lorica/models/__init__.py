"""Backbones: load one by name, wrap any module, or make a tiny random one. Nothing heavy is imported until then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from lorica.models.backbone import Backbone
    from lorica.models.quantize.config import Quantization

__all__ = ["Backbone", "load", "names", "tiny", "wrap"]


def load(
    name_or_path: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    revision: str | None = None,
    position_scale: float = 1.0,
    quantize: Quantization | str | Mapping[str, Any] | None = None,
) -> Backbone:
    """A frozen backbone from a built-in name, a local directory or a Hugging Face hub id, looked for in that order.

    `dtype` is a torch dtype or its name; "auto" keeps bfloat16 checkpoints in bfloat16 and loads all others in float32.
    `position_scale` f divides rotary positions by f, for f times the context (position interpolation); an adapter is
    bound to the f that it was trained at. `quantize` packs the linear weights, all but the head's: `nf4` (QLoRA's, with
    double quantisation), `nvfp4` and others, with options as in `nf4,double=false`; see `Quantization`. A directory
    whose weights are packed already (bitsandbytes' nf4, or saved by Lorica) needs no such word.

    Raises MissingError when nothing has that name or a file is absent, FormatError when a file is corrupt or holds an
    architecture that the installed transformers lacks, ConfigError for an unknown dtype or device, an f below 1 or a
    quantisation that does not fit, MethodError for an f above 1 without plain rotary positions.
    """
    from lorica.models.loading import load_backbone

    return load_backbone(
        name_or_path, dtype=dtype, device=device, revision=revision, position_scale=position_scale, quantize=quantize
    )


def wrap(module: nn.Module, *, name: str = "custom") -> Backbone:
    """Any torch module as a backbone, frozen in place (`requires_grad` off, eval mode). Raises FormatError."""
    from lorica.models import backbone

    return backbone.wrap(module, name=name)


def tiny(family: str, *, seed: int = 0, dtype: torch.dtype | None = None, **overrides: Any) -> Backbone:
    """A tiny random backbone of one family, for tests; `overrides` are fields of its transformers config.

    Families: llama, qwen3, qwen3-moe, gemma, gpt2, bert, vit, and the plain modules mlp and conv. The same seed gives
    the same weights everywhere, and torch's global random state is left alone. `dtype` is float32 unless given.
    Raises MissingError for an unknown family and ConfigError for an unknown override.
    """
    from lorica.models.factory import make_tiny

    return make_tiny(family, seed=seed, dtype=dtype, **overrides)


def names() -> dict[str, str]:
    """The built-in names that `load` accepts, each with one line of description."""
    from lorica.models.builtin import BUILTIN

    return dict(BUILTIN)


def __getattr__(name: str) -> Any:
    if name == "Backbone":
        from lorica.models.backbone import Backbone

        return Backbone
    raise AttributeError(f"module 'lorica.models' has no attribute {name!r}")
