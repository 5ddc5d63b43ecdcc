"""What a server is started with, and the limits it keeps.

In: the command line's values. Out: a validated, frozen record, with the places in the data directory. Refuses to know
engines and databases.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from lorica.core.config import Config
from lorica.core.errors import ConfigError

MIB = 2**20


class Limits(Config):
    """What one tenant, and one request, may ask for. Zero means no limit where it says so."""

    body_bytes: int = Field(64 * MIB, gt=0, description="largest request body")
    upload_bytes: int = Field(1024 * MIB, gt=0, description="largest upload of an adapter")
    rank: int = Field(1024, gt=0, description="largest rank of a new run")
    num_samples: int = Field(1024, gt=0, description="most samples of one request")
    topk: int = Field(1024, gt=0, description="widest table of top-k log-probabilities")
    tokens_per_minute: int = Field(0, ge=0, description="tokens that one tenant may send in a minute; 0 is no limit")
    concurrent_samples: int = Field(4096, gt=0, description="samples of one tenant that may be unfinished")
    pending_requests: int = Field(4096, gt=0, description="requests of one run that may be unfinished")
    storage_bytes: int = Field(0, ge=0, description="bytes of checkpoints that one tenant may keep; 0 is no limit")
    resident_adapters: int = Field(
        0, ge=0, description="runs of living sessions that one tenant may have at once; 0 is no limit"
    )


class Snapshots(Config):
    """When a run's state is written, so that its journal can be shortened."""

    every_requests: int = Field(64, gt=0, description="finished requests of a run between two snapshots")
    every_bytes: int = Field(16 * MIB, gt=0, description="bytes of a run's requests between two snapshots")


class Settings(Config):
    """All of `lorica serve`."""

    models: tuple[str, ...] = Field(description="backbones to serve: built-in names, directories or hub ids")
    data_dir: Path = Field(Path("lorica-data"), description="where records, artifacts and secrets are kept")
    host: str = Field("127.0.0.1", description="address to listen on; the default is reachable from this machine only")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    database: str | None = Field(None, description="SQLAlchemy URL; none is SQLite in the data directory")
    artifacts: str | None = Field(None, description="directory or fsspec URL; none is a folder of the data directory")
    deterministic: bool = Field(False, description="no two runs share a micro-batch, so that results are bitwise equal")
    dtype: str = Field("auto", description="dtype of the backbones' weights")
    quantize: str | None = Field(None, description="packs the backbones' linear weights, as in `nf4`; none keeps them")
    threads: int = Field(0, ge=0, description="threads of an engine; 0 leaves it to torch")
    engine: dict[str, Any] = Field({}, description="further settings of engines: `token_budget`, `slots` …")
    public_url: str | None = Field(None, description="the URL that clients reach, for signed links")
    missing_seq_seconds: float = Field(
        600.0, gt=0, description="how long later requests of a run wait for an earlier one that did not arrive"
    )
    long_poll_seconds: float = Field(30.0, gt=0, le=40, description="how long a client's poll is held open")
    drain_seconds: float = Field(30.0, ge=0, description="how long SIGTERM waits for requests in work")
    result_seconds: float = Field(86400.0, gt=0, description="how long finished results are kept")
    operators: tuple[str, ...] = Field(
        ("default",), description="tenants whose keys see all tenants on the dashboard, and the metrics"
    )
    metrics_open: bool = Field(False, description="whether /metrics, which names tenants, is for everybody")
    log_json: bool = Field(False, description="logs as JSON lines")
    limits: Limits = Field(Limits(), description="what tenants may ask for")
    snapshots: Snapshots = Field(Snapshots(), description="when state is written")

    @field_validator("models")
    @classmethod
    def _named_once(cls, models: tuple[str, ...]) -> tuple[str, ...]:
        if not models:
            raise ConfigError("A server needs at least one model.", hint="lorica serve --model nano")
        if len(set(models)) != len(models):
            raise ConfigError(f"Models {list(models)} name one twice.")
        return models

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{(self.data_dir / 'lorica.db').absolute()}"

    @property
    def artifacts_url(self) -> str:
        return self.artifacts or str((self.data_dir / "artifacts").absolute())
