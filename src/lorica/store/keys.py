"""API keys, and the tenants and quotas behind them.

In: a secret, or an operator's words. Out: the key's record; the secret itself is told once and never kept.
Refuses to know how a quota is enforced.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

import sqlalchemy as sa
from pydantic import Field

from lorica.core.config import Config
from lorica.core.errors import ConfigError
from lorica.store import rows
from lorica.store.tables import keys, now, tenants

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Quotas(Config):
    """What a tenant may use at most; null is the server's default."""

    tokens_per_minute: int | None = Field(None, ge=0, description="tokens that its requests may bring in a minute")
    resident_adapters: int | None = Field(None, ge=0, description="runs of living sessions that it may have at once")
    storage_bytes: int | None = Field(None, ge=0, description="bytes of all its checkpoints")
    concurrent_samples: int | None = Field(None, ge=0, description="samples that may be drawn at once")
    max_rank: int | None = Field(None, ge=1, description="highest rank of an adapter")


@dataclass(frozen=True, slots=True)
class Key:
    """`hash` is the SHA-256 of the secret, `prefix` its beginning, which may be shown."""

    id: str
    hash: str
    prefix: str
    tenant: str
    label: str
    created: dt.datetime
    revoked: dt.datetime | None = None


def create_key(connection: sa.Connection, tenant: str, label: str = "") -> tuple[Key, str]:
    """A new key of a tenant, who is made with it, and its secret: `tml-<id>-<random>`."""
    ensure_tenant(connection, tenant)
    key_id = secrets.token_hex(6)
    secret = f"tml-{key_id}-{secrets.token_hex(24)}"
    key = Key(key_id, _hash(secret), f"tml-{key_id}", tenant, label, now())
    rows.insert(connection, keys, key)
    return key, secret


def find_key(connection: sa.Connection, secret: str) -> Key | None:
    """The key that a secret opens, unless it is revoked."""
    key = rows.one(connection, keys, keys.c.id == _id(secret), Key)
    if key is None or key.revoked is not None or not hmac.compare_digest(key.hash, _hash(secret)):
        return None
    return key


def list_keys(connection: sa.Connection, tenant: str | None = None) -> list[Key]:
    """Keys of a tenant, or of all: for the operator."""
    return rows.many(connection, keys, sa.true() if tenant is None else keys.c.tenant == tenant, Key)


def revoke_key(connection: sa.Connection, key_id: str) -> bool:
    """Close a key from now on; False where there is no such key that is open."""
    open_ = (keys.c.id == key_id) & keys.c.revoked.is_(None)
    return connection.execute(keys.update().where(open_).values(revoked=now())).rowcount == 1


def ensure_tenant(connection: sa.Connection, tenant: str) -> None:
    """Make a tenant unless there is one. Raises ConfigError for a name that is none."""
    if not _NAME.fullmatch(tenant):
        raise ConfigError(f"{tenant!r} cannot name a tenant: use at most 63 letters, digits, '.', '_' and '-'.")
    if connection.scalar(sa.select(tenants.c.name).where(tenants.c.name == tenant)) is None:
        connection.execute(tenants.insert(), {"name": tenant, "quotas": None})


def list_tenants(connection: sa.Connection) -> list[str]:
    """All names, in alphabetical order."""
    return list(connection.scalars(sa.select(tenants.c.name).order_by(tenants.c.name)))


def get_quotas(connection: sa.Connection, tenant: str) -> Quotas:
    """A tenant's own quotas; all null for one without."""
    return Quotas.parse(connection.scalar(sa.select(tenants.c.quotas).where(tenants.c.name == tenant)) or {})


def set_quotas(connection: sa.Connection, tenant: str, quotas: Quotas) -> None:
    """Replace a tenant's quotas; the tenant is made with them."""
    ensure_tenant(connection, tenant)
    values = quotas.model_dump(exclude_none=True)
    connection.execute(tenants.update().where(tenants.c.name == tenant).values(quotas=values))


def _hash(secret: str) -> str:
    """The secret has 192 random bits, so a plain hash tells nothing."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _id(secret: str) -> str:
    match = re.fullmatch(r"tml-([0-9a-f]{12})-[0-9a-f]{48}", secret)
    return match[1] if match else ""
