"""The backbones that are served, each with one engine process that is started again when it dies.

In: names of models. Out: commands sent in the order of the calls, replies awaited; which life of an engine this is, and
whether it is ready. Refuses to know runs: whoever sent something to a life that ended is told so and sends it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lorica.core.errors import LoricaError
from lorica.engine.commands import Command, MethodSettings, Progress, Ready, Stats
from lorica.engine.link import EngineError, EngineGone, EngineLink
from lorica.server.observer import Observer
from lorica.server.settings import Settings

log = logging.getLogger("lorica.server.engine")

PATIENCE = (0.0, 0.1, 1.0, 5.0, 15.0)
"""Seconds before an engine is started again, by how many starts in a row came to nothing."""


class Backbone:
    """One model. `life` counts its engine's lives; `ready` is set while one works; `info` is what it told of itself,
    and `methods` what it told of the registered methods.
    """

    def __init__(self, name: str, folder: Path, observer: Observer, **settings: Any) -> None:
        self.name = name
        self.observer = observer
        self._folder = folder
        self.info: dict[str, Any] = {}
        self.methods: dict[str, MethodSettings] = {}
        self.life = 0
        self.ready = asyncio.Event()
        self.stats: dict[str, float] = {}
        self._link = EngineLink(name, on_stats=self._note, data=folder, **settings)
        self._sent: set[asyncio.Task[Any]] = set()

    @property
    def pid(self) -> int | None:
        """The engine's process."""
        return self._link.pid

    def send(self, command: Command) -> asyncio.Task[Any]:
        """Send a command, after all that was sent before; the reply when awaited. Raises EngineGone, EngineError."""
        return self._kept(asyncio.create_task(self._call(command, self.life)))

    async def _call(self, command: Command, life: int) -> Any:
        if life != self.life or not self.ready.is_set():  # what was meant for one life is not for the next
            raise EngineGone(f"The engine of {self.name!r} is not there.")
        begun = time.monotonic()
        reply = await self._link.call(command)
        self.observer.replied(self.name, command, reply, time.monotonic() - begun)
        return reply

    def send_quietly(self, command: Command) -> None:
        """Send a command whose reply nobody needs."""

        async def call() -> None:
            with contextlib.suppress(EngineGone, EngineError):
                await self._call(command, life)

        life = self.life
        self._kept(asyncio.create_task(call()))

    async def stream(self, command: Command) -> AsyncIterator[Any]:
        """Progress, then the final reply. Raises EngineGone, EngineError."""
        if not self.ready.is_set():
            raise EngineGone(f"The engine of {self.name!r} is not there.")
        begun = time.monotonic()
        async for reply in self._link.stream(command):
            if isinstance(reply, Progress):
                self.observer.progressed(command, reply)
            else:
                self.observer.replied(self.name, command, reply, time.monotonic() - begun)
            yield reply

    def _kept(self, task: asyncio.Task[Any]) -> asyncio.Task[Any]:
        self._sent.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._sent.discard(task)
        if not task.cancelled():
            task.exception()  # whoever awaits it sees it too

    async def start(self) -> None:
        """The first life. Raises LoricaError where there is no such model."""
        begun = time.monotonic()
        self._clear()
        self._begin(await self._link.start())
        log.info("engine ready", extra={"fields": {"model": self.name, "seconds": round(time.monotonic() - begun, 2)}})

    def _clear(self) -> None:
        """What a life put aside means nothing to the next one."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _begin(self, told: Ready) -> None:
        self.info, self.methods = dict(told.info), dict(told.methods)
        self.life += 1
        self.ready.set()
        self.observer.turned(self.name, ready=True)

    async def supervise(self) -> None:
        """Whenever the engine dies, begin a new life."""
        failures = 0
        while True:
            await self._link.wait_gone()
            self.ready.clear()
            self.observer.turned(self.name, ready=False)
            await asyncio.sleep(PATIENCE[min(failures, len(PATIENCE) - 1)])
            begun = time.monotonic()
            log.warning("engine died; starting it again", extra={"fields": {"model": self.name, "life": self.life}})
            self._clear()
            try:
                self._begin(await self._link.restart())
            except (LoricaError, EngineGone, OSError) as error:
                failures += 1
                log.error("engine of %s does not start: %s", self.name, error)
                continue
            failures = 0
            seconds = round(time.monotonic() - begun, 2)
            log.info("engine ready", extra={"fields": {"model": self.name, "life": self.life, "seconds": seconds}})

    def _note(self, stats: Stats) -> None:
        """What the engine told of its work."""
        self.stats = dict(stats.values)
        self.observer.reported(self.name, self.stats)

    async def stop(self) -> None:
        self.ready.clear()
        await self._link.stop()


class Backbones:
    """All that are served."""

    def __init__(self, settings: Settings, observer: Observer) -> None:
        self._settings = settings
        self._observer = observer
        self._all: dict[str, Backbone] = {}
        self._watch: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start every engine. Raises LoricaError naming the model that cannot be loaded."""
        for name in self._settings.models:
            folder = self._settings.data_dir.absolute() / "engines" / quote(name, safe="")
            self._all[name] = Backbone(name, folder, self._observer, **self._engine(name))
        await asyncio.gather(*(backbone.start() for backbone in self._all.values()))
        self._watch = [
            asyncio.create_task(backbone.supervise(), name=f"engine {backbone.name}") for backbone in self._all.values()
        ]

    def _engine(self, name: str) -> dict[str, Any]:
        """What an engine is started with."""
        settings = self._settings
        return {
            "dtype": settings.dtype,
            "quantize": settings.quantize,
            "threads": settings.threads,
            "deterministic": settings.deterministic,
            **settings.engine,
        }

    def find(self, name: str) -> Backbone | None:
        return self._all.get(name)

    def all(self) -> list[Backbone]:
        """In the order of the command line."""
        return list(self._all.values())

    async def stop(self) -> None:
        for task in self._watch:
            task.cancel()
        await asyncio.gather(*(backbone.stop() for backbone in self._all.values()), return_exceptions=True)
