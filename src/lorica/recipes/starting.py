"""How a run's adapter begins: new, from an adapter that is trained further, or on top of others.

In: a config and a service over its base. Out: a client, and the config with what a continued adapter decides written
out. Refuses to know data and steps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorica.adapters.adapter import Adapter
from lorica.adapters.lineage import KEY, lineage_at
from lorica.adapters.parents import lineage_of
from lorica.adapters.targets import Targets
from lorica.client.local import Service, TrainingClient
from lorica.core.errors import ConfigError, LoricaError
from lorica.engine.host import Host
from lorica.recipes.config import SFTConfig
from lorica.recipes.own_base import has_own_base

KEPT_OUT = {"data", "out", "save_every", "keep", "eval_every", "track", "project"}
"""Settings that leave no mark on the values, and the data, which have a place of their own."""
OTHERWISE = "or train a new adapter: on top of it with `stack_on`, or on the merged model."


def check_start(config: SFTConfig) -> None:
    """Raises ConfigError where a base of the run's own would be made beneath adapters of another base."""
    if has_own_base(config) and (config.continue_from or config.stack_on):
        name = config.method["name"]
        raise ConfigError(
            f"{name!r} on weights that are packed for it makes a base of its own, which no earlier adapter acts on.",
            hint="Name the base of the earlier run, `model=RUN/base`, and leave `quantize` out.",
        )


def start(config: SFTConfig, service: Service, steps: int) -> tuple[SFTConfig, TrainingClient]:
    """The client of a run, and its config. A continued adapter decides the method and the targets.

    Raises ConfigError where the config asks for others; MethodError, TargetError, FormatError, MismatchError.
    """
    on = config.stack_on
    if config.continue_from is None:
        client = service.training_client(
            config.make_method(), config.targets, seed=config.seed, optimizer=config.optimizer, steps=steps, on=on
        )
        return config, client
    client = service.continue_client(config.continue_from, optimizer=config.optimizer, steps=steps, on=on)
    return _settled(config, config.continue_from, client.adapter, service.host), client


def parents_of(adapter: Adapter) -> list[str]:
    """The hashes of what a run stands on, to be the same when it is resumed."""
    return [parent.sha256 for parent in lineage_of(adapter).parents]


def on_own_base(adapter: Adapter, base: Path) -> None:
    """Let the lineage of an adapter that has a base of its own name the directory where that will be."""
    known = lineage_of(adapter)
    if known.base is not None:
        adapter.meta[KEY] = known.replace(base=replace(known.base, name=str(base))).to_meta()


def recipe_of(config: SFTConfig) -> dict[str, Any]:
    """What the lineage says of the run."""
    return {"name": "sft", **config.model_dump(mode="json", exclude=KEPT_OUT)}


def _settled(config: SFTConfig, folder: str, adapter: Adapter, host: Host) -> SFTConfig:
    """The config with the adapter's method and targets. Raises ConfigError where it says otherwise."""
    own = {"name": adapter.method.name, **adapter.method.model_dump(mode="json")}
    if "method" in config.model_fields_set:
        _check_method(config.method, own, folder)
    targets = _targets(folder, adapter, host)
    if "targets" in config.model_fields_set and config.targets != targets:
        _check_sites(config, folder, adapter, host)
    return config.replace(method=own, targets=targets)


def _check_method(asked: Mapping[str, Any], own: Mapping[str, Any], folder: str) -> None:
    for key in ("name", *own):
        if asked.get(key) != own[key]:
            raise ConfigError(
                f"method.{key} is {asked.get(key)!r}; the adapter in {folder}, which this run continues, has "
                f"{own[key]!r}, and a continued adapter keeps its method.",
                hint=f"Leave `method` out, {OTHERWISE}",
            )


def _check_sites(config: SFTConfig, folder: str, adapter: Adapter, host: Host) -> None:
    asked, own = host.layout(adapter.method, config.targets), adapter.layout
    if asked.key == own.key:
        return
    odd = next((site for site in {**asked.sites, **own.sites} if (site in asked.sites) != (site in own.sites)), None)
    if odd is None:
        odd = next(site for site in own.sites if own.methods[site] != asked.methods[site])
        what = f"give {odd!r} other settings than"
    else:
        what = (
            f"select {odd!r}, which is no site of" if odd in asked.sites else f"leave out {odd!r}, which is a site of"
        )
    raise ConfigError(
        f"The targets {what} the adapter in {folder}, which this run continues; a continued adapter keeps its sites.",
        hint=f"Leave `targets` out, {OTHERWISE}",
    )


def _targets(folder: str, adapter: Adapter, host: Host) -> Targets:
    """Targets that select the adapter's sites with their settings: those that it was made with where they are known."""
    said = (lineage_at(folder).recipe or {}).get("targets") or adapter.meta.get("lorica_targets")
    spelled = _spelled(adapter)
    for candidate in (said, spelled):
        try:
            targets = Targets.of(candidate)
            if candidate is not None and host.layout(adapter.method, targets).key == adapter.layout.key:
                return targets
        except LoricaError:  # what is recorded does not fit; the names do
            continue
    return spelled


def _spelled(adapter: Adapter) -> Targets:
    """The adapter's sites by name, with a pattern for each of another rank or alpha."""
    patterns: dict[str, dict[str, Any]] = {"rank": {}, "alpha": {}}
    for name, method in adapter.layout.methods.items():
        for field, found in patterns.items():
            value = getattr(method, field, None)
            if value is not None and value != getattr(adapter.method, field, None):
                found[re.escape(name)] = value
    return Targets(include=tuple(adapter.layout.sites), rank_pattern=patterns["rank"], alpha_pattern=patterns["alpha"])
