"""Text tasks for a causal language model: the shared data sets by name, and an arena that trains on them.

In: a model's name, data sets' names, a seed. Out: an arena whose steps are joint mixed batches of a `Service`. Refuses
to know papers and methods.
"""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from lorica.adapters.adapter import Adapter
from lorica.client.local import Service, TrainingClient
from lorica.core.errors import ConfigError, DataError, MissingError, did_you_mean
from lorica.data.example import Example
from lorica.data.records import Completion, Record, load_records
from lorica.data.render import Renderer
from lorica.data.template import Tokenizer
from lorica.engine.engine import Item
from lorica.engine.host import Host
from lorica.models import Backbone, load
from lorica.papers.kit.arena import Entry
from lorica.recipes.compare.data import question
from lorica.recipes.quickstart import answers

FOLDER = "LORICA_PAPERS_DATA"
"""The environment variable that says where the shared data sets are."""
PLACES = (Path("../shared/data"), Path(__file__).resolve().parents[5] / "shared" / "data")
"""Where they are looked for otherwise: beside the working directory, and beside the repository."""
END = "<|endoftext|>"


def data_folder() -> Path:
    """The folder of the shared data sets. Raises MissingError."""
    given = os.environ.get(FOLDER)
    for place in (Path(given),) if given else PLACES:
        if place.is_dir():
            return place
    raise MissingError(
        f"The data sets of the papers are not at {given or PLACES[0]}.",
        hint=f"Set {FOLDER} to the folder that holds gsm8k/, bbh/, t0_templates/ and the others.",
    )


def read_task(name: str) -> list[Record]:
    """The records of `gsm8k`, `gsm8k-test`, `bbh/TASK`, `t0/TEMPLATE`, `e2e`, or of any data file that `lorica train`
    reads. Rows without an answer are left out. Raises MissingError, DataError.
    """
    kind, _, part = name.partition("/")
    if kind == "t0":
        rows = _lines(_find("t0_templates", part, ".jsonl"))
        pairs = [(row["prompt"], row["completion"].removesuffix(END)) for row in rows]
    elif kind == "bbh":
        rows = json.loads(_find("bbh", part, ".json").read_text(encoding="utf-8"))["examples"]
        pairs = [(row["input"], row["target"]) for row in rows]
    elif name in ("gsm8k", "gsm8k-test"):
        rows = _lines(_find("gsm8k", "test" if name.endswith("test") else "train", ".jsonl"))
        pairs = [(row["question"], row["answer"]) for row in rows]
    elif name == "e2e":
        with _find("e2e", "devset", ".csv").open(encoding="utf-8", newline="") as file:
            pairs = [(row["mr"], row["ref"]) for row in csv.DictReader(file)]
    else:
        return list(load_records(name).records)
    cleaned = [(prompt.strip(), completion.strip()) for prompt, completion in pairs]
    return [Completion(p, c, f"{name}, row {i + 1}") for i, (p, c) in enumerate(cleaned) if p and c]


def _find(folder: str, name: str, suffix: str) -> Path:
    path = data_folder() / folder / f"{name}{suffix}"
    if not path.is_file():
        near = [p.stem for p in path.parent.glob(f"*{suffix}")] if path.parent.is_dir() else []
        raise MissingError(f"There is no data set {name!r} in {path.parent}.{did_you_mean(name, near)}")
    return path


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def open_model(model: str, *, dtype: str = "float32", device: str = "cpu") -> tuple[Backbone, Renderer]:
    """A language model and its renderer. Raises MissingError, ConfigError for a model without a tokenizer."""
    backbone = load(model, dtype=dtype, device=device)
    if backbone.tokenizer is None:
        raise ConfigError(f"{model!r} has no tokenizer, so text cannot be trained on it.")
    return backbone, Renderer(backbone.tokenizer)


def examples(name: str, renderer: Renderer, max_length: int) -> list[Example]:
    """The rows of a task (see `read_task`) that have at most `max_length` tokens. Raises DataError when none has."""
    kept = [example for example in map(renderer.example, read_task(name)) if len(example) <= max_length]
    if not kept:
        raise DataError(f"No row of {name!r} has at most {max_length} tokens.")
    return kept


def stream(tokenizer: Tokenizer, texts: Iterable[str]) -> list[int]:
    """Texts as one run of tokens, each tokenised by itself, with a line's end after it."""
    return [token for text in texts for token in tokenizer.encode(f"{text}\n", add_special_tokens=False)]


def split(rows: Sequence[Example], counts: Mapping[str, int | None], seed: int, name: str) -> dict[str, list[Example]]:
    """Disjoint parts of the given sizes in an order of `seed`; None takes what the others leave. Rows that are equal
    token by token are one. Raises DataError when there are too few.
    """
    order = list({row.tokens: row for row in rows}.values())
    wanted = sum(count or 1 for count in counts.values())
    if wanted > len(order):
        raise DataError(f"{name!r} has {len(order)} different rows of that length; the settings ask for {wanted}.")
    random.Random(seed).shuffle(order)
    rest = len(order) - sum(count or 0 for count in counts.values())
    parts, start = {}, 0
    for part, count in counts.items():
        end = start + (rest if count is None else count)
        parts[part] = order[start:end]
        start = end
    return parts


class TextArena:
    """A causal language model, named parts of examples, and adapters that train on the part `train`. `exact` is how
    many rows of the part `test` are answered for `exact match`.
    """

    def __init__(
        self,
        backbone: Backbone,
        renderer: Renderer | None,
        parts: Mapping[str, Sequence[Example]],
        *,
        batch_size: int,
        exact: int = 0,
        token_budget: int = 4096,
    ) -> None:
        self.service = Service(backbone, token_budget=token_budget)
        if exact and renderer is None:
            raise ConfigError("Answers need a renderer: set `exact` to 0.")
        self.renderer = renderer
        self.parts = parts
        self.batch_size = batch_size
        self.exact = exact
        self.clients: list[TrainingClient] = []
        self.norms: Sequence[float] = ()

    @property
    def host(self) -> Host:
        return self.service.host

    @property
    def adapters(self) -> list[Adapter]:
        return [client.adapter for client in self.clients]

    def enter(self, entries: Sequence[Entry], steps: int, seed: int) -> None:
        first = len(self.service.host.adapters)
        self.clients = [
            self.service.training_client(
                e.method, e.targets, name=f"entry {first + i}", seed=seed, optimizer=e.optimizer, steps=steps
            )
            for i, e in enumerate(entries)
        ]

    def step(self, rng: torch.Generator) -> list[float]:
        rows = self.parts["train"]
        chosen = torch.randint(len(rows), (self.batch_size,), generator=rng).tolist()
        batch = [rows[i] for i in chosen]
        losses = self.service.forward_backward([(client, batch) for client in self.clients])
        self.norms = [client.optim_step().grad_norm for client in self.clients]
        return [loss.mean for loss in losses]

    def score(self, part: str) -> list[dict[str, float]]:
        return [self._scores(adapter, part) for adapter in self.adapters]

    def untrained(self, part: str) -> dict[str, float]:
        return self._scores(None, part)

    def _scores(self, adapter: Adapter | None, part: str) -> dict[str, float]:
        rows = self.parts[part]
        results = self.service.engine.forward([Item(row, adapter) for row in rows])
        weight = sum(abs(value) for row in rows for value in row.weights)
        found = {f"{part} loss": sum(result.loss for result in results) / weight}
        if self.exact and part == "test":
            found["exact match"] = self._exact(adapter, part)
        return found

    def base_parameters(self) -> int:
        return sum(p.numel() for p in self.service.host.model.parameters())

    def _exact(self, adapter: Adapter | None, part: str) -> float:
        assert self.renderer is not None
        try:
            return exact_match(self.service, self.renderer, adapter, self.parts[part][: self.exact])
        except DataError:
            raise DataError(f"No row of part {part!r} has an answer to compare; set `exact` to 0.") from None


def exact_match(service: Service, renderer: Renderer, adapter: Adapter | None, rows: Sequence[Example]) -> float:
    """The share of rows whose greedy answer is the expected text; rows without an answer do not count.

    Raises DataError where no row has one.
    """
    asked = [q for row in rows if (q := question(row, renderer)) is not None]
    if not asked:
        raise DataError("No row has an answer to compare.")
    given = answers(service.sampling_client(adapter), renderer, asked)
    return sum(q.expected == text.strip() for q, text in zip(asked, given, strict=True)) / len(asked)
