"""Names that clients see: runs, samplers, requests and `tinker://` paths.

In: parts. Out: names, and parts again. A checkpoint's id has a slash (`weights/c1`), every other id has none. Refuses
to know who owns what.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import Literal

from lorica.core.errors import DataError
from lorica.server.bodies import NAME

Kind = Literal["training", "sampler", "external"]
SEGMENTS: dict[str, Kind] = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
"""The middle part of a path, and the SDK's word for that kind of checkpoint."""
SEGMENT_OF: dict[str, str] = {kind: segment for segment, kind in SEGMENTS.items()}
CLONE = 1_000_000_000
"""A sampling client that was copied to another process counts its requests from a multiple of this."""

_PATH = re.compile(rf"tinker://([^/\s]{{1,300}})/({'|'.join(SEGMENTS)})/({NAME})")


@dataclass(frozen=True, slots=True)
class TinkerPath:
    """`tinker://<run>/<weights | sampler_weights | external_weights>/<name>`."""

    run: str
    kind: Kind
    name: str

    def __str__(self) -> str:
        return f"tinker://{self.run}/{self.checkpoint_id}"

    @property
    def checkpoint_id(self) -> str:
        return f"{SEGMENT_OF[self.kind]}/{self.name}"

    @classmethod
    def parse(cls, text: str) -> TinkerPath:
        """Raises DataError for anything that is no such path."""
        match = _PATH.fullmatch(text)
        if match is None:
            raise DataError(
                f"{text!r} is not a path of the form tinker://RUN/weights/NAME (or sampler_weights, external_weights)."
            )
        return cls(match[1], SEGMENTS[match[2]], match[3])


def session_id() -> str:
    """A new session's id, which cannot be guessed."""
    return uuid.uuid4().hex


def run_id(session: str, seq: int) -> str:
    """The id of a session's run; the SDK computes the same one."""
    return f"{session}:train:{seq}"


def sampler_id(session: str, seq: int) -> str:
    """The id of a session's sampling session."""
    return f"{session}:sample:{seq}"


def request_id(scope: str, seq: int) -> str:
    """The id of the request at a place of a run's or sampler's order: the same for a request that was sent twice."""
    return f"{scope}:req:{seq}"


def parse_request_id(text: str) -> tuple[str, int] | None:
    """Scope and place of a request's id; None for other text."""
    scope, mark, seq = text.rpartition(":req:")
    return (scope, int(seq)) if mark and seq.isascii() and seq.isdigit() and len(seq) < 20 else None


def sequence_ids(request: str, count: int) -> list[str]:
    """One id for each sample that a request will return."""
    return [f"{request}:{i}" for i in range(count)]
