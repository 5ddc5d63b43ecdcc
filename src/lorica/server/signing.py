"""Links that carry their own permission: an HMAC over what may be fetched and until when.

In: a secret, a subject and a time. Out: a query string, and whether one is genuine and still valid. Refuses to know
what the subject is.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from pathlib import Path
from urllib.parse import urlencode

from lorica.core.storage import storage


def load_secret(path: Path) -> bytes:
    """The server's secret, made on the first start and readable by its owner alone."""
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return bytes.fromhex(path.read_text().strip())
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        return bytes.fromhex(path.read_text().strip())


class Signer:
    """Signs with one secret."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def query(self, subject: str, expires: int) -> str:
        """`expires=…&signature=…` for a subject until a time in seconds."""
        return urlencode({"expires": expires, "signature": self._sign(subject, expires)})

    def valid(self, subject: str, expires: int, signature: str) -> bool:
        """Whether the signature is ours and its time has not passed."""
        given = signature.encode("utf-8", "replace")  # texts that are not ASCII cannot be compared
        return hmac.compare_digest(self._sign(subject, expires).encode(), given) and time.time() < expires

    def _sign(self, subject: str, expires: int) -> str:
        return hmac.new(self._secret, f"{expires}\n{subject}".encode(), hashlib.sha256).hexdigest()
