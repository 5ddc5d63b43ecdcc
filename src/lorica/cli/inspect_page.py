"""What `lorica inspect` prints: tables that fit a terminal, and sentences.

In: what a folder holds and what was found in it. Out: text. Refuses to know how anything is measured.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorica.cli.output import shell, size, table

if TYPE_CHECKING:
    from lorica.adapters.analysis.intruders import Intruders
    from lorica.adapters.analysis.report import Inspection
    from lorica.adapters.analysis.similarity import Similarity
    from lorica.adapters.analysis.sites import GroupMeasures, SiteMeasures
    from lorica.adapters.contents import Contents

WIDTH = 100
FEW = 8
"""Anomalies of one kind that are listed; the others are counted."""


def contents_page(found: Contents) -> str:
    """What is in the files."""
    base = found.base
    facts: list[tuple[str, Any]] = [
        ("method", found.method or f"{found.peft_type} (written by PEFT)"),
        (
            "base",
            f"{base.get('name')}" + (f" ({base['family']}, {base['fingerprint']})" if "fingerprint" in base else ""),
        ),
        ("read by peft", "yes" if found.peft_type else f"no: {found.not_peft}"),
        ("values", f"{found.values:,}, {size(found.bytes)} on disk"),
    ]
    facts += [] if found.sites is None else [("sites", f"{found.sites:,}")]
    facts += [] if found.seed is None else [("seed", found.seed)]
    facts += [("comes from", told)] if (told := _origin(found)) else []
    facts += [(f"meta: {key}", value) for key, value in found.meta.items() if key != "lineage"]
    room = max(len(name) for name, _ in facts) + 2
    return "\n\n".join(
        (
            "\n".join(f"{name:<{room}}{value}" for name, value in facts),
            table(("setting", "value"), [(key, str(value)) for key, value in found.settings.items()]),
            _tensors(found),
        )
    )


def _origin(found: Contents) -> str:
    """The parents and how they became it, in a line; `lorica lineage` has the rest."""
    from lorica.adapters.lineage import Lineage

    known = Lineage.from_meta(found.meta, found.path)
    words = [f"{parent.relation} {parent.path or parent.method}" for parent in known.parents]
    words += [f"by {known.how}"] if known.how else []
    words += [f"trained by {known.recipe.get('name')}"] if known.recipe else []
    words += [f"on {known.data.path}"] if known.data else []
    return f"{', '.join(words)}  (lorica lineage {shell(found.path)})" if words else ""


def _tensors(found: Contents) -> str:
    """Groups of tensors; values that are not finite have a column where there are some."""
    wrong = any(group.not_finite for group in found.groups)
    headers = ("tensors", "count", "shape", "values", "rms", "largest", *(("not finite",) if wrong else ()))
    rows = [
        (
            *(group.name, group.count, " ".join(map(_shape, group.shapes)), group.values, group.rms, group.largest),
            *((group.not_finite,) if wrong else ()),
        )
        for group in found.groups
    ]
    return table(headers, rows)


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "1"


def inspection_page(found: Inspection, *, sites: bool) -> str:
    """What the adapter does to the weights, and what that cannot say."""
    parts: list[str] = []
    if found.sites:
        parts.append(f"change of the weights: ‖ΔW‖ {found.norm:.4g} over {len(found.sites):,} sites")
        parts += [_groups("module", found.roles), _groups("layer", found.layers)]
        parts += [_sites(found.sites)] if sites else []
    elif any(one.reason == "changes no weight" for one in found.unread):
        parts.append("It changes no weight: it adds virtual tokens, or keys and values.")
    parts += _unread(found)
    parts.append(_anomalies(found))
    parts += [_similarity(found.similarity)] if found.similarity else []
    parts += [_intruders(found.intruders)] if found.intruders is not None else []
    parts.append(wrapped("what this cannot say", [limit.says for limit in found.limits]))
    return "\n\n".join(parts)


def _groups(what: str, groups: Sequence[GroupMeasures]) -> str:
    """One row for each group; the columns that the base gives only where it was there."""
    based = any(group.relative is not None for group in groups)
    headers = [what, "sites", "‖ΔW‖", "energy", "eff. rank", "rank use", "k90"]
    rows = [
        [
            group.name,
            group.sites,
            _short(group.norm),
            f"{group.energy:.1%}",
            _short(group.effective_rank),
            "-" if group.rank_use is None else f"{group.rank_use:.0%}",
            _short(group.k90),
            *([_percent(group.relative), _percent(group.largest)] if based else []),
        ]
        for group in groups
    ]
    return table([*headers, *(["‖ΔW‖/‖W‖", "largest"] if based else [])], rows)


def _sites(sites: Sequence[SiteMeasures]) -> str:
    headers = ("site", "rank", "moving", "eff.", "stable", "part.", "k90", "‖ΔW‖", "energy", "‖ΔW‖/‖W‖")
    rows = [
        (
            site.site,
            site.rank,
            site.moving,
            _short(site.effective_rank),
            _short(site.stable_rank),
            _short(site.participation_ratio),
            site.k90,
            _short(site.norm),
            f"{site.energy:.1%}",
            _percent(site.relative),
        )
        for site in sites
    ]
    return table(headers, rows)


def _short(value: float | None) -> float | str:
    return "-" if value is None else float(f"{value:.3g}")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _unread(found: Inspection) -> list[str]:
    """Sites that need the base; the other reasons are said elsewhere."""
    sites = [one for one in found.unread if one.reason == "needs the base"]
    if not sites:
        return []
    return [f"{_number(len(sites), 'site')} changed in a way that depends on the base: not measured without --base."]


def _number(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def _anomalies(found: Inspection) -> str:
    if not found.anomalies:
        return "anomalies: none" if found.sites else "anomalies: none in the files; no change was measured"
    whole = len(found.sites) + len(found.unread)
    lines = ["anomalies"]
    for kind, count in Counter(anomaly.kind for anomaly in found.anomalies).items():
        where = "all sites" if count == whole else _number(count, "site")
        lines.append(f"  {kind}: {where} ({found.rules[kind]})")
        own = [anomaly for anomaly in found.anomalies if anomaly.kind == kind]
        if count == whole and len({anomaly.says for anomaly in own}) == 1 and count > FEW:
            lines.append(f"    each: {own[0].says}")
            continue
        lines += [f"    {anomaly.site}: {anomaly.says}" for anomaly in own[:FEW]]
        lines += [f"    and {count - FEW} more (--json has all)"] if count > FEW else []
    return "\n".join(lines)


def _similarity(pairs: Sequence[Similarity]) -> str:
    names = list(dict.fromkeys(name for pair in pairs for name in (pair.first, pair.second)))
    letters = {name: _letter(number) for number, name in enumerate(names)}
    rows = [
        (
            f"{letters[pair.first]}, {letters[pair.second]}",
            _short(pair.cosine),
            _overlap(pair.out, pair.out_chance),
            _overlap(pair.into, pair.into_chance),
            pair.shared,
            pair.alone,
        )
        for pair in pairs
    ]
    head = ("pair", "cosine", "φ output (chance)", "φ input (chance)", "sites shared", "of one alone")
    legend = "\n".join(f"  {letter}  {name}" for name, letter in letters.items())
    return f"similarity\n{legend}\n\n{table(head, rows)}"


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else f"#{number + 1}"


def _overlap(value: float | None, chance: float | None) -> str:
    return "-" if value is None or chance is None else f"{value:.3f} ({chance:.3f})"


def _intruders(found: Intruders) -> str:
    with_some = sum(bool(site.which) for site in found.sites)
    head = (
        f"intruder dimensions: {found.count} in {with_some} of {_number(len(found.sites), 'weight')} "
        f"(|cos| below {found.threshold:g} among the {found.top} leading vectors)"
    )
    tables = []
    for what, counts in (("layer", found.by_layer()), ("module", found.by_role())):
        own = Counter("-" if s.layer is None else str(s.layer) for s in found.sites) if what == "layer" else None
        of = own if own is not None else Counter(site.role for site in found.sites)
        tables.append(table((what, "intruders", "weights"), [(name, n, of[name]) for name, n in counts.items()]))
    return "\n\n".join([head, *tables])


def wrapped(title: str, sentences: Sequence[str]) -> str:
    """A title and its sentences as a list."""
    lines = [textwrap.fill(one, WIDTH, initial_indent="  - ", subsequent_indent="    ") for one in sentences]
    return "\n".join([title, *lines])
