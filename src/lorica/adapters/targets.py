"""Which sites an adapter acts on, and with which rank and alpha at each.

In: a backbone's sites, a method, and a target specification. Out: the selected sites, each with its resolved method.
A pattern that selects nothing is an error that names near misses. Refuses to know modules and tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from pydantic import Field, field_validator

from lorica.core.config import Config
from lorica.core.errors import MethodError, TargetError, did_you_mean
from lorica.core.site import Site
from lorica.methods.base import Method

KEYWORDS: dict[str, Callable[[Site], bool]] = {
    "all": lambda site: not site.head and not site.router,
    "all-linear": lambda site: site.kind == "linear" and not site.head and not site.router,
    "all-expert": lambda site: site.kind == "expert",
    "all-embedding": lambda site: site.kind == "embedding",
    "all-conv": lambda site: site.kind == "conv",
    "all-norm": lambda site: site.kind == "norm",
    "all-attention": lambda site: site.kind == "attention",
    "all-bias": lambda site: site.bias and not site.head and not site.router,
    "input": lambda site: site.kind == "input",
}
"""Words that select by kind. The output head and routers are left out unless they are named."""


class Targets(Config):
    """What to adapt: names, keywords and regular expressions, minus exclusions, within layers.

    An entry of `include` is a keyword (`all-linear`), a full site name, a dotted suffix of one (`q_proj`,
    `self_attn.q_proj`), or `re:` and a regular expression for the whole name. Keys of the patterns are regular
    expressions anchored at a dot and at the end of the name, as in PEFT; the first that matches wins.
    """

    include: tuple[str, ...] = Field(("default",), description="keywords, names, suffixes or `re:` patterns to adapt")
    exclude: tuple[str, ...] = Field((), description="the same kinds of entries, taken out again")
    layers: str | None = Field(None, description="layer indices such as `0-3,7`; only sites inside these blocks")
    rank_pattern: dict[str, int] = Field({}, description="rank by name pattern, instead of the method's rank")
    alpha_pattern: dict[str, float] = Field({}, description="alpha by name pattern, instead of the method's alpha")

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("layers", mode="before")
    @classmethod
    def _single(cls, value: Any) -> Any:
        """YAML reads `layers: 3` as a number."""
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @classmethod
    def of(cls, value: Targets | str | Sequence[str] | Mapping[str, Any] | None) -> Targets:
        """A specification from what users write: None is the method's default, a string or a list is `include`."""
        if value is None:
            return cls()
        if isinstance(value, Targets):
            return value
        return (
            cls(**value)
            if isinstance(value, Mapping)
            else cls(include=(value,) if isinstance(value, str) else tuple(value))
        )


def select(sites: Mapping[str, Site], method: Method, targets: Targets) -> dict[str, tuple[Site, Method]]:
    """The sites to adapt, in backbone order, each with the method's config there. Raises TargetError, MethodError."""
    include = [
        part for entry in targets.include for part in (_defaults(sites, method) if entry == "default" else (entry,))
    ]
    present = {site.layer for site in sites.values() if site.layer is not None}
    layers = layer_numbers(targets.layers, present) if targets.layers is not None else None
    chosen: set[str] = set()
    for entry in include:
        found = _matches(entry, sites, method)
        chosen |= {name for name in found if layers is None or sites[name].layer in layers}
    for entry in targets.exclude:
        chosen -= set(_matches(entry, sites, None))
    if not chosen:
        raise TargetError(
            f"Targets {include} minus {list(targets.exclude)} within layers {targets.layers} select nothing."
        )
    used: set[str] = set()
    picked = {name: (site, _resolve(site, method, targets, used)) for name, site in sites.items() if name in chosen}
    unused = (set(targets.rank_pattern) | set(targets.alpha_pattern)) - used
    if unused:
        raise TargetError(f"Pattern {sorted(unused)[0]!r} matches no adapted site, so it would change nothing.")
    return picked


def _defaults(sites: Mapping[str, Site], method: Method) -> tuple[str, ...]:
    """The method's default entries; of a tuple, those that select something here. Raises TargetError when none does."""
    if isinstance(method.default_targets, str):
        return (method.default_targets,)
    present = tuple(entry for entry in method.default_targets if _named(entry, sites, method))
    if not present:
        raise TargetError(
            f"Method {method.name!r} looks for {_or(method.default_targets)} by default, and this backbone has none of "
            "them.",
            hint="Name the targets: `lorica models MODEL` lists the sites.",
        )
    return present


def _named(entry: str, sites: Mapping[str, Site], method: Method) -> bool:
    """Whether an entry selects a site that the method can adapt."""
    try:
        return bool(_matches(entry, sites, method))
    except TargetError:
        return False


def _matches(entry: str, sites: Mapping[str, Site], method: Method | None) -> list[str]:
    """Names selected by one entry. With a method, keywords keep to its kinds and explicit names must fit them."""
    if entry in KEYWORDS:
        found = [s.name for s in sites.values() if KEYWORDS[entry](s) and (method is None or s.kind in method.kinds)]
        if not found:
            kinds = "" if method is None else f" that {method.name!r} can adapt ({', '.join(sorted(method.kinds))})"
            raise TargetError(f"This backbone has no {entry!r} sites{kinds}.")
        return found
    if entry.startswith("re:"):
        pattern = _compile(entry[3:])
        found = [name for name in sites if pattern.fullmatch(name)]
    else:
        found = [name for name in sites if name == entry or name.endswith("." + entry)]
    if not found:
        known = [*KEYWORDS, *{s.role for s in sites.values()}, *sites]
        raise TargetError(
            f"Target {entry!r} matches no site of this backbone.{did_you_mean(entry, known)}",
            hint="`lorica models MODEL` lists the sites; a regular expression is written `re:...`.",
        )
    if method is not None:
        fit = [name for name in found if sites[name].kind in method.kinds]
        if not fit:
            site = sites[found[0]]
            raise TargetError(
                f"Method {method.name!r} cannot adapt {site.name!r}: it is of kind {site.kind!r}, "
                f"not {_or(method.kinds)}."
            )
        # a suffix may name sites of several kinds (an attention module and its projections); the method takes its own
        found = fit
    return found


def _resolve(site: Site, method: Method, targets: Targets, used: set[str]) -> Method:
    """The method with the rank and alpha that the patterns give at this site."""
    changes: dict[str, Any] = {}
    for field, patterns in (("rank", targets.rank_pattern), ("alpha", targets.alpha_pattern)):
        for key, value in patterns.items():
            if _compile(rf"(.*\.)?({key})").fullmatch(site.name):
                if field not in type(method).model_fields:
                    raise MethodError(
                        f"Method {method.name!r} has no {field!r}, so {field}_pattern {key!r} cannot apply."
                    )
                used.add(key)
                changes[field] = value
                break
    return method.replace(**changes) if changes else method


def layer_numbers(text: str, present: Collection[int]) -> set[int]:
    """Layers of `0-3,7`. Raises TargetError for bad syntax and for layers that are not present."""
    match = re.fullmatch(r"\s*\d+(-\d+)?(\s*,\s*\d+(-\d+)?)*\s*", text)
    if match is None:
        raise TargetError(f"Layers {text!r} is not a list such as '0-3,7'.")
    wanted: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        wanted |= set(range(int(first), int(last or first) + 1))
    if not wanted or not wanted <= set(present):
        raise TargetError(
            f"Layers {text!r} are not all in this backbone, which has layers 0 to {max(present, default=-1)}."
        )
    return wanted


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise TargetError(f"{pattern!r} is not a regular expression: {error}.") from None


def _or(words: Iterable[str]) -> str:
    return " or ".join(repr(word) for word in sorted(words))
