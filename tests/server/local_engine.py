"""A real engine in this process: `Sample` commands go through `Samplers`, as they do in an engine process."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import msgspec

from lorica.core.errors import LoricaError
from lorica.engine.commands import Progress, Sample
from lorica.engine.core import failure
from lorica.engine.host import Host
from lorica.engine.link import EngineError, EngineGone
from lorica.engine.samplers import Samplers
from lorica.engine.stream import Stream


class LocalEngine:
    """`sent` are the commands that came. After telling `dies_after` tokens it is gone once, as a killed engine is."""

    def __init__(self, backbone):
        self.host = Host(backbone)
        self.samplers = Samplers(Stream(self.host), Path(), 8)
        self.ready = asyncio.Event()
        self.ready.set()
        self.sent = []
        self.cancelled = []
        self.told = 0
        self.dies_after = None
        self._inbox = {}
        self._ids = itertools.count(1)

    async def stream(self, command):
        assert isinstance(command, Sample)
        self.sent.append(command)
        id = next(self._ids)
        try:
            self.samplers.add(msgspec.structs.replace(command, id=id))
        except LoricaError as error:
            raise EngineError("user", error.code, error.message) from None
        try:
            async for reply in self._replies(id):
                yield reply
                if isinstance(reply, Progress):
                    self.told += 1
                    if self.told == self.dies_after:
                        raise EngineGone("The engine died.")
        finally:
            if self.samplers.cancel(id):
                self.cancelled.append(id)

    async def _replies(self, id):
        while True:
            for reply in self._inbox.pop(id, []):
                if isinstance(reply, tuple):
                    failed = failure(*reply)
                    raise EngineError(failed.category, failed.code, failed.message)
                yield reply
                if not isinstance(reply, Progress):
                    return
            for reply in self.samplers.turn(2048):
                self._inbox.setdefault(reply[0] if isinstance(reply, tuple) else reply.id, []).append(reply)
            await asyncio.sleep(0)
