"""What a tenant may use at most, in the words that the SDK understands.

In: tokens, samples and bytes as they are asked for. Out: permission, a time to wait, or a refusal: 429 for sampling,
which the SDK sends again, and never on training calls, which wait their turn in the queue instead. Refuses to know
where quotas are kept.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass

from lorica.server.errors import ApiError, busy
from lorica.server.settings import Limits
from lorica.store.keys import Quotas


@dataclass(slots=True)
class _Bucket:
    """Tokens that may be spent now; refilled by the clock, and never more than one minute's worth."""

    level: float
    at: float


class Limiter:
    """Counts for all tenants. `Limits` are the server's, `Quotas` a tenant's own and come first."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._quotas: dict[str, Quotas] = {}
        self._buckets: dict[str, _Bucket] = {}
        self._samples: dict[str, int] = defaultdict(int)

    def set_quotas(self, tenant: str, quotas: Quotas) -> None:
        self._quotas[tenant] = quotas

    def _limit(self, tenant: str, name: str, default: int) -> int:
        own = getattr(self._quotas.get(tenant), name, None)
        return default if own is None else int(own)

    def rank(self, tenant: str) -> int:
        """The highest rank that a tenant may ask for."""
        return self._limit(tenant, "max_rank", self.limits.rank)

    def storage(self, tenant: str) -> int:
        """Bytes of checkpoints; 0 is no limit."""
        return self._limit(tenant, "storage_bytes", self.limits.storage_bytes)

    def resident(self, tenant: str) -> int:
        """Runs of living sessions; 0 is no limit."""
        return self._limit(tenant, "resident_adapters", self.limits.resident_adapters)

    def wait(self, tenant: str, tokens: int) -> float:
        """Seconds until a tenant may spend so many tokens; 0 spends them."""
        rate = self._limit(tenant, "tokens_per_minute", self.limits.tokens_per_minute)
        if rate == 0:
            return 0.0
        now = time.monotonic()
        bucket = self._buckets.setdefault(tenant, _Bucket(float(rate), now))
        bucket.level = min(float(rate), bucket.level + (now - bucket.at) * rate / 60)
        bucket.at = now
        need = min(float(tokens), float(rate))  # a larger request needs a full bucket and leaves it in debt
        if bucket.level >= need:
            bucket.level -= tokens
            return 0.0
        return (need - bucket.level) * 60 / rate

    def begin_samples(self, tenant: str, count: int, tokens: int) -> None:
        """Let a tenant draw `count` samples more. Raises ApiError 429."""
        most = self._limit(tenant, "concurrent_samples", self.limits.concurrent_samples)
        if count > most:
            raise ApiError(400, "quota", f"num_samples is {count}; this key may draw at most {most} at once.")
        if self._samples[tenant] + count > most:
            raise busy(
                f"{self._samples[tenant]} samples are being drawn, of at most {most}; send it again in a moment."
            )
        seconds = self.wait(tenant, tokens)
        if seconds > 0:
            raise busy(f"This key's tokens per minute are used up for {seconds:.1f} s.", seconds=min(seconds, 60))
        self._samples[tenant] += count

    def note_samples(self, tenant: str, count: int) -> None:
        """Count samples that were let through before (a restart)."""
        self._samples[tenant] += count

    def end_samples(self, tenant: str, count: int) -> None:
        self._samples[tenant] -= count

    def samples(self, tenant: str) -> int:
        return self._samples[tenant]
