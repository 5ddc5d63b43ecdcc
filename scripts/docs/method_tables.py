"""The generated tables inside hand-written pages: the settings of each method, and the list of methods.

In: the registry. Out: Markdown, put between the markers of a page. Refuses to know what was measured.
"""

from __future__ import annotations

from lorica.core.update import LinearUpdate
from lorica.engine.host import Host
from lorica.methods import Method, all_methods
from lorica.models import tiny
from scripts.docs.config_page import fields
from scripts.docs.markdown import code, put, table


def settings(name: str) -> str:
    """The settings of one method."""
    cls = all_methods()[name]
    targets = cls.default_targets if isinstance(cls.default_targets, str) else ", ".join(cls.default_targets)
    said = f"`method: {{name: {name}}}`. Sites: {', '.join(sorted(cls.kinds))}. Default targets: `{targets}`."
    return f"{said}\n\n{fields(cls)}" if cls.model_fields else f"{said}\n\nIt has no settings of its own."


def methods(prefix: str) -> str:
    """One line for each method; `prefix` leads from the page to docs/methods."""
    rows = [
        (
            f"[`{name}`]({prefix}{name}.md)",
            cls.summary,
            f"[{cls.paper.venue}](https://arxiv.org/abs/{cls.paper.arxiv})",
            ", ".join(sorted(cls.kinds)),
            "yes" if merges(cls) else "no",
            peft_file(cls),
        )
        for name, cls in all_methods().items()
    ]
    return table(("method", "what is trained", "paper", "sites", "merges", "PEFT file"), rows)


def merges(cls: type[Method]) -> bool:
    """Whether its update can be folded into weights."""
    return not cls.kinds <= {"input", "attention"}


def peft_file(cls: type[Method]) -> str:
    """The PEFT type that holds it; or that its update is factors alone, so that an export is a plain LoRA."""
    if cls.peft is not None:
        return code(cls.peft.peft_type)
    if "linear" not in cls.kinds:
        return "no"
    host = Host(tiny("gpt2"))
    name, site = next((name, site) for name, site in host.backbone.sites.items() if site.kind == "linear" and site.bias)
    update = host.add("probe", cls(), name).update(site.name, host.backbone.weight(name))
    assert isinstance(update, LinearUpdate)
    return "`LORA`, exported" if update.factors and update.low_rank_only else "no"


def with_settings(page: str, name: str) -> str:
    return put(page, "settings", settings(name))


def with_methods(page: str, prefix: str) -> str:
    return put(page, "methods", methods(prefix))
