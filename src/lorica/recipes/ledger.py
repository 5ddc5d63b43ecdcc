"""Results of expensive runs, kept by the settings that they follow from: a search that is started again reuses them.

In: settings as plain values, and a way to compute a number. Out: the number, from the file where it is known. A value
that is not finite is kept as null and given back as −infinity. Refuses to know what is computed.
    {"settings": {"dimension": 100, "lr": 0.01, …}, "value": 0.52}
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorica.core.errors import FormatError
from lorica.core.storage import storage, write_file


class Ledger:
    """A file of one JSON line for each run; without a path, memory alone.

    Attributes: `reused` and `computed` count what was asked for. Raises FormatError for a file that is no ledger; a
    last line that a kill cut short is dropped.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.reused = self.computed = 0
        self._known: dict[str, float] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def __len__(self) -> int:
        return len(self._known)

    def value(self, settings: Mapping[str, Any], compute: Callable[[], float]) -> float:
        """What is known for these settings, else what `compute` returns, which is then kept. Raises StorageError."""
        key = json.dumps(settings, sort_keys=True, allow_nan=False)
        if key in self._known:
            self.reused += 1
            return self._known[key]
        value = float(compute())
        value = value if math.isfinite(value) else -math.inf
        self.computed += 1
        self._known[key] = value
        if self.path is not None:
            line = json.dumps({"settings": dict(settings), "value": value if math.isfinite(value) else None})
            with storage(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
                    file.flush()
                    os.fsync(file.fileno())
        return value

    def _read(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        whole, _, rest = text.rpartition("\n")
        for number, line in enumerate(whole.split("\n") if whole else [], start=1):
            try:
                record = json.loads(line)
                key = json.dumps(record["settings"], sort_keys=True)
                self._known[key] = -math.inf if record["value"] is None else float(record["value"])
            except (ValueError, KeyError, TypeError):
                raise FormatError(f"Line {number} of {path} is not a run and its value; the file is corrupt.") from None
        if rest:  # the next line must not be joined to it
            with storage(path):
                write_file(path, (whole + "\n" if whole else "").encode())
