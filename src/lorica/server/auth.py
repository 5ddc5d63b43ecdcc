"""Who asks: an API key becomes a tenant.

In: the headers `X-API-Key` or `Authorization: Bearer`. Out: the tenant, or 401. Keys that were found are remembered for
a few seconds, so that a revoked one closes soon. Refuses to know what the tenant may do.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from fastapi import Request

from lorica.server.errors import ApiError
from lorica.server.limits import Limiter
from lorica.store import keys
from lorica.store.database import Database

REMEMBER = 5.0
"""Seconds for which a key is believed without asking the database."""


@dataclass(frozen=True, slots=True)
class Caller:
    """A tenant and the key that it used."""

    tenant: str
    key_id: str


class Auth:
    """Looks keys up; tells the limiter of each tenant's quotas."""

    def __init__(self, database: Database, limiter: Limiter) -> None:
        self._database = database
        self._limiter = limiter
        self._known: dict[bytes, tuple[float, Caller]] = {}

    async def caller(self, request: Request) -> Caller:
        """Raises ApiError 401."""
        secret = request.headers.get("x-api-key") or _bearer(request.headers.get("authorization", ""))
        if not secret:
            raise _refused("No API key was sent; put it into the header X-API-Key.")
        digest = hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
        known = self._known.get(digest)
        if known is not None and known[0] > time.monotonic():
            return known[1]
        found = await self._database.aread(lambda c: keys.find_key(c, secret))
        if found is None:
            self._known.pop(digest, None)
            raise _refused("This API key is not valid here.")
        quotas = await self._database.aread(lambda c: keys.get_quotas(c, found.tenant))
        self._limiter.set_quotas(found.tenant, quotas)
        caller = Caller(found.tenant, found.id)
        if len(self._known) > 10_000:
            self._known.clear()
        self._known[digest] = (time.monotonic() + REMEMBER, caller)
        return caller

    def forget(self) -> None:
        """Believe no key any more without asking."""
        self._known.clear()


def _bearer(header: str) -> str:
    scheme, _, secret = header.partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else ""


def _refused(message: str) -> ApiError:
    return ApiError(
        401,
        "unauthorized",
        message,
        hint="`lorica keys create` makes a key.",
        headers={"www-authenticate": "Bearer", "x-should-retry": "false"},
    )
