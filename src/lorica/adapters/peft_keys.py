"""The names of tensors in a PEFT file, and which modules they belong to.

In: names as any PEFT version or a hand-made file writes them. Out: one canonical name for each tensor, without prefix
and without the adapter's name; names for the reverse way; shortest lists of targets. Refuses to know values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from lorica.core.errors import FormatError
from lorica.core.site import Site
from lorica.models.backbone import Backbone

PREFIX = "base_model.model."
OWN = "lorica."
"""Names of tensors that PEFT has no place for begin so; PEFT passes over them."""

_LEAVES = ("weight", "bias")
_SINGLE = {
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "lora_E",
    "vera_lambda_b",
    "vera_lambda_d",
    "ia3_l",
    "miss_block",
    "vera_A",
    "vera_B",
    "prompt_embeddings",
}
"""Tensors that are parameters themselves; the others are modules with a weight and perhaps a bias."""
_PATHS = {f"glora_{letter}" for letter in "ABCDE"}
"""Modules that hold `X`, or `Xd` and `Xu`, or zeros that nothing trains."""
_MODULES = {"lora_A", "lora_B", "ln_tuning_layers", "modules_to_save"}
_TOKENS = "|".join(sorted(_MODULES | _SINGLE | _PATHS, key=len, reverse=True))
_REPLACED = ".original_module."
_KEY = re.compile(rf"(?:(?P<module>.*)\.)?(?P<token>{_TOKENS})(?P<rest>(?:\.[^.]+)*)")


class Tensors:
    """What a file holds, under canonical names. Every tensor that is used is taken, so that what is left over can be
    named.
    """

    def __init__(self, tensors: Mapping[str, Tensor], backbone: Backbone, file: object) -> None:
        self.file = file
        self.adapters: set[str] = set()
        self._held: dict[str, tuple[str, Tensor]] = {}
        base = str(getattr(backbone.module, "base_model_prefix", "") or "")
        self._modules = {name for name, _ in backbone.module.named_modules()}
        self._inner = f"{base}." if base else ""
        self._written: dict[str, str] = {}
        self._bare = self._full = False  # whether names lack the trunk's prefix, or have it where the backbone has none
        for key, tensor in tensors.items():
            if _REPLACED in key and key.replace(_REPLACED, ".") in tensors:
                continue  # `bias="all"` writes the bias of a module that `modules_to_save` put another in place of
            name = key if key.startswith(OWN) else self._canonical(key)
            earlier = self._held.get(name)
            if earlier is not None and not torch.equal(earlier[1], tensor):  # `bias="all"` writes a head's bias twice
                raise FormatError(f"{file} holds {key!r} and {earlier[0]!r}, two values of one tensor.")
            self._held[name] = (key, tensor)
        if len(self.adapters) > 1:
            raise FormatError(f"{file} holds several adapters: {', '.join(sorted(self.adapters))}; one is right.")

    def _canonical(self, key: str) -> str:
        found = _KEY.fullmatch(key)
        if found is None:
            module, _, leaf = key.rpartition(".")
            return f"{self.resolve(module)}.{leaf}"
        module, token, rest = found["module"] or "", found["token"], [p for p in found["rest"].split(".") if p]
        leaf = rest.pop() if rest and (rest[-1] in _LEAVES or token in _PATHS) else ""
        if rest:
            self.adapters.add(".".join(rest))
        if token == "modules_to_save":
            return f"{self.resolve(module)}.{leaf}"
        if token in ("vera_A", "vera_B", "prompt_embeddings"):
            return token
        suffix = token if token in _SINGLE else f"{token}.{leaf or 'weight'}"
        return f"{self.resolve(module)}.{suffix}"

    def resolve(self, module: str) -> str:
        """The backbone's name of a module: prefixes of PEFT, and of the task model around the trunk, come and go."""
        module = f"{module}."
        nested = ""
        while module.endswith(".base_layer."):
            module, nested = module.removesuffix("base_layer."), f"{nested}.base_layer"
        for prefix in (PREFIX, "base_model."):
            if module.startswith(prefix):
                module = module.removeprefix(prefix)
                break
        module = module.rstrip(".")
        near = (module, self._inner + module, module.removeprefix(self._inner))
        found = next((name for name in near if name in self._modules), module)
        self._written[found] = module
        self._bare |= found != module and found == self._inner + module
        self._full |= found != module and module == self._inner + found
        return found + nested

    def as_written(self, module: str) -> str:
        """What the model that PEFT adapted calls a module of the backbone: the name that patterns of its config see."""
        if module in self._written:
            return self._written[module]
        return module.removeprefix(self._inner) if self._bare else f"{self._inner * self._full}{module}"

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def take(self, name: str) -> Tensor:
        """A tensor by canonical name. Raises FormatError when it is missing."""
        if name not in self._held:
            raise FormatError(f"{self.file} lacks the tensor {name!r}, which its settings call for.")
        return self._held.pop(name)[1]

    def give(self, name: str, tensor: Tensor) -> None:
        """Add a tensor under a canonical name, in place of those that it was made from."""
        self._held[name] = (name, tensor)

    def peek(self, name: str) -> Tensor:
        """A tensor that stays to be taken."""
        return self._held[name][1]

    def finish(self) -> None:
        """Raises FormatError when tensors are left over."""
        left = [key for key, _ in self._held.values()]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise FormatError(
                f"{self.file} holds the tensor {left[0]!r}{more}, which its settings and the backbone have no place "
                "for."
            )


def own_key(site: str, param: str) -> str:
    """The name of a tensor in Lorica's own layout; tensors that the whole adapter shares have no site."""
    return f"{OWN}site.{site}.{param}" if site else f"{OWN}shared.{param}"


def experts_module(site: Site) -> str:
    """The module whose parameter an expert's site is a slice of: `model.layers.0.mlp.experts`."""
    return site.name.removesuffix(f".{site.expert}.{site.role}")


def stacked(site: Site) -> str:
    """The name of that parameter: `model.layers.0.mlp.experts.down_proj`."""
    return f"{experts_module(site)}.{site.role}"


def parameter_of(site: Site) -> str | None:
    """The entry of `target_parameters` that adapts a site whose module is no linear layer to PEFT; None elsewhere."""
    if site.kind == "expert":
        return stacked(site)
    return f"{site.name}.weight" if site.router else None


def is_named(module: str, targets: Iterable[str] | str) -> bool:
    """PEFT's rule for `target_modules`: a string is a regular expression for the whole name, a list holds names and
    suffixes.
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == entry or module.endswith(f".{entry}") for entry in targets)


def shortest(wanted: Iterable[str], present: Iterable[str]) -> list[str] | str:
    """`target_modules` that select exactly `wanted` among `present`: last parts where they do, else names, else a
    pattern.
    """
    chosen, known = set(wanted), set(present)
    for entries in ({name.rpartition(".")[2] for name in chosen}, chosen):
        if {name for name in known if is_named(name, entries)} == chosen:
            return sorted(entries)
    return "|".join(re.escape(name) for name in sorted(chosen))
