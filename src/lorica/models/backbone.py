"""A backbone: a frozen network with its sites listed and its weights seen through one convention.

In: a `torch.nn.Module`. Out: sites, normalised views of frozen weights, where to write a merge, the parts of a language
model, a fingerprint. Refuses to know adapters, methods and batches, and never changes a weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lorica.core.errors import MethodError, MissingError, did_you_mean
from lorica.core.site import Site
from lorica.models.blocks import blocks_of
from lorica.models.frozen import FrozenWeight
from lorica.models.original import Original
from lorica.models.parts import LanguageModel, language_model
from lorica.models.positions import position_scale
from lorica.models.quantize.config import Quantization
from lorica.models.quantize.linear import QuantizedLinear
from lorica.models.quantize.state import STATE
from lorica.models.sites import Place, list_places
from lorica.models.tree import Tree

SAMPLES = 1024
"""Elements of a tensor that the fingerprint reads; smaller tensors are read whole."""
RUN = 64
"""Neighbouring elements that it reads together."""


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
        quantization: how its linear weights are stored; None where they are there in full.
        origin: fingerprint of the backbone that was quantised, or the empty string.
        lineage: what its weights were made from, as those say who made them (`adapters.lineage`), None where nobody
            does; it is saved with the weights.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str = "custom",
        tokenizer: Callable[[], Any] | None = None,
        quantization: Quantization | None = None,
        origin: str = "",
    ) -> None:
        self.module = module
        self.tree = Tree(module)
        self.name = name
        self.quantization = quantization
        self.origin = origin
        self.lineage: dict[str, Any] | None = None
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
        self._original: Original | None = None

    @property
    def tokenizer(self) -> Any | None:
        """The transformers tokenizer that belongs to it, read on first use; None where there is none."""
        if self._tokenizer is None and self._make_tokenizer is not None:
            self._tokenizer = self._make_tokenizer()
        return self._tokenizer

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its first floating-point parameter; packed weights are dequantised to the same."""
        first = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), None)
        return first or next((m.dtype for m in self.packed_modules()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where its first parameter is."""
        first = next((p.device for p in self.module.parameters()), None)
        return first or next((m.device for m in self.packed_modules()), torch.device("cpu"))

    @property
    def blocks(self) -> dict[int, nn.Module]:
        """The blocks that the residual stream runs through, by number. Raises MethodError where it has no list of them,
        or several.
        """
        return blocks_of(self.trunk, self.name)

    def packed_modules(self) -> Iterator[QuantizedLinear]:
        """The modules whose weight is packed."""
        return iter(self.tree.packed)

    def parameter_count(self) -> int:
        """Weights and biases, packed ones too, each once."""
        packed = sum(m.out_features * m.in_features for m in self.packed_modules())
        return packed + sum(p.numel() for p in self.module.parameters())

    def weight_bytes(self) -> int:
        """What they take in memory."""
        packed = sum(m.packed.nbytes for m in self.packed_modules())
        return packed + sum(p.numel() * p.element_size() for p in self.module.parameters())

    def module_of(self, site: str) -> nn.Module:
        """The module that acts at a site; for `input`, the token embedding. Raises MissingError."""
        return self._place(site).module

    def weight(self, site: str) -> FrozenWeight:
        """The frozen weight of a site, as methods see it. Raises MissingError."""
        if site not in self._weights:
            self._weights[site] = FrozenWeight(self._place(site), self.original)
        return self._weights[site]

    def packed_from(self, full: Backbone | Callable[[], Backbone]) -> Backbone:
        """Say what its packed weights were made from: a backbone in full, or how to load it each time that it is asked
        for. `load(…, quantize=…)` does so itself.
        """
        self._original = Original((lambda: full) if isinstance(full, Backbone) else full, self.origin)
        return self

    def original(self) -> Original:
        """What its packed weights were made from. Raises MissingError where nobody has said so."""
        if self._original is None:
            raise MissingError(
                f"The full weights that {self.name!r} was packed from are not at hand, so what packing took from them "
                "is not known.",
                hint="Load the full model with quantize=…, or name it by `backbone.packed_from(load(…))`.",
            )
        return self._original

    def original_at_hand(self) -> AbstractContextManager[Any]:
        """Inside, what its packed weights were made from is loaded at most once, and only if it is asked for."""
        return nullcontext() if self._original is None else self._original.at_hand()

    def bias(self, site: str) -> Tensor | None:
        """The frozen bias of a site, [out], a view without gradient; None where it has none. Raises MissingError."""
        return self.weight(site).bias()

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
        tensors = [*self.tree.parameters, *(m.packed.parts["codes"] for m in self.tree.packed)]
        stamp = tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in tensors)
        if stamp != self._stamp and self._stamp is not None:
            self.invalidate()
        self._stamp = stamp

    def __getstate__(self) -> dict[str, Any]:
        """A copy has weights and modules of its own, so it starts without what was computed from these."""
        return {**self.__dict__, "kept": {}, "_stamp": None, "_weights": {}, "tree": Tree(self.module)}

    def drop(self, site: str) -> None:
        """Forget a site whose module was replaced; its weight is freed with its last user."""
        self._weights.pop(site, None)
        self.places.pop(site, None)
        self.kept.clear()

    def requantized(self, module: nn.Module, quantization: Quantization, origin: str) -> Backbone:
        """A backbone of the same name, tokenizer and lineage over another module."""
        made = Backbone(
            module, name=self.name, tokenizer=self._make_tokenizer, quantization=quantization, origin=origin
        )
        made.lineage = self.lineage
        return made

    @property
    def transforms_logits(self) -> bool:
        """Whether `logits_transform` is anything but the identity."""
        return self._transform is not None

    def logits_transform(self, logits: Tensor) -> Tensor:
        """What the model does to `head(hidden)`: Gemma's soft cap, Granite's and Cohere's scale; itself elsewhere."""
        return logits if self._transform is None else self._transform(logits)

    @property
    def position_scale(self) -> float:
        """What its rotary positions are divided by (position interpolation); 1 for plain ones."""
        return position_scale(self.module)

    def fingerprint(self) -> str:
        """Sixteen hex digits over family, tensor names, shapes and sampled values: the same in every process.

        Values are rounded to bfloat16 first, so that one checkpoint loaded in two dtypes is one base. At most 1024
        elements of a tensor are read, in evenly spaced runs: it tells bases apart, and does not prove that no weight
        was touched.
        """
        if self._fingerprint is None:
            state = self.module.state_dict().items()
            # the settings of packed weights name the dtype that they are dequantised to, which is no part of a base
            tensors = {name: t for name, t in state if isinstance(t, Tensor) and f".{STATE}" not in f".{name}"}
            digest = hashlib.sha256(self.family.encode())
            digest.update("".join(f"{name}{tuple(tensor.shape)}" for name, tensor in tensors.items()).encode())
            digest.update(_samples(tensors.values()))
            if self.position_scale != 1:  # the same weights under other positions are another network
                digest.update(f"positions / {self.position_scale}".encode())
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
