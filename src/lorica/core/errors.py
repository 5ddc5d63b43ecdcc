"""Every error that Lorica raises on purpose.

In: what was wrong, and what would be right. Out: one sentence (`str(error)`) and an optional hint.
Each class also inherits the standard error it refines, so `except ValueError` keeps working.
Refuses to know how an error is shown: the CLI and the server render them.

    LoricaError
    ├── ConfigError      a config field is unknown, missing or out of range
    ├── TargetError      a target pattern selects nothing, or a site that the method cannot adapt
    ├── MethodError      an unknown method, or one that cannot do what was asked
    ├── DataError        a data file or row that cannot be read as training data
    ├── FormatError      a file of weights that is corrupt, incomplete or not finite
    ├── MismatchError    an adapter and a backbone that do not belong together
    ├── MergeError       an update that cannot be folded into the weights
    ├── RouteError       a batch whose rows name adapters that are not resident
    ├── ResumeError      a run directory that cannot be resumed as asked
    ├── StorageError     a disk that is full or cannot be written
    └── MissingError     an optional package, model or file that is not installed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoricaError(Exception):
    """Base of all Lorica errors. `hint` is a second sentence: what to do about it."""

    code: str = "error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(cls: type[LoricaError], message: str, hint: str | None) -> LoricaError:
    return cls(message, hint=hint)


class ConfigError(LoricaError, ValueError):
    """A config field is unknown, missing or out of range."""

    code = "config"


class TargetError(LoricaError, ValueError):
    """A target pattern selects nothing, or selects a site that the method cannot adapt."""

    code = "target"


class MethodError(LoricaError, ValueError):
    """An unknown method, or a method that cannot do what was asked of it."""

    code = "method"


class DataError(LoricaError, ValueError):
    """A data file, or a row of one, that cannot be read as training data."""

    code = "data"


class FormatError(LoricaError, ValueError):
    """A file of weights or settings that is corrupt, incomplete or holds non-finite values."""

    code = "format"


class MismatchError(LoricaError, ValueError):
    """An adapter and a backbone that do not belong together."""

    code = "mismatch"


class MergeError(LoricaError, ValueError):
    """An update that cannot be folded into the base weights, or a merge that failed its verification."""

    code = "merge"


class RouteError(LoricaError, ValueError):
    """A batch whose rows name adapters that are not resident, or of the wrong number."""

    code = "route"


class ResumeError(LoricaError, ValueError):
    """A run directory that cannot be resumed as asked."""

    code = "resume"


class StorageError(LoricaError, OSError):
    """A disk that is full, or a path that cannot be written."""

    code = "storage"

    @property
    def public(self) -> str:
        """A sentence for those who may not know the server's paths; its log has the whole one."""
        cause = self.__cause__.strerror if isinstance(self.__cause__, OSError) else None
        return f"The server cannot use its storage{f': {cause}' if cause else ''}; tell its operator."


class MissingError(LoricaError, LookupError):
    """An optional package, a model or a file that is not there."""

    code = "missing"


def did_you_mean(word: str, known: Iterable[str], *, count: int = 3) -> str:
    """`' Did you mean a, b?'` for the known words nearest to `word`, or the empty string."""
    near = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    return f" Did you mean {', '.join(repr(n) for n in near)}?" if near else ""
