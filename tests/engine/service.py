"""An engine core in this process, spoken to with commands: what the tests of core, runs and worker share."""

from __future__ import annotations

import atexit
import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lorica.core.errors import LoricaError
from lorica.engine import commands
from lorica.engine.arrays import array
from lorica.engine.core import EngineCore
from lorica.engine.settings import EngineSettings
from lorica.models.backbone import Backbone
from tests.tiny import tiny

SPILL = Path(tempfile.mkdtemp(prefix="lorica-tests-"))
atexit.register(shutil.rmtree, SPILL, ignore_errors=True)
_NUMBERS = itertools.count()
SPEC = commands.RunSpec("lora", {"rank": 4})
ADAM = commands.Adam(lr=0.01)


def datum(seed: int, length: int = 8, vocabulary: int = 120, weight: float = 1.0) -> commands.Datum:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, vocabulary, length + 1)
    weights = np.full(length, weight, np.float32)
    return commands.Datum(
        array(tokens[:-1].astype(np.int32)),
        {"target_tokens": array(tokens[1:].astype(np.int64)), "weights": array(weights)},
    )


def train(run: str, *datums: commands.Datum, backward: bool = True, id: int = 0) -> commands.Train:
    return commands.Train(id, run, list(datums), "cross_entropy", backward=backward)


def sample(*adapters: str, tokens: tuple[int, ...] = (5, 6, 7), **fields: Any) -> commands.Sample:
    return commands.Sample(0, array(np.array(tokens, np.int32)), list(adapters), **fields)


def logprobs(reply: Any) -> list[np.ndarray[Any, Any]]:
    return [np.frombuffer(out["logprobs"].data, np.float32) for out in reply.outputs]


class RefusedError(LoricaError):
    """A command that failed, with its reply."""

    def __init__(self, reply: commands.Failed) -> None:
        super().__init__(reply.message)
        self.reply = reply


class Service:
    """Submits commands and turns until they are answered."""

    def __init__(self, backbone: Backbone | None = None, folder: Path | None = None, **settings: Any) -> None:
        settings = {"token_budget": 64, "root": folder, "data": (folder or SPILL) / f"data{next(_NUMBERS)}", **settings}
        self.core = EngineCore(backbone or tiny("llama"), EngineSettings(model="test", **settings))
        self._ids = itertools.count(1)
        self.replies: dict[int, commands.Reply] = {}
        self.progress: list[commands.Progress] = []

    def send(self, command: Any) -> int:
        id = next(self._ids)
        self.core.submit(type(command)(**{**{f: getattr(command, f) for f in command.__struct_fields__}, "id": id}))
        return id

    def turn(self) -> None:
        for reply in self.core.turn():
            if isinstance(reply, commands.Progress):
                self.progress.append(reply)
            elif not isinstance(reply, commands.Stats):
                assert reply.id not in self.replies, "a command is answered once"
                self.replies[reply.id] = reply

    def run(self) -> None:
        while self.core.busy:
            self.turn()

    def told(self, id: int) -> Any:
        reply = self.replies[id]
        if isinstance(reply, commands.Failed):
            raise RefusedError(reply)
        return reply

    def ask(self, command: Any) -> Any:
        id = self.send(command)
        self.run()
        return self.told(id)

    def open(self, *runs: str, spec: commands.RunSpec = SPEC, **fields: Any) -> None:
        for run in runs:
            self.ask(commands.Open(0, run, spec, **fields))

    def flat(self, run: str) -> Any:
        return self.core.runs.get(run).live()[0].flat.clone()

    def grad(self, run: str) -> Any:
        return self.core.runs.get(run).live()[0].grad.clone()
