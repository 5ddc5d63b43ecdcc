"""Checkpoints of a server as arguments: where commands are given `tinker://` paths, the server does the work.

In: paths, and the SDK's own environment. Out: a client. Refuses to know what is asked of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lorica.client.remote import ServiceClient

PREFIX = "tinker://"
URL, KEY = "TINKER_BASE_URL", "TINKER_API_KEY"


def on_server(paths: Sequence[str]) -> bool:
    """Whether all of these are a server's. Raises UsageError for a mixture with folders."""
    found = [path.startswith(PREFIX) for path in paths]
    if any(found) and not all(found):
        here = paths[found.index(False)]
        raise click.UsageError(
            f"{here} is a folder and {paths[found.index(True)]} is on a server; upload the one "
            "(ServiceClient.upload_adapter) or download the other."
        )
    return bool(found) and all(found)


def refuse_local(given: Mapping[str, Any]) -> None:
    """Raises UsageError for an option that means something only where the base is loaded here."""
    strange = next((name for name, value in given.items() if value not in (None, False, ())), None)
    if strange is not None:
        raise click.UsageError(f"{strange} needs the base on this machine; the server does what {PREFIX} paths ask.")


@contextmanager
def server() -> Iterator[ServiceClient]:
    """The client of the server that the environment names. Raises ConfigError, MissingError without the SDK."""
    from lorica.client.remote import ServiceClient
    from lorica.core.errors import ConfigError

    absent = [name for name in (URL, KEY) if not os.environ.get(name)]
    if absent:
        raise ConfigError(
            f"{PREFIX} paths are a server's, and {' and '.join(absent)} is not set.",
            hint="`lorica serve` prints both.",
        )
    client = ServiceClient()
    try:
        yield client
    finally:
        client.close("success").result(30)
