"""The quickstart: fine-tune the built-in model on the built-in data, and measure what changed.

In: a method's name. Out: a `Report`, kept in the run directory: exact match before and after, examples, whether
`peft` reads the adapter with the same logits, the largest difference that merging makes. A finished run of the same
settings is reported again. Refuses to know terminals: progress goes to an `Observer`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lorica.client.local import SamplingClient
from lorica.core.errors import ConfigError, FormatError, MethodError, StorageError
from lorica.core.storage import storage, write_file
from lorica.data.records import Chat, load_records
from lorica.data.render import Renderer
from lorica.methods import get_method
from lorica.recipes import sft
from lorica.recipes.config import SFTConfig, read_config
from lorica.recipes.configs import find_config, shipped
from lorica.recipes.proofs import MergeProof, PeftProof, merge_proof, peft_proof
from lorica.recipes.rundir import ROOM, RunDir
from lorica.sampling.params import SamplingParams

REPORT = "quickstart.json"
ROWS = 320
"""Rows of each held-out file that are answered; all of a smaller one."""
BATCH = 64
SPARE = 8
"""Tokens that an answer may be longer than the longest right one before it is cut off."""


@dataclass(frozen=True, slots=True)
class Score:
    """Answers that equal the expected text exactly, before and after training, of `rows` answered out of `total`."""

    rows: int
    total: int
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Case:
    """One held-out request with what was expected and what came."""

    request: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class Report:
    """What the quickstart found out. `seconds` by phase; `reused` when a finished run is reported again."""

    method: str
    model: str
    path: str
    adapter: str
    steps: int
    loss: float
    parameters: int
    base_parameters: int
    tokens_per_second: float
    scores: dict[str, Score]
    cases: tuple[Case, ...]
    peft: PeftProof
    merge: MergeProof
    seconds: dict[str, float]
    reused: bool = field(default=False)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """Rebuild from JSON. Raises FormatError when the file is of another version or was edited."""
        try:
            values = dict(values)
            values["scores"] = {name: Score(**score) for name, score in values["scores"].items()}
            values["cases"] = tuple(Case(**case) for case in values["cases"])
            values["peft"], values["merge"] = PeftProof(**values["peft"]), MergeProof(**values["merge"])
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise FormatError(f"The stored {REPORT} cannot be read: {error}.", hint="Use --fresh.") from None


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out row: the prompt's tokens, the request, the right answer."""

    tokens: list[int]
    request: str
    expected: str


class QuickstartObserver(sft.Observer):
    """What the quickstart tells as it goes. The base class says nothing."""

    def phase(self, text: str) -> None:
        """Something begins."""


def configure(method: str = "lora", out: str | None = None, overrides: Sequence[str] = ()) -> SFTConfig:
    """The shipped config of the method, or `quickstart` with the method's defaults. Raises MethodError."""
    get_method(method)
    name = "quickstart" if method == "lora" or method not in shipped() else method
    chosen = [] if name == method or method == "lora" else [f"method={json.dumps({'name': method})}"]
    place = out or ("runs/quickstart" if method == "lora" else f"runs/quickstart-{method}")
    return read_config(find_config(name), [*chosen, f"out={json.dumps(place)}", *overrides])


def run(
    config: SFTConfig, observer: QuickstartObserver | None = None, *, fresh: bool = False, rows: int = ROWS
) -> Report:
    """Train (or go on with an interrupted run), measure, prove, merge; or report a finished run of equal settings.

    Raises StorageError when `out` holds a run of other settings (with `fresh` that run is deleted first), ConfigError
    for a config that begins with another adapter.
    """
    if config.continue_from or config.stack_on:
        raise ConfigError(
            "The quickstart compares an adapter with the plain base, so it begins without another one.",
            hint="`lorica train` takes `continue_from` and `stack_on`.",
        )
    observer = observer or QuickstartObserver()
    directory = RunDir(config.out)
    if fresh:
        discard(directory)
    if directory.config.is_file():
        stored = read_config(directory.config)
        if stored != config:
            raise StorageError(
                f"{config.out} holds a run with other settings.", hint="Choose another --out, or --fresh to redo it."
            )
        report = _stored(directory)
        if report is not None and all(score.rows == min(rows, score.total) for score in report.scores.values()):
            return report
    return _run(config, directory, observer, rows)


class _Watch(sft.Observer):
    """Keeps the plan, and asks the base before anything is trained."""

    def __init__(self, observer: QuickstartObserver, rows: int) -> None:
        self.observer = observer
        self.rows = rows
        self.questions: dict[str, list[Question]] = {}
        self.totals: dict[str, int] = {}
        self.before: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = {}
        self.plan: sft.Plan | None = None
        self.step, self.evaluated, self.saved = observer.step, observer.evaluated, observer.saved  # type: ignore[method-assign]

    def prepared(self, plan: sft.Plan) -> None:
        self.plan = plan
        began = time.monotonic()
        self.observer.phase("asking the model before training")
        for split in ("test", "handwritten"):
            self.questions[split], self.totals[split] = questions(f"everyday:{split}", plan.renderer, self.rows)
        client = plan.client.service.sampling_client(None)
        self.before = {name: answers(client, plan.renderer, asked) for name, asked in self.questions.items()}
        self.seconds["before"] = time.monotonic() - began
        self.observer.phase("training")
        self.observer.prepared(plan)


def _run(config: SFTConfig, directory: RunDir, observer: QuickstartObserver, rows: int) -> Report:
    began = time.monotonic()
    watch = _Watch(observer, rows)
    observer.phase("loading model and data")
    outcome = sft.resume(directory.path, watch) if directory.config.is_file() else sft.run(config, watch)
    if outcome.interrupted or outcome.adapter is None:
        raise KeyboardInterrupt
    ready = watch.plan
    assert ready is not None
    seconds = {**watch.seconds, "training": outcome.seconds}
    started = time.monotonic()
    observer.phase("asking the model after training")
    client = ready.client.sampling_client()
    after = {name: answers(client, ready.renderer, asked) for name, asked in watch.questions.items()}
    seconds["after"] = time.monotonic() - started
    started = time.monotonic()
    observer.phase("loading the adapter with peft, and merging it")
    prompts = [q.tokens for q in watch.questions["test"][:4]]
    peft = peft_proof(ready, outcome.adapter, prompts)
    merge = merge_proof(ready, directory.path / "merged")
    seconds["proofs"] = time.monotonic() - started
    seconds["total"] = time.monotonic() - began
    records = directory.records()
    report = Report(
        method=config.method["name"],
        model=config.model,
        path=str(directory.path),
        adapter=str(outcome.adapter),
        steps=outcome.steps,
        loss=records[-1]["loss"] if records else outcome.loss,
        parameters=ready.client.adapter.layout.trainable_count(),
        base_parameters=ready.backbone.parameter_count(),
        tokens_per_second=outcome.tokens_per_second,
        scores={
            name: Score(len(asked), watch.totals[name], _right(asked, watch.before[name]), _right(asked, after[name]))
            for name, asked in watch.questions.items()
        },
        cases=_cases(watch.questions, watch.before, after),
        peft=peft,
        merge=merge,
        seconds={name: round(value, 2) for name, value in seconds.items()},
    )
    with storage(directory.path, hint=ROOM):
        write_file(directory.path / REPORT, json.dumps(_plain(report), indent=1, ensure_ascii=False).encode())
    return report


def questions(path: str, renderer: Renderer, rows: int) -> tuple[list[Question], int]:
    """At most `rows` questions of a chat file, evenly spaced, and how many it holds."""
    records = load_records(path).records
    count = min(rows, len(records))
    found = []
    for record in (records[i * len(records) // count] for i in range(count)):
        if not isinstance(record, Chat):
            raise MethodError(f"{record.where} is no conversation, so it asks nothing.")
        asked, answer = record.messages[:-1], record.messages[-1]
        found.append(Question(renderer.prompt(asked), str(asked[-1]["content"]), str(answer["content"])))
    return found, len(records)


def answers(client: SamplingClient, renderer: Renderer, asked: Sequence[Question]) -> list[str]:
    """The likeliest answer to each question, in the order asked. Neighbours in length share a batch."""
    longest = max(len(renderer.tokenizer.encode(q.expected, add_special_tokens=False)) for q in asked)
    params = SamplingParams(max_tokens=longest + SPARE, stop_ids=tuple(renderer.stop_ids))
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].tokens))
    found = [""] * len(asked)
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        for index, sample in zip(batch, client.sample([asked[i].tokens for i in batch], params), strict=True):
            found[index] = renderer.parse(sample.tokens)[0]
    return found


def _right(asked: Sequence[Question], given: Sequence[str]) -> int:
    return sum(question.expected == answer for question, answer in zip(asked, given, strict=True))


def _cases(
    asked: dict[str, list[Question]], before: dict[str, list[str]], after: dict[str, list[str]]
) -> tuple[Case, ...]:
    """Two rows of generated wording and one written by hand."""
    picks = [("test", 0), ("test", len(asked["test"]) // 2), ("handwritten", 0)]
    rows = [(asked[name][i], before[name][i], after[name][i]) for name, i in picks]
    return tuple(Case(q.request, q.expected, was, now) for q, was, now in rows)


def discard(directory: RunDir) -> None:
    """Delete a run that the quickstart made. Raises StorageError when the folder holds anything else."""
    import shutil

    if not directory.path.exists():
        return
    ours = {"config.yaml", "metrics.jsonl", "loss.png", "adapter", "checkpoints", "merged", REPORT}
    strange = sorted(p.name for p in directory.path.iterdir() if p.name not in ours and not p.name.endswith(".partial"))
    if strange:
        raise StorageError(f"{directory.path} holds {strange[0]!r}, which the quickstart did not write; it is kept.")
    shutil.rmtree(directory.path)


def _stored(directory: RunDir) -> Report | None:
    """The report of a finished run, marked as reused; None where there is none or its adapter is gone."""
    from dataclasses import replace

    file = directory.path / REPORT
    if not file.is_file() or not directory.adapter.is_dir():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise FormatError(f"{file} is corrupt: it is not JSON.", hint="Use --fresh.") from None
    return replace(Report.from_dict(values), reused=True)


def _plain(report: Report) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(report)
