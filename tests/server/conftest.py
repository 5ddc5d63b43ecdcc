"""A real server: in a thread of the tests, or as a process that can be killed; and clients of the real SDK."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
import warnings
from pathlib import Path

import pytest
import tinker
from tinker import types

from lorica.server import serve
from lorica.server.settings import Settings
from lorica.server.state import running
from lorica.store import keys
from scripts.cookbook.served import free_port

os.environ.setdefault("TINKER_TELEMETRY", "0")


def pytest_configure(config):
    """The SDK leaves connections open when its client is collected."""
    for what in ("unclosed <socket", "unclosed transport", "unclosed event loop"):
        config.addinivalue_line("filterwarnings", f"ignore:{what}:ResourceWarning")
        warnings.filterwarnings("ignore", what, ResourceWarning)  # after the last test pytest looks once more


class Quiet(serve.Host):
    """Signals belong to the tests."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


class InThread:
    """A server in a thread, with its state at hand."""

    def __init__(self, folder: Path, **settings) -> None:
        self.settings = Settings(**{"models": ("nano",), "data_dir": folder, "port": 0, "threads": 1, **settings})
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._clients: list[tinker.ServiceClient] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(120), "the server did not start"
        if self._failure is not None:
            raise self._failure
        self.key = self.server.first_key

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self._failure = error
        finally:
            self._ready.set()

    async def _main(self) -> None:
        async with running(self.settings) as server:
            self.server, self.loop = server, asyncio.get_running_loop()
            self._host = Quiet(server, self._told)
            await self._host.serve()

    def _told(self, url, server) -> None:
        self.url = url
        self._ready.set()

    def call(self, coroutine):
        """Run something on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def new_key(self, tenant: str) -> str:
        return self.server.database.submit(lambda c: keys.create_key(c, tenant)).result()[1]

    def client(self, key: str | None = None) -> tinker.ServiceClient:
        made = tinker.ServiceClient(base_url=self.url, api_key=key or self.key)
        self._clients.append(made)
        return made

    def rest(self, key: str | None = None) -> tinker.RestClient:
        return tinker.RestClient(base_url=self.url, api_key=key or self.key)

    def stop(self) -> None:
        for client in self._clients:  # one that is left asks a dead server for minutes
            client.close("success").result(30)
        self._host.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self._failure is not None:
            raise self._failure


class Process:
    """`lorica serve` as a process, at one port over all its lives."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.port = free_port()
        self._arguments = arguments
        self.key: str | None = None
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"

    def start(self) -> None:
        words = ["serve", "--model", "nano", "--port", str(self.port), "--data-dir", str(self.folder / "data")]
        before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lorica.cli.main", *words, *self._arguments],
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            )
        ended = time.monotonic() + 60
        while b"Serving at" not in (new := self.log.read_bytes()[before:]):
            assert self.process.poll() is None and time.monotonic() < ended, self.log.read_text()[-4000:]
            time.sleep(0.02)
        for line in new.decode().splitlines():
            if "tml-" in line and self.key is None:
                self.key = line.split()[-1]

    def engine(self) -> int | None:
        """The engine's process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = children.read_text().split() if children.exists() else []
        return int(found[-1]) if found else None

    def kill(self, what: str) -> None:
        """`engine`, `api` or `both`, as the system kills; the API is started again."""
        engine = self.engine()
        if what in ("engine", "both") and engine is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(engine, signal.SIGKILL)
        if what in ("api", "both"):
            self.process.kill()
            self.process.wait()
            self.start()

    def terminate(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


@pytest.fixture(scope="module", params=["embedded", pytest.param("elsewhere", marks=pytest.mark.slow)])
def stored(request):
    """Where a server keeps its things: in its data directory, or in Postgres and in S3."""
    if request.param == "embedded":
        return {}
    bucket = request.getfixturevalue("s3")
    return {
        "database": request.getfixturevalue("postgres").new_database(),
        "artifacts": f"{bucket}/{uuid.uuid4().hex}",
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory, stored):
    made = InThread(tmp_path_factory.mktemp("server"), deterministic=True, long_poll_seconds=5, **stored)
    yield made
    made.stop()


@pytest.fixture
def service(server):
    return server.client()


def datum(tokens, weights=None, targets=None):
    tokens = list(tokens)
    targets = [*tokens[1:], tokens[0]] if targets is None else targets
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens),
        loss_fn_inputs={"target_tokens": targets, "weights": weights or [1.0] * len(tokens)},
    )


SGD = {"beta1": 0.0, "beta2": 0.0, "eps": 1e4}
"""Adam that is nearly plain descent, so that the scale of a gradient can be seen."""


def adam(lr=1e-3, **fields):
    return types.AdamParams(learning_rate=lr, **fields)


def step(run, data, lr=1e-3, **fields):
    """One training step; its loss."""
    forward, stepped = run.forward_backward(data, "cross_entropy"), run.optim_step(adam(lr, **fields))
    loss = forward.result().metrics["loss:sum"]
    stepped.result()
    return loss
