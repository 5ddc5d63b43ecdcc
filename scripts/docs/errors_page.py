"""docs/reference/errors.md: every error class, when it is raised and what to do about it.

In: the error classes, the sources, and the advice below. Out: Markdown. Refuses to know single messages.
"""

from __future__ import annotations

import ast
from pathlib import Path

from lorica.core import errors
from lorica.core.errors import LoricaError
from scripts.docs.markdown import GENERATED, code, first_sentence, table

ADVICE: dict[str, str] = {
    "ConfigError": "Correct the field that the sentence names. `lorica train … --dry-run` prints every field with its "
    "value; [Settings](config.md) lists them with their ranges.",
    "TargetError": "`lorica models MODEL` lists the sites and their kinds; the message names the nearest ones.",
    "MethodError": "`lorica methods` lists the methods, `lorica methods NAME` what one can adapt and its settings. "
    "When a loss is not finite, lower `optimizer.lr` and look at the data.",
    "DataError": "Open the file at the line that is named; the accepted shapes are printed with it. `lorica data show "
    "FILE` checks a file without training.",
    "FormatError": "The file is incomplete or was changed. Copy or download it again, or take an earlier one.",
    "MismatchError": "Load the adapter on the base that it was trained on; `lorica inspect FOLDER` names it.",
    "MergeError": "Keep the adapter beside the model, or export it; the message says which part cannot be folded. "
    "After a failed verification the weights are as before.",
    "RouteError": "Add or load the adapter first, and give one entry for each row of the batch.",
    "ResumeError": "Resume with the same data and base, from the run's own directory; otherwise begin a new run.",
    "StorageError": "Free some space or choose another `out`. The checkpoints written before are whole.",
    "MissingError": "Install the package that is named, or correct the path or name; the nearest ones are given.",
}
"""Class → what to do. A test compares the keys with the classes."""


def classes() -> list[type[LoricaError]]:
    """Every error class but the base, in the order of the source."""
    return [
        item
        for item in vars(errors).values()
        if isinstance(item, type) and issubclass(item, LoricaError) and item is not LoricaError
    ]


def page() -> str:
    where = raisers()
    parts = [
        GENERATED,
        "# Errors",
        "Everything that Lorica raises on purpose is a `lorica.core.errors.LoricaError`: one sentence (`str(error)`), "
        "a stable `code`, and often a `hint`. Each class also inherits the standard error that it refines, so `except "
        "ValueError` keeps working. The command line prints the sentence and exits with 1; with `--json` it prints "
        '`{"error": {"code": …, "message": …, "hint": …}}` on stderr.',
        table(
            ("class", "also a", "code"),
            [
                (f"[`{cls.__name__}`](#{cls.__name__.lower()})", code(_standard(cls)), code(cls.code))
                for cls in classes()
            ],
        ),
    ]
    for cls in classes():
        name = cls.__name__
        parts += [
            f"## {name}",
            f"**When:** {first_sentence(cls.__doc__)}",
            f"**What to do:** {ADVICE[name]}",
            f"**Raised in:** {', '.join(code(part) for part in where.get(name, []))}.",
        ]
    return "\n\n".join(parts) + "\n"


def _standard(cls: type[LoricaError]) -> str:
    return next(base.__name__ for base in cls.__mro__ if not issubclass(base, LoricaError))


def raisers() -> dict[str, list[str]]:
    """Class → packages of `lorica` whose code names it in a call."""
    root = Path(errors.__file__).parent.parent
    known = {cls.__name__ for cls in classes()}
    found: dict[str, set[str]] = {}
    for file in sorted(root.rglob("*.py")):
        package = file.relative_to(root).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
                found.setdefault(node.func.id, set()).add(package)
    return {name: sorted(packages) for name, packages in found.items()}
