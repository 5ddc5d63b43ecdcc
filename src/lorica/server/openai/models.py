"""What `model` may name: a base model, an adapter by its path or its name, or a stack of adapters.

In: a name and who asks. Out: the backbone and the adapters' folders. Another tenant's adapter is answered as a missing
one, unless it is published. Refuses to know prompts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from lorica.core.errors import DataError, MissingError, did_you_mean
from lorica.server.backbones import Backbone
from lorica.server.openai.errors import RefusedError
from lorica.server.state import Server
from lorica.store import checkpoints
from lorica.store.checkpoints import Checkpoint

PAGE = 1000
SCHEME = "tinker://"


@dataclass(frozen=True, slots=True)
class Model:
    """A name that was found: `adapters` are local folders, innermost first."""

    name: str
    backbone: Backbone
    adapters: list[str]
    created: int


async def find(server: Server, name: str, tenant: str) -> Model:
    """What a request's `model` means; `a+b` is a stack, a innermost. Raises RefusedError 404."""
    backbone = server.backbones.find(name)
    if backbone is not None:
        return Model(name, backbone, [], int(server.started))
    found = await _adapter(server, name, tenant)
    stack = [found] if found is not None else []
    if found is None and "+" in name:
        for part in name.split("+"):
            inner = await _adapter(server, part, tenant)
            if inner is None:
                raise await _missing(server, part, tenant)
            stack.append(inner)
    if not stack:
        raise await _missing(server, name, tenant)
    bases = sorted({str(checkpoint.info.get("base_model")) for checkpoint in stack})
    if len(bases) > 1:
        raise RefusedError(400, "mismatch", f"{name!r} stacks adapters of {' and of '.join(bases)}.", param="model")
    backbone = server.backbones.find(bases[0])
    if backbone is None:
        sentence = f"{name!r} adapts {bases[0]!r}, which is not served here."
        raise RefusedError(404, "model_not_found", sentence, param="model")
    folders = [await server.places.read(checkpoint.artifact) for checkpoint in stack]
    return Model(name, backbone, folders, int(max(checkpoint.created for checkpoint in stack).timestamp()))


async def listed(server: Server, tenant: str) -> list[dict[str, Any]]:
    """Base models, then the tenant's adapters, each by its path, and by its name where only one has it."""
    told = [shown(Model(base.name, base, [], int(server.started))) for base in server.backbones.all()]
    own = await _own(server, tenant)
    count = Counter(checkpoint.name for checkpoint in own)
    for checkpoint in own:
        backbone = server.backbones.find(str(checkpoint.info.get("base_model")))
        if backbone is None:
            continue
        model = Model(checkpoint.path, backbone, [checkpoint.artifact], int(checkpoint.created.timestamp()))
        told.append(shown(model))
        if count[checkpoint.name] == 1 and server.backbones.find(checkpoint.name) is None:
            told.append({**shown(replace(model, name=checkpoint.name)), "root": checkpoint.path})
    return told


def shown(model: Model) -> dict[str, Any]:
    """A model as OpenAI's clients read it; `parent` is an adapter's base."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "lorica",
        "root": model.name,
        "parent": model.backbone.name if model.adapters else None,
        "max_model_len": model.backbone.info.get("context"),
    }


async def _adapter(server: Server, name: str, tenant: str) -> Checkpoint | None:
    """One adapter by its path, or by its name among the tenant's own. Raises RefusedError for a name of several."""
    if name.startswith(SCHEME):
        try:
            return await server.dispatcher.rt.work.checkpoint(name, tenant)
        except (DataError, MissingError):
            return None
    named = [checkpoint for checkpoint in await _own(server, tenant) if checkpoint.name == name]
    if len(named) > 1:
        paths = ", ".join(checkpoint.path for checkpoint in named[:3])
        sentence = f"{len(named)} adapters are called {name!r}; use a path: {paths}."
        raise RefusedError(400, "ambiguous", sentence, param="model")
    return named[0] if named else None


async def _own(server: Server, tenant: str) -> list[Checkpoint]:
    """The tenant's adapters that were saved to be sampled or uploaded, newest first."""
    found: list[Checkpoint] = []
    offset = 0
    while True:
        page = await server.database.aread(
            lambda c, start=offset: checkpoints.list_checkpoints(c, tenant, PAGE, start)  # type: ignore[misc]
        )
        found += [one for one in page.items if one.kind == "sampler" or one.info.get("uploaded")]
        offset += PAGE
        if offset >= page.total:
            return found


async def _missing(server: Server, name: str, tenant: str) -> RefusedError:
    known = [*(backbone.name for backbone in server.backbones.all()), *(one.name for one in await _own(server, tenant))]
    sentence = f"There is no model {name!r} here.{did_you_mean(name, known)} GET /v1/models lists them."
    return RefusedError(404, "model_not_found", sentence, param="model")
