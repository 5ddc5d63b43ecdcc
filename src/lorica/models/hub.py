"""Fetching a model from the Hugging Face hub into its cache.

In: a hub id and a revision. Out: the local directory, holding config, tokenizer and exactly one set of weights.
Files already in the cache are not fetched again, and then no network is needed. Refuses to know model classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lorica.core.errors import LoricaError, MissingError, did_you_mean
from lorica.models.builtin import BUILTIN
from lorica.models.directory import CONFIG, SINGLE

T = TypeVar("T")
SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]


def fetch(name: str, revision: str | None = None) -> Path:
    """The directory of a hub model. Raises MissingError: no such model, gated, no weights, or the hub out of reach."""
    from huggingface_hub import snapshot_download

    path = Path(
        _asking(
            name,
            revision,
            lambda: snapshot_download(name, revision=revision, allow_patterns=SMALL, ignore_patterns=["*/*"]),
        )
    )
    if not (path / CONFIG).is_file():
        raise MissingError(f"Hub repository {name!r} has no {CONFIG}, so it holds no model that transformers can load.")
    for weights in SINGLE:
        index = path / f"{weights}.index.json"
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [weights]
        if all(_fetch_file(name, shard, revision) for shard in shards):
            return path
    raise MissingError(f"Hub repository {name!r} has no weights that transformers can load ({' or '.join(SINGLE)}).")


def _fetch_file(name: str, file: str, revision: str | None) -> bool:
    """Whether the file exists; it is in the cache afterwards."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    def download() -> str | None:
        try:
            return str(hf_hub_download(name, file, revision=revision))
        except RemoteEntryNotFoundError:
            return None

    return _asking(name, revision, download) is not None


def _asking(name: str, revision: str | None, ask: Callable[[], T]) -> T:
    """Run a request; turn what the hub client raises into one sentence."""
    try:
        return ask()
    except (OSError, ValueError) as error:
        raise explain(name, revision, error) from None


def explain(name: str, revision: str | None, error: Exception) -> LoricaError:
    """The MissingError for an exception of the hub client."""
    from huggingface_hub import errors

    near = did_you_mean(name, BUILTIN)
    if isinstance(error, errors.GatedRepoError):
        return MissingError(
            f"Hub model {name!r} is gated.", hint="Accept its terms on its page, then run `hf auth login`."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return MissingError(f"Hub model {name!r} has no revision {revision!r}.")
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return MissingError(
            f"There is no model {name!r}: not built in, not a directory here, and not on the hub.{near}"
        )
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return MissingError(
            f"There is no model {name!r}: not built in, not a directory here, not in the hub's cache, and the hub is "
            f"out of reach.{near}",
            hint="`nano` and the `tiny-…` models need no network; `lorica models` lists them.",
        )
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    return MissingError(f"Model {name!r} could not be fetched from the hub: {reason.rstrip('.')}.{near}")
