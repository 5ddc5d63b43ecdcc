"""Shipped configs: each is a YAML file that runs as it is, and is meant to be copied and changed.

In: a name such as `quickstart`. Out: its path. Refuses to know what the settings mean.
"""

from __future__ import annotations

from pathlib import Path

from lorica.core.errors import MissingError, did_you_mean

_HERE = Path(__file__).parent


def shipped() -> dict[str, str]:
    """Names of the shipped configs, each with the first line of its header comment."""
    files = sorted(_HERE.glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for file in files}


def find_config(name: str) -> Path:
    """The file that `name` stands for: a path, or a shipped name. Raises MissingError with near names."""
    path = Path(name)
    if path.is_file():
        return path
    known = shipped()
    if name in known:
        return _HERE / f"{name}.yaml"
    raise MissingError(
        f"There is no config file {name!r}, and no shipped config of that name.{did_you_mean(name, known)}",
        hint=f"Shipped configs: {', '.join(known)}.",
    )
