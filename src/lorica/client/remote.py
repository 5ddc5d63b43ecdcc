"""The typed client of a Lorica server: the `tinker` SDK's own, with any method, targets, uploads and stacks.

In: methods, targets and adapter folders. Out: the SDK's training and sampling clients. What the SDK has no argument for
travels in `user_metadata`, so a stock client that writes the same there gets the same. Needs `lorica[serve]`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorica.adapters.targets import Targets
from lorica.client.words import RESERVED
from lorica.core.errors import ConfigError, DataError, FormatError, LoricaError, MissingError
from lorica.data.example import Example
from lorica.methods.base import Method
from lorica.methods.lora import LoRA

try:
    import httpx
    import tinker
except ImportError as error:
    raise MissingError(
        f"The remote client needs the package {error.name!r}, which is not installed.",
        hint="pip install 'lorica[serve]'",
    ) from None

FILES = ("adapter_config.json", "adapter_model.safetensors", "lorica.json")
"""What is read of an adapter folder; the last one is Lorica's own and may be absent."""
PAGE = 100


class ServiceClient(tinker.ServiceClient):  # type: ignore[misc]
    """`tinker.ServiceClient` for a Lorica server: `base_url` or `TINKER_BASE_URL`, `api_key` or `TINKER_API_KEY`.

    Every method of the SDK's class works as it does there.
    """

    def __init__(self, *args: Any, base_url: str | None = None, api_key: str | None = None, **options: Any) -> None:
        super().__init__(*args, base_url=base_url, api_key=api_key, **options)
        self._url = (base_url or os.environ.get("TINKER_BASE_URL") or "").rstrip("/")
        self._key = api_key or os.environ.get("TINKER_API_KEY") or ""

    def create_training_client(
        self,
        method: Method | None = None,
        base_model: str = "nano",
        *,
        targets: Targets | str | Sequence[str] | Mapping[str, Any] | None = None,
        seed: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
        optimizer: Any = None,
    ) -> Any:
        """A future of the SDK's `TrainingClient` for a new adapter of any method; `.result()` or await it.

        Args:
            method: LoRA with its defaults if not given.
            targets: what to adapt, with `rank_pattern` and `alpha_pattern` for single sites; else the method's own.
            seed: of the initial values; none lets the server draw one.
            user_metadata: texts kept with the run, whatever settings are called; `method`, `config`, `targets`, `alpha`
                and `lora_alpha` are taken, for this call writes what a run is.

        Raises: ConfigError for metadata that this call writes itself. What the server refuses, the future raises.
        """
        method = LoRA() if method is None else method
        metadata = metadata_of(method, targets, user_metadata)
        rank = getattr(method, "rank", 1)  # the SDK sends one for every method
        return self.create_lora_training_client(
            base_model, rank=rank, seed=seed, user_metadata=metadata, optimizer=optimizer
        )

    def create_sampling_client(
        self, model_path: str | Sequence[str] | None = None, base_model: str | None = None, **options: Any
    ) -> Any:
        """As the SDK's; several paths are a stack of adapters, innermost first."""
        if model_path is not None and not isinstance(model_path, str):
            model_path = ",".join(model_path)
        return super().create_sampling_client(model_path=model_path, base_model=base_model, **options)

    def upload_adapter(
        self, folder: str | Path, base_model: str, *, name: str | None = None, overwrite: bool = False
    ) -> str:
        """Give the server an adapter folder in PEFT's format; the path to continue, stack and sample it by.

        Settings, weights and Lorica's own file are sent; a README and the like stay. `name` is the folder's by default.

        Raises: MissingError, FormatError for a folder that is no adapter, DataError for what the server refuses.
        """
        folder = Path(folder)
        name = name or folder.resolve().name
        files = _files(folder)
        with self._http() as http:
            for file in files:
                with file.open("rb") as content:
                    _told(http.put(f"/adapters/{name}/files/{file.name}", content=content))
            body = {"base_model": base_model, "overwrite": overwrite}
            return str(_told(http.post(f"/adapters/{name}", json=body))["tinker_path"])

    def merge(
        self,
        paths: Sequence[str],
        name: str,
        how: str,
        *,
        weights: Sequence[float] | None = None,
        rank: int | None = None,
        overwrite: bool = False,
        **parameters: Any,
    ) -> str:
        """Combine checkpoints of one base by a rule of `lorica merge`; the path to sample, continue and stack it by.

        Args:
            paths: of the parents, in order. name: of the result. how: `ties`, `task_arithmetic` …
            weights: one for each parent. rank: most ranks a site keeps. parameters: of the rule, `density=0.3`.

        Raises: MissingError for a path that is not there, DataError for what the server refuses.
        """
        body: dict[str, Any] = {
            "paths": list(paths),
            "name": name,
            "how": how,
            "parameters": parameters,
            "weights": None if weights is None else list(weights),
            "rank": rank,
            "overwrite": overwrite,
        }
        with self._http() as http:
            return str(_told(http.post("/merge", json=body))["tinker_path"])

    def inspect(
        self,
        path: str,
        against: Sequence[str] = (),
        *,
        intruders: bool = False,
        top: int = 10,
        threshold: float = 0.5,
    ) -> dict[str, Any]:
        """What `lorica inspect --json` finds in a checkpoint, beside others. Raises MissingError, DataError."""
        search = {"intruders": intruders, "top": top, "threshold": threshold}
        body = {"path": path, "against": list(against), **search}
        with self._http() as http:
            return _told(http.post("/inspect", json=body))

    def delete(self, path: str) -> None:
        """Remove a checkpoint of this key's own. Raises MissingError."""
        run, kind, name = path.removeprefix("tinker://").split("/")
        with self._http() as http:
            response = http.delete(f"/training_runs/{run}/checkpoints/{kind}/{name}")
            if not response.is_success:
                _told(response)

    def list_adapters(self) -> Iterator[Any]:
        """Every checkpoint of this key, newest first, as the SDK's `Checkpoint`: saved, exported and uploaded ones."""
        offset = 0
        with self._http() as http:
            while True:
                page = _told(http.get("/checkpoints", params={"limit": PAGE, "offset": offset}))["checkpoints"]
                yield from map(tinker.types.Checkpoint.model_validate, page)
                offset += PAGE
                if len(page) < PAGE:
                    return

    def _http(self) -> httpx.Client:
        if not self._url or not self._key:
            raise ConfigError(
                "This call needs the server's URL and an API key.",
                hint="Give base_url and api_key, or set TINKER_BASE_URL and TINKER_API_KEY.",
            )
        return httpx.Client(base_url=f"{self._url}/api/v1", headers={"X-API-Key": self._key}, timeout=300)


def prompt_of(example: Example) -> Any:
    """An example's tokens as the SDK sends a prompt."""
    return tinker.types.ModelInput.from_ints(list(example.tokens))


def metadata_of(
    method: Method,
    targets: Targets | str | Sequence[str] | Mapping[str, Any] | None = None,
    user_metadata: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The `user_metadata` of a method: its name, and its settings and targets as JSON. Raises ConfigError."""
    own = dict(user_metadata or {})
    taken = [key for key in RESERVED if key in own]
    if taken:
        raise ConfigError(f"user_metadata has {taken[0]!r}, which is written from the method and the targets.")
    told = {**own, "method": method.name, "config": json.dumps(method.model_dump(mode="json"))}
    if targets is not None:
        told["targets"] = json.dumps(Targets.of(targets).model_dump(mode="json"))
    return told


def _files(folder: Path) -> list[Path]:
    """The files of an adapter. Raises MissingError, FormatError."""
    if not folder.is_dir():
        raise MissingError(f"There is no folder {str(folder)!r}.")
    present = [folder / name for name in FILES if (folder / name).is_file()]
    absent = [name for name in FILES[:2] if not (folder / name).is_file()]
    if absent:
        hint = None
        if (folder / "adapter_model.bin").is_file():
            hint = "adapter_model.bin is a pickle, which is never read; save it with safe_serialization=True."
        raise FormatError(f"{folder} is no adapter folder: it has no {absent[0]}.", hint=hint)
    return present


def _told(response: httpx.Response) -> dict[str, Any]:
    """The server's answer. Raises the error that it tells."""
    try:
        told = response.json()
    except ValueError:
        told = {}
    if response.is_success:
        return dict(told)
    message = str(told.get("detail") or f"The server answered {response.status_code}.")
    kind: type[LoricaError] = MissingError if response.status_code == 404 else DataError
    raise kind(message, hint=told.get("hint"))
