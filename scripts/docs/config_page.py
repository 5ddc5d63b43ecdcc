"""docs/reference/config.md: every setting, from the pydantic models themselves.

In: the config classes and the registry of methods. Out: Markdown. Refuses to know how a config is read.
"""

from __future__ import annotations

from pydantic import BaseModel

from lorica.adapters.analysis.directions_judge import JudgeThresholds
from lorica.adapters.analysis.directions_probe import ProbeConfig
from lorica.adapters.targets import KEYWORDS, Targets
from lorica.core.config import Config
from lorica.engine.settings import EngineSettings
from lorica.methods import all_methods
from lorica.recipes.compose.config import ComposeConfig, SoupsConfig
from lorica.recipes.config import DataConfig, SFTConfig
from lorica.recipes.configs import shipped
from lorica.recipes.directions import DirectionSettings
from lorica.sampling.params import SamplingParams
from lorica.server.settings import Limits, Settings, Snapshots
from lorica.training.optimizer import AdamWConfig
from scripts.docs.markdown import GENERATED, code, default_value, first_sentence, limits, table, type_name

SECTIONS: tuple[tuple[str, type[Config]], ...] = (
    ("A run", SFTConfig),
    ("`data`", DataConfig),
    ("`optimizer`", AdamWConfig),
    ("`targets`", Targets),
    ("Sampling", SamplingParams),
    ("`lorica compose`", ComposeConfig),
    ("`lorica compose --how lora_soups`", SoupsConfig),
    ("`lorica directions extract`", DirectionSettings),
    ("A judge's thresholds", JudgeThresholds),
    ("A probe", ProbeConfig),
    ("`lorica serve`", Settings),
    ("`limits`", Limits),
    ("`snapshots`", Snapshots),
    ("`engine`", EngineSettings),
)


def page() -> str:
    parts = [
        GENERATED,
        "# Settings",
        "A run is one YAML file, one `SFTConfig`. `lorica train FILE a.b=c` sets the field `b` of the section `a`; the "
        "value is YAML. An unknown key is an error that names its nearest neighbours. `--dry-run` prints the resolved "
        "config, with every default written out.",
        'The same classes are the Python API: `SFTConfig(data={"path": "rows.jsonl"})`.',
    ]
    for title, cls in SECTIONS:
        parts += [f"## {title}", f"`{cls.__module__}.{cls.__name__}`: {first_sentence(cls.__doc__)}", fields(cls)]
        if cls is Targets:
            words = ", ".join(code(word) for word in KEYWORDS)
            parts.append(
                f"Keywords of `include` and `exclude`: {words}, and `default`, which is what the method chooses."
            )
    parts += ["## Methods", "`method: {name: lora, rank: 8}` takes these settings."]
    for name, method in all_methods().items():
        parts += [f"### `{name}`", f"{first_sentence(method.__doc__)} See [the page](../methods/{name}.md)."]
        parts.append(fields(method) if method.model_fields else "It has no settings.")
    parts += ["## Shipped configs", "`lorica train NAME` runs one as it stands."]
    parts.append(table(("name", "what"), [(code(name), said) for name, said in shipped().items()]))
    return "\n\n".join(parts) + "\n"


def fields(cls: type[BaseModel]) -> str:
    """One row for each field of a config class."""
    rows = [
        (code(name), code(type_name(info.annotation) + limits(info)), default_value(info), info.description or "")
        for name, info in cls.model_fields.items()
    ]
    return table(("field", "type", "default", "meaning"), rows)
