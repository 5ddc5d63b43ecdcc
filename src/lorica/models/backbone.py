"""A backbone: a frozen network with its sites listed and its weights seen through one convention.

In: a `torch.nn.Module`. Out: sites, normalised views of frozen weights, where to write a merge, the parts of a language
model, a fingerprint. Refuses to know adapters, methods and batches, and never changes a weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lorica.core.errors import MethodError, MissingError, did_you_mean
from lorica.core.site import Site
from lorica.models.parts import LanguageModel, language_model
from lorica.models.sites import Place, list_places

SAMPLES = 1024
"""Elements of a tensor that the fingerprint reads; smaller tensors are read whole."""
RUN = 64
"""Neighbouring elements that it reads together."""


class FrozenWeight:
    """One site's frozen weight, as methods see it."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._norm: Tensor | None = None

    def matrix(self) -> Tensor:
        """The normalised weight (see `Site.shape`): a view of the base's own memory, without gradient.

        At the input site it is the embedding table, [dim, tokens]. Raises MethodError at attention sites.
        """
        site, owner = self._place.site, self._place.module
        if site.kind == "attention":
            raise MethodError(f"Attention site {site.name!r} has no weight of its own.")
        weight: Tensor = getattr(owner, self._place.attribute).detach()
        if site.expert is not None:
            weight = weight[site.expert]
        return weight.T if site.transposed or site.kind == "input" else weight

    def row_square_norm(self) -> Tensor:
        """`‖W₀[j]‖²` over all axes but the first, [out]; float32, or float64 for a float64 base. Kept until
        invalidated.
        """
        weight = self.matrix()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if self._norm is None or self._norm.device != weight.device or self._norm.dtype != dtype:
            # by blocks, so that a large bf16 table is never held in float32
            rows = max(1, 2**22 // max(1, weight[0].numel()))
            self._norm = torch.cat(
                [part.to(dtype).square().flatten(1).sum(1) for part in torch.split(_matrix(weight), rows)]
            )
        return self._norm

    def forget(self) -> None:
        """Drop the kept norm: the weight has changed."""
        self._norm = None


def _matrix(weight: Tensor) -> Tensor:
    """At least two axes, so that one reduction serves norms too."""
    return weight[:, None] if weight.ndim == 1 else weight


class Backbone:
    """A frozen network and what Lorica knows about it.

    Attributes:
        module: the network; every parameter has `requires_grad` off, and it is in eval mode.
        name: what it was loaded as. family: transformers' model type (`llama`), or `custom`.
        sites: every place where a method can act, the input first and then in module-tree order.
        trunk: for a causal language model, the module that maps ids to final hidden states; else None, also for one
            whose logits come about in a way of its own.
        head: its output embedding; `logits_transform(head(trunk(ids)[0]))` are the logits. head_site: its site's name.
        is_causal_lm: whether it predicts the next token.
        kept: what others computed from the weights, by a name of theirs; emptied by `invalidate`.
    """

    def __init__(self, module: nn.Module, *, name: str = "custom", tokenizer: Callable[[], Any] | None = None) -> None:
        self.module = module
        self.name = name
        self.family = str(getattr(getattr(module, "config", None), "model_type", None) or "custom")
        self.places = list_places(module)
        freeze(module)
        self.sites: dict[str, Site] = {key: place.site for key, place in self.places.items()}
        parts: LanguageModel | None = language_model(module)
        self.is_causal_lm = parts is not None
        self.trunk: nn.Module | None = parts.trunk if parts else None
        self.head: nn.Linear | None = parts.head if parts else None
        self.head_site = next((n for n, p in self.places.items() if p.module is self.head), None) if self.head else None
        self._transform = parts.transform if parts else None
        self._weights: dict[str, FrozenWeight] = {}
        self._make_tokenizer = tokenizer
        self._tokenizer: Any | None = None
        self._fingerprint: str | None = None
        self.kept: dict[str, Any] = {}
        self._stamp: tuple[Any, ...] | None = None

    @property
    def tokenizer(self) -> Any | None:
        """The transformers tokenizer that belongs to it, read on first use; None where there is none."""
        if self._tokenizer is None and self._make_tokenizer is not None:
            self._tokenizer = self._make_tokenizer()
        return self._tokenizer

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its first floating-point parameter."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where its first parameter is."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def module_of(self, site: str) -> nn.Module:
        """The module that acts at a site; for `input`, the token embedding. Raises MissingError."""
        return self._place(site).module

    def weight(self, site: str) -> FrozenWeight:
        """The frozen weight of a site, as methods see it. Raises MissingError."""
        if site not in self._weights:
            self._weights[site] = FrozenWeight(self._place(site))
        return self._weights[site]

    def bias(self, site: str) -> Tensor | None:
        """The frozen bias of a site, [out], a view without gradient; None where it has none. Raises MissingError."""
        place = self._place(site)
        if place.bias is None:
            return None
        bias: Tensor = getattr(place.module, place.bias).detach()
        return bias if place.site.expert is None else bias[place.site.expert]

    def parameter(self, site: str) -> tuple[nn.Module, str, int | None]:
        """Where a merge writes: the owner, the attribute of the weight, and the expert. Raises MissingError,
        MethodError.
        """
        place = self._place(site)
        if place.site.kind in ("attention", "input"):
            raise MethodError(f"Site {site!r} is of kind {place.site.kind!r} and has no weight to merge into.")
        return place.module, place.attribute, place.site.expert

    def invalidate(self) -> None:
        """Forget everything computed from weights. Call it after writing to them."""
        for weight in self._weights.values():
            weight.forget()
        self._fingerprint = None
        self.kept.clear()

    def refresh(self) -> None:
        """Forget what was computed from weights if one was written, moved or replaced since this was called last."""
        stamp = tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in self.module.parameters())
        if stamp != self._stamp and self._stamp is not None:
            self.invalidate()
        self._stamp = stamp

    def __getstate__(self) -> dict[str, Any]:
        """A copy has weights and modules of its own, so it starts without what was computed from these."""
        return {**self.__dict__, "kept": {}, "_stamp": None, "_weights": {}}

    @property
    def transforms_logits(self) -> bool:
        """Whether `logits_transform` is anything but the identity."""
        return self._transform is not None

    def logits_transform(self, logits: Tensor) -> Tensor:
        """What the model does to `head(hidden)`: Gemma's soft cap, Granite's and Cohere's scale; itself elsewhere."""
        return logits if self._transform is None else self._transform(logits)

    def fingerprint(self) -> str:
        """Sixteen hex digits over family, tensor names, shapes and sampled values: the same in every process.

        Values are rounded to bfloat16 first, so that one checkpoint loaded in two dtypes is one base. At most 1024
        elements of a tensor are read, in evenly spaced runs: it tells bases apart, and does not prove that no weight
        was touched.
        """
        if self._fingerprint is None:
            tensors = {name: t for name, t in self.module.state_dict().items() if isinstance(t, Tensor)}
            digest = hashlib.sha256(self.family.encode())
            digest.update("".join(f"{name}{tuple(tensor.shape)}" for name, tensor in tensors.items()).encode())
            digest.update(_samples(tensors.values()))
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def _place(self, site: str) -> Place:
        if site not in self.places:
            raise MissingError(f"Backbone {self.name!r} has no site {site!r}.{did_you_mean(site, self.places)}")
        return self.places[site]

    def __repr__(self) -> str:
        return f"Backbone({self.name!r}, family={self.family!r}, sites={len(self.sites)}, dtype={self.dtype})"


def wrap(module: nn.Module, *, name: str = "custom") -> Backbone:
    """Any torch module as a backbone, frozen in place. Raises FormatError for uninitialised lazy parameters."""
    return Backbone(module, name=name)


def freeze(module: nn.Module) -> None:
    """Turn off gradients and training mode, and kernels that read weights past every forward or cannot take their
    dtype.
    """
    module.requires_grad_(False).eval()
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0  # torch's own switch: only 1 (relu) and 2 (gelu) take the fused path
        down: Tensor | None = part._parameters.get("down_proj")
        config: Any = getattr(part, "config", None)
        if down is not None and down.dtype == torch.float64 and hasattr(config, "_experts_implementation_internal"):
            config._experts_implementation_internal = "eager"  # torch's grouped product has no float64


def _samples(tensors: Iterable[Tensor]) -> bytes:
    """Evenly spaced values of every tensor as bytes: those of floats, then all others."""
    floats: dict[torch.device, list[Tensor]] = {}
    others = []
    for tensor in tensors:
        if tensor.device.type == "meta" or tensor.numel() == 0:
            continue
        flat = tensor.detach().reshape(-1)
        if flat.numel() > SAMPLES:
            # whole runs, because single elements that lie far apart cost a cache line each
            step = (flat.numel() - RUN) // (SAMPLES // RUN - 1)
            flat = flat.as_strided((SAMPLES // RUN, RUN), (step, 1), flat.storage_offset()).reshape(-1)
        if flat.is_floating_point():
            floats.setdefault(flat.device, []).append(flat)
        else:
            others.append(flat.to(torch.int64).cpu())
    read = [torch.cat([s.to(torch.bfloat16) for s in own]).cpu().view(torch.uint8) for own in floats.values()]
    return b"".join(part.numpy().tobytes() for part in [*read, *(o.view(torch.uint8) for o in others)])
