"""What an engine does beside its turns: adapters in folders are combined and described, over its frozen base.

In: commands that name artifact folders. Out: a reply for each, sent from a thread of its own, one command at a time.
Nobody's run waits: the base is only read, and no adapter that is resident is touched. Refuses to know runs and rows.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorica.adapters import files
from lorica.adapters.analysis.intruders import Search
from lorica.adapters.analysis.report import inspect_adapter
from lorica.adapters.lineage import parent_at
from lorica.adapters.merging import make_merging
from lorica.adapters.merging.combine import combine
from lorica.core.storage import replacing_folder, storage
from lorica.engine import commands
from lorica.engine.core import failure
from lorica.engine.replay import BESIDE
from lorica.engine.runs import described
from lorica.engine.settings import EngineSettings
from lorica.models.backbone import Backbone


class Aside:
    """One thread and the commands that wait for it. `send` is called from that thread."""

    def __init__(self, backbone: Backbone, settings: EngineSettings, send: Callable[[commands.Reply], None]) -> None:
        self._backbone = backbone
        self._root = (settings.root or Path()).absolute()
        self._send = send
        self._inbox: queue.SimpleQueue[commands.Asides] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, command: commands.Asides) -> None:
        """Take a command; the first one starts the thread."""
        self._inbox.put(command)
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="aside", daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        while True:
            command = self._inbox.get()
            try:
                with BESIDE:
                    reply = self.reply(command)
            except Exception as error:  # whatever a command raises ends that command alone
                reply = failure(command.id, error)
            self._send(reply)

    def reply(self, command: commands.Asides) -> commands.Reply:
        """Do what a command says. Raises LoricaError."""
        return self._combine(command) if isinstance(command, commands.Combine) else self._inspect(command)

    def _combine(self, command: commands.Combine) -> commands.Saved:
        folders = [self._root / path for path in command.adapters]
        parents = [
            files.load_adapter(folder, self._backbone, name)
            for folder, name in zip(folders, command.names, strict=True)
        ]
        rule = make_merging(command.how, **command.settings)
        origins = [
            replace(parent_at(folder, "merged-from"), path=name)
            for folder, name in zip(folders, command.names, strict=True)
        ]
        made, report = combine(parents, self._backbone, rule, command.weights, rank=command.rank, origins=origins)
        target = self._root / command.path
        with storage(target), replacing_folder(target) as folder:
            files.save_adapter(made, self._backbone, folder)
        size = sum(file.stat().st_size for file in target.iterdir())
        info = {**described(made), "base": made.base, "seed": made.seed, "optimizer": False, "report": str(report)}
        return commands.Saved(command.id, size, info)

    def _inspect(self, command: commands.Inspect) -> commands.Inspected:
        def load(path: str, name: str) -> Any:
            return files.load_adapter(self._root / path, self._backbone, name, finite=False)

        adapter = load(command.adapter, command.name)
        pairs = zip(command.against, command.against_names, strict=True)
        others = [(load(path, name), self._backbone) for path, name in pairs]
        search = Search(top=command.top, threshold=command.threshold) if command.intruders else None
        return commands.Inspected(command.id, inspect_adapter(adapter, self._backbone, others, search=search).to_dict())
