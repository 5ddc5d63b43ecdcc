"""The API's side of an engine process: start it, call it, notice its death.

In: commands. Out: replies, or an `EngineError`; `EngineGone` for all that a dead engine leaves open, so that it can be
sent again to the next one. Imports no torch. Refuses to know what commands mean and how runs are rebuilt.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lorica.core.errors import LoricaError
from lorica.engine import commands
from lorica.engine.scheduler import Ahead
from lorica.engine.settings import EngineSettings

log = logging.getLogger("lorica.engine.link")
LENGTH = struct.Struct("<I")
OWN_IDS = 2**48
"""Where the ids begin that a link gives to commands without one."""
PATIENCE = 5.0
"""Seconds that an engine has to end after its socket was closed."""


class EngineError(LoricaError):
    """A command that failed. `category` is `user` (the request was wrong) or `server`; `code` is the error's."""

    def __init__(self, category: str, code: str, message: str) -> None:
        super().__init__(message)
        self.category = category
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        return (EngineError, (self.category, self.code, self.message))


class EngineGone(LoricaError):  # noqa: N818 - no error of anybody's request
    """The engine died before it answered; nothing is known of what it did."""

    code = "engine_gone"


@dataclass(slots=True, eq=False)
class _Call:
    """A command that is not answered."""

    tenant: str = ""
    tokens: int = 0
    replies: asyncio.Queue[commands.Reply | None] = field(default_factory=asyncio.Queue)


class EngineLink:
    """One engine process. Commands with id 0 get an id; all others must have ids that no open command has.

    Args:
        model: the backbone; settings: further fields of `EngineSettings`.
        on_stats: called with every report of the engine.
    """

    def __init__(
        self, model: str, *, on_stats: Callable[[commands.Stats], None] | None = None, **settings: Any
    ) -> None:
        self.settings = EngineSettings(model=model, **settings)
        self.on_stats = on_stats
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._open: dict[int, _Call] = {}
        self._tenants: dict[str, str] = {}
        self._gone = asyncio.Event()
        self._gone.set()
        self._ids = itertools.count(OWN_IDS)

    @property
    def pid(self) -> int | None:
        """The engine's process, while it is there."""
        return None if self._process is None or self._gone.is_set() else self._process.pid

    @property
    def alive(self) -> bool:
        return not self._gone.is_set()

    @property
    def open_calls(self) -> int:
        """Commands that are not answered."""
        return len(self._open)

    def ahead(self, id: int) -> Ahead:
        """What was sent before a command and is not answered; nothing for a command that is not open itself."""
        before = list(itertools.takewhile(lambda other: other != id, self._open)) if id in self._open else []
        calls = [self._open[other] for other in before]
        return Ahead(len(calls), sum(call.tokens for call in calls), len({call.tenant for call in calls}))

    # -- the process ---------------------------------------------------------------------------------------------

    async def start(self) -> commands.Ready:
        """Start the process and wait until it is ready. Raises EngineError: it refuses; EngineGone: it dies."""
        if self._process is not None:
            raise RuntimeError("the engine was started already")
        ours, theirs = socket.socketpair()
        try:
            arguments = [f"--fd={theirs.fileno()}", *self.settings.arguments()]
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "lorica.engine.worker", *arguments,
                stdin=asyncio.subprocess.DEVNULL, pass_fds=[theirs.fileno()], env={**os.environ},
                start_new_session=True,  # a terminal's Ctrl-C is for the API, which drains
            )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        first = _Call()
        self._open, self._tenants = {0: first}, {}
        self._gone.clear()
        self._reading = asyncio.create_task(self._read(reader), name=f"engine {self.settings.model}")
        reply = await first.replies.get()
        self._open.pop(0, None)
        if isinstance(reply, commands.Ready):
            return reply
        await self.stop()
        raise _error(reply) if isinstance(reply, commands.Failed) else self._lost()

    async def stop(self) -> None:
        """Close the socket, which ends the process; kill it where that takes too long."""
        process, writer, reading = self._process, self._writer, self._reading
        self._process = self._writer = self._reading = None
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        if process is not None:
            try:
                await asyncio.wait_for(process.wait(), PATIENCE)
            except TimeoutError:
                process.kill()
                await process.wait()
        if reading is not None:
            await reading

    async def restart(self) -> commands.Ready:
        """A new process in place of the one that died (or is stopped now)."""
        await self.stop()
        return await self.start()

    async def wait_gone(self) -> None:
        """Wait until there is no engine any more."""
        await self._gone.wait()

    # -- commands ------------------------------------------------------------------------------------------------

    async def call(self, command: commands.Command) -> Any:
        """The final reply of a command. Commands are sent in the order of the calls. Raises EngineError, EngineGone."""
        id, call = self._send(command)
        try:
            await self._drained()
            while True:
                reply = await call.replies.get()
                if not isinstance(reply, commands.Progress):
                    return self._final(reply)
        finally:
            self._open.pop(id, None)

    async def stream(self, command: commands.Command) -> AsyncIterator[Any]:
        """Every `Progress` of a command, then its final reply. Who stops listening cancels it."""
        id, call = self._send(command)
        finished = False
        try:
            await self._drained()
            while True:
                reply = await call.replies.get()
                finished = not isinstance(reply, commands.Progress)
                yield self._final(reply) if finished else reply
                if finished:
                    return
        finally:
            self._open.pop(id, None)
            if not finished and self.alive:
                self._write(commands.Cancel(next(self._ids), id))

    def _send(self, command: commands.Command) -> tuple[int, _Call]:
        """Write a command at once, so that order is that of the calls."""
        if not self.alive:
            raise self._lost()
        if not command.id:
            command = msgspec.structs.replace(command, id=next(self._ids))
        if command.id in self._open:
            raise ValueError(f"command {command.id} is open already")
        if isinstance(command, commands.Open):
            self._tenants[command.run] = command.tenant
        elif isinstance(command, commands.Close):
            self._tenants.pop(command.run, None)
        tenant = command.tenant if isinstance(command, commands.Sample) else self._tenants.get(_run(command), "")
        call = self._open[command.id] = _Call(tenant, _tokens(command))
        self._write(command)
        return command.id, call

    def _write(self, command: commands.Command) -> None:
        content = commands.encode(command)
        assert self._writer is not None
        self._writer.writelines([LENGTH.pack(len(content)), content])

    async def _drained(self) -> None:
        """Wait while the engine does not keep up with reading."""
        writer = self._writer
        if writer is not None:
            with contextlib.suppress(ConnectionError):  # the reader tells of the death
                await writer.drain()

    def _final(self, reply: commands.Reply | None) -> commands.Reply:
        if reply is None:
            raise self._lost()
        if isinstance(reply, commands.Failed):
            raise _error(reply)
        return reply

    def _lost(self) -> EngineGone:
        return EngineGone(f"The engine of {self.settings.model!r} died before it answered.")

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Hand replies to whoever waits for them; at the end tell all that are left."""
        try:
            while True:
                (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                reply = commands.decode_reply(await reader.readexactly(length))
                if isinstance(reply, commands.Stats):
                    self._report(reply)
                elif reply.id in self._open:
                    self._open[reply.id].replies.put_nowait(reply)
        except (asyncio.IncompleteReadError, OSError):
            pass
        except msgspec.MsgspecError:
            log.exception("the engine sent what is no reply; it is taken for dead")
        finally:
            self._gone.set()
            if self._writer is not None:
                self._writer.close()
            for call in self._open.values():
                call.replies.put_nowait(None)
            self._open = {}

    def _report(self, stats: commands.Stats) -> None:
        try:
            if self.on_stats is not None:
                self.on_stats(stats)
        except Exception:
            log.exception("a report of the engine could not be taken")


def _run(command: commands.Command) -> str:
    run = getattr(command, "run", "")
    assert isinstance(run, str)
    return run


def _tokens(command: commands.Command) -> int:
    """Tokens that a command asks the engine to read."""
    if isinstance(command, commands.Train):
        return sum(datum.tokens.shape[0] for datum in command.datums if datum.tokens.shape)
    return command.prompt.shape[0] if isinstance(command, commands.Sample) and command.prompt.shape else 0


def _error(reply: commands.Failed) -> EngineError:
    return EngineError(reply.category, reply.code, reply.message)
