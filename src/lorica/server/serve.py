"""Running a server until it is told to stop.

In: settings. Out: a listening process; on SIGTERM and Ctrl-C nothing new is taken, what the engines have is finished or
stays in the journal, and the runs are written down. Refuses to know what is printed.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from lorica.server import logs
from lorica.server.app import create_app
from lorica.server.settings import Settings
from lorica.server.state import Server, running

Told = Callable[[str, Server], None]
"""Hears of the URL where a server listens."""


class Host(uvicorn.Server):
    """uvicorn, which says where it listens, lets waiting clients go when it is told to stop, and drains."""

    def __init__(self, server: Server, told: Told) -> None:
        self._told = told
        self._lorica = server
        settings = server.settings
        super().__init__(
            uvicorn.Config(
                create_app(settings, server=server),
                host=settings.host,
                port=settings.port,
                log_config=None,
                access_log=False,
                timeout_keep_alive=120,
                timeout_graceful_shutdown=10,
                lifespan="off",
                ws="none",
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._told(self.url(), self._lorica)

    def url(self) -> str:
        """Where clients of this machine reach it."""
        host = self._lorica.settings.host
        bound = [s.getsockname()[1] for server in self.servers for s in server.sockets]
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        return f"http://{host}:{bound[0] if bound else self._lorica.settings.port}"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._lorica.dispatcher.draining = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._lorica.dispatcher.draining = True
        self._lorica.dispatcher.rt.futures.release()
        self._lorica.observer.changes.close()
        await super().shutdown(sockets)
        self._captured_signals.clear()  # the signal has been obeyed; the rest of the program ends by itself


async def _run(settings: Settings, told: Told) -> None:
    async with running(settings) as server:
        await Host(server, told).serve()


def serve(settings: Settings, told: Told) -> None:
    """Run until told to stop. Raises LoricaError where it cannot start."""
    logs.set_up(settings.log_json)
    asyncio.run(_run(settings, told))
