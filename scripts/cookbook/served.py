"""`lorica serve` in a process of its own, and what a client needs of it.

In: model names, a data directory. Out: the address and a key, once `/ready` answers. Refuses to know the server's code:
it is started, asked and stopped as a user would.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

KEY = re.compile(r"\btml-[A-Za-z0-9_\-]+")
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


@dataclass
class Served:
    """A running server. `output` is the file that holds what it printed."""

    process: subprocess.Popen[bytes]
    url: str
    key: str
    output: Path
    data: Path
    started: float
    """Seconds from the start of the process until it was ready."""

    def environment(self) -> dict[str, str]:
        """For a client that knows nothing but the SDK's variables."""
        return {"TINKER_BASE_URL": self.url, "TINKER_API_KEY": self.key, "TINKER_TELEMETRY": "0"}

    def pids(self) -> list[int]:
        """The process and all its descendants."""
        return descendants(self.process.pid)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def descendants(pid: int) -> list[int]:
    """`pid` and the processes below it, as /proc shows them."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [p for child in task.read_text().split() for p in descendants(int(child))]
        except OSError:  # it ended meanwhile
            continue
    return found


def ready(url: str) -> bool:
    """Whether `/ready` says yes."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def serve(models: Sequence[str], home: Path, *flags: str, limit: float = 90.0) -> Iterator[Served]:
    """Start in `home`, where relative model names are looked for; stop with SIGTERM at the end."""
    port, data, output = free_port(), home / "data", home / "serve.log"
    url = f"http://127.0.0.1:{port}"
    named = [word for model in models for word in ("--model", model)]
    command = [sys.executable, "-m", "lorica.cli.main", "serve", *named, "--port", str(port), "--data-dir", str(data)]
    start = time.perf_counter()
    with output.open("wb") as log:
        process = subprocess.Popen(
            [*command, *flags], cwd=home, env=os.environ | QUIET, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        while not (ready(url) and KEY.search(output.read_text(errors="replace"))):
            said = output.read_text(errors="replace")
            assert process.poll() is None, f"lorica serve ended with {process.returncode}:\n{said}"
            assert time.perf_counter() - start < limit, (
                f"lorica serve is not ready, or printed no key, after {limit} s:\n{said}"
            )
            time.sleep(0.1)
        took = time.perf_counter() - start
        key = KEY.findall(output.read_text(errors="replace"))[0]
        yield Served(process, url, key, output, data, took)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
