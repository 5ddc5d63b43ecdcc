"""`lorica methods`: the registry as a table, and one method's settings with defaults and descriptions.

In: perhaps a name. Out: what the method's class declares. Refuses to know any method by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lorica.cli.output import emit, json_option, table

if TYPE_CHECKING:
    from lorica.methods import Method


@click.command()
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the methods, or explain one.

    With NAME: its equation, paper, default targets, and every setting with its default.
    """
    from lorica.methods import all_methods, get_method

    if name is not None:
        found = _describe(get_method(name))
        emit(found, _page(found), as_json=as_json)
        return
    rows = [_describe(cls) for cls in all_methods().values()]
    cells = [
        (r["name"], r["summary"], f"arXiv {r['paper']['arxiv']}", ", ".join(r["kinds"]), r["merges"], r["peft"] or "-")
        for r in rows
    ]
    emit(rows, table(("name", "what", "paper", "sites", "merges", "PEFT type"), cells), as_json=as_json)


def _describe(cls: type[Method]) -> dict[str, Any]:
    from pydantic_core import PydanticUndefined

    fields = [
        {
            "name": field,
            "type": str(cls.model_json_schema()["properties"][field].get("type", _union(cls, field))),
            "default": None if info.default is PydanticUndefined else info.default,
            "description": info.description,
        }
        for field, info in cls.model_fields.items()
    ]
    return {
        "name": cls.name,
        "summary": cls.summary,
        "paper": {"title": cls.paper.title, "venue": cls.paper.venue, "arxiv": cls.paper.arxiv},
        "kinds": sorted(cls.kinds),
        "default_targets": cls.default_targets,
        "merges": not cls.kinds <= {"input", "attention"},
        "peft": cls.peft.peft_type if cls.peft else None,
        "identity_at_init": cls.identity_at_init,
        "doc": cls.__doc__ or "",
        "fields": fields,
    }


def _union(cls: type[Method], field: str) -> str:
    """The type of a field with alternatives, as JSON names them."""
    parts = cls.model_json_schema()["properties"][field].get("anyOf", [])
    return " or ".join(str(part.get("type", "?")) for part in parts) or "choice"


def _page(found: dict[str, Any]) -> str:
    import inspect

    paper = found["paper"]
    targets = found["default_targets"]
    rows = [(f["name"], f["type"], _default(f["default"]), f["description"]) for f in found["fields"]]
    return "\n".join(
        [
            f"{found['name']}: {found['summary']}",
            "",
            inspect.cleandoc(found["doc"]),
            "",
            f"paper            {paper['title']}, {paper['venue']}, arXiv {paper['arxiv']}",
            f"sites            {', '.join(found['kinds'])}",
            f"default targets  {targets if isinstance(targets, str) else ', '.join(targets)}",
            f"merges           {'yes' if found['merges'] else 'no'}",
            f"PEFT type        {found['peft'] or 'none'}",
            "",
            table(("setting", "type", "default", "what it does"), rows) if rows else "It has no settings.",
        ]
    )


def _default(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
