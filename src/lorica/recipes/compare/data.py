"""The data of a comparison in three parts that share no row: to train on, to choose rates by, to report.

In: files, a renderer. Out: examples by part, and questions whose right answers are known. Rows that are equal token by
token stay in one part. Refuses to know models, methods and training.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorica.adapters.lineage import Data
from lorica.core.errors import DataError
from lorica.data.example import Example
from lorica.data.records import load_records
from lorica.data.render import Renderer, prepare
from lorica.recipes.compare.config import CompareConfig
from lorica.recipes.quickstart import Question

SHARE = 5
"""A part that is held out of the training file takes at most one of so many of its rows."""


@dataclass(frozen=True)
class Parts:
    """Examples by part; `said` tells in sentences where each came from, `fingerprints` the files' contents."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    questions: list[Question]
    said: tuple[str, ...]
    fingerprints: dict[str, str]

    def trained_on(self, path: str) -> Data:
        """The training part, which came from the file `path`, as a lineage has it."""
        return Data(path, self.fingerprints["train"], len(self.train))

    def counts(self) -> dict[str, int]:
        return {
            "train": len(self.train),
            "validation": len(self.validation),
            "test": len(self.test),
            "answered": len(self.questions),
        }


def read_parts(config: CompareConfig, renderer: Renderer) -> Parts:
    """Read, render and divide. The division depends on the rows alone, so that comparisons of one file agree.

    Raises MissingError and DataError for files that cannot be used, DataError where too few rows are there.
    """
    files = {"train": config.data.path, "validation": config.data.eval_path, "test": config.test_path}
    found: dict[str, list[Example]] = {}
    fingerprints: dict[str, str] = {}
    said: list[str] = []
    for part, path in files.items():
        if path is None:
            continue
        dataset = load_records(path)
        ready = prepare(dataset, renderer, config.data.max_length)
        found[part], fingerprints[part] = ready.examples, dataset.fingerprint
        if ready.truncation is not None and ready.truncation.count:
            said.append(f"{path}: {ready.truncation.sentence()}")
    wanted = {"validation": config.validation_rows, "test": config.test_rows}
    held = {part: rows for part, rows in wanted.items() if part not in found}
    found |= _hold_out(found["train"], held, config.data.path)
    for part, rows in wanted.items():
        source = "held out of the training file" if part in held else files[part]
        whole, found[part] = len(found[part]), evenly(found[part], rows)
        taken = f"{whole} rows" if whole == len(found[part]) else f"{len(found[part])} of {whole} rows"
        said.append(f"{part}: {taken}, {source}.")
    shared = _keys(found["train"]) & (_keys(found["validation"]) | _keys(found["test"]))
    if shared:
        said.append(f"Warning: {len(shared)} different rows of the held-out files are in the training file too.")
    questions = [q for q in (question(e, renderer) for e in found["test"]) if q is not None]
    return Parts(
        found["train"],
        found["validation"],
        found["test"],
        evenly(questions, config.answer_rows),
        (f"training: {len(found['train'])} rows of {config.data.path}.", *said),
        fingerprints,
    )


def _hold_out(examples: Sequence[Example], wanted: dict[str, int], path: str) -> dict[str, list[Example]]:
    """Take parts out of the training examples; what is left is returned as `train`. Equal rows stay together."""
    groups: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        groups.setdefault(example.tokens, []).append(example)
    order = list(groups)
    random.Random("lorica compare").shuffle(order)
    parts: dict[str, list[Example]] = {}
    start = 0
    for part, rows in wanted.items():
        count = min(rows, len(order) // SHARE)
        if not count:
            raise DataError(
                f"{path} has {len(order)} different rows, too few to hold some out as the {part} part.",
                hint=f"Give a file of its own for it, or at least {SHARE} different rows.",
            )
        parts[part] = [groups[key][0] for key in order[start : start + count]]
        start += count
    taken = set(order[:start])
    return {**parts, "train": [example for example in examples if example.tokens not in taken]}


def _keys(examples: Sequence[Example]) -> set[tuple[int, ...]]:
    return {example.tokens for example in examples}


def evenly(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the values, evenly spaced."""
    count = min(most, len(values))
    return [values[i * len(values) // count] for i in range(count)]


def question(example: Example, renderer: Renderer) -> Question | None:
    """What stands before the last trained stretch of an example, and that stretch as the right answer.

    None where there is no answer: running text, of which everything is trained, and rows whose end was cut off.
    """
    weights = example.weights
    end = next((i for i in range(len(weights), 0, -1) if weights[i - 1]), 0)
    start = next((i for i in range(end, 0, -1) if not weights[i - 1]), 0)
    expected, ended = renderer.parse(example.tokens[start:end])
    if start <= 1 or not ended:
        return None
    return Question(list(example.tokens[:start]), example.where, expected)
