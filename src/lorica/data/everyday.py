"""The data set that ships with the package: everyday requests and the JSON calls that answer them.

In: the name of a split. Out: the path of its file. Refuses to know how the rows are made or rendered.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from lorica.core.errors import DataError, MissingError, did_you_mean

SPLITS = ("train", "test", "handwritten")
"""`train` and `test` come from the generator; `handwritten` is freer wording, for evaluation only."""


def everyday_path(split: str) -> Path:
    """The file of one split.

    Raises:
        DataError: there is no such split.
        MissingError: the installation lacks the file.
    """
    if split not in SPLITS:
        raise DataError(
            f"The everyday data has no split {split!r}; it has {', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}"
        )
    path = Path(str(resources.files("lorica.data"))) / "everyday" / f"{split}.jsonl"
    if not path.is_file():
        raise MissingError(
            f"The shipped file {path} is missing; the installation is incomplete.", hint="Reinstall lorica."
        )
    return path


def resolve(name: str | Path) -> Path:
    """A path, or a shipped name such as `everyday:test` (`everyday` alone is its train split), as a path."""
    family, _, split = str(name).partition(":")
    return everyday_path(split or "train") if family == "everyday" else Path(name)
