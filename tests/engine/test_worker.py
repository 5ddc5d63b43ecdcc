"""The engine process: it speaks frames, dies with its API, and what it was asked can be asked again after a kill."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorica.core.errors import LoricaError
from lorica.engine import commands
from lorica.engine.link import EngineError, EngineGone, EngineLink
from lorica.engine.residency import read_state
from lorica.engine.settings import EngineSettings, parse
from lorica.engine.worker import method_settings
from lorica.methods import all_methods
from tests.engine.service import ADAM, SPEC, datum, sample, train

pytestmark = pytest.mark.slow  # each starts a process that imports torch

BATCH = [datum(i, 5 + 3 * i) for i in range(4)]


@asynccontextmanager
async def engine(folder: Path, model: str = "tiny-llama", **settings: Any) -> AsyncIterator[EngineLink]:
    link = EngineLink(model, root=folder, data=folder / "data", threads=1, **settings)
    await link.start()
    try:
        yield link
    finally:
        await link.stop()


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(_inside(body), 120))


async def _inside(body: Callable[[], Awaitable[None]]) -> None:
    await body()


async def alive(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process is still there after some time; a dead child that nobody waited for is not."""
    for _ in range(int(seconds * 20)):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except FileNotFoundError:
            return False
        await asyncio.sleep(0.05)
    return True


def test_calls_are_answered_in_order_streams_tell_their_progress_and_errors_are_raised(tmp_path: Path) -> None:
    async def body() -> None:
        stats: list[commands.Stats] = []
        async with engine(tmp_path, on_stats=stats.append) as link:
            opened = await link.call(commands.Open(0, "a", SPEC))
            assert opened.parameters > 0
            many = [link.call(c) for _ in range(3) for c in (train("a", *BATCH), commands.Step(0, "a", ADAM))]
            told = await asyncio.gather(*many)
            losses = [reply.metrics["loss:sum"] for reply in told[::2]]
            assert losses[2] < losses[0]
            with pytest.raises(EngineError, match="Did you mean 'lora'") as caught:
                await link.call(commands.Open(0, "b", commands.RunSpec("lorra")))
            assert (caught.value.category, caught.value.code) == ("user", "method")
            events = [reply async for reply in link.stream(sample(max_tokens=4, temperature=0.0, stream=True))]
            tokens = [token for event in events[:-1] for token in event.tokens]
            assert tokens == np.frombuffer(events[-1].sequences[0].tokens.data, np.int32).tolist()
            assert link.open_calls == 0
            ids = [commands.Train(7, "a", BATCH * 5, "cross_entropy"), commands.Step(8, "a", ADAM)]
            calls = [asyncio.ensure_future(link.call(command)) for command in ids]
            await asyncio.sleep(0)
            assert (str(link.ahead(7)), str(link.ahead(8))) == (
                "nothing ahead",
                "1 request, 190 tokens of 1 tenant ahead",
            )
            await asyncio.gather(*calls)
            assert str(link.ahead(8)) == "nothing ahead"
        assert stats and stats[-1].values["runs"] == 1.0
        assert link.pid is None

    run(body)


def test_what_is_ready_tells_of_itself(tmp_path: Path) -> None:
    async def body() -> None:
        link = EngineLink("nano", root=tmp_path)
        ready = await link.start()
        info = ready.info
        assert set(info) == {
            *("family", "parameters", "layers", "hidden", "vocabulary", "context", "fingerprint", "dtype"),
            *("tokenizer", "eos_ids"),
        }
        assert ready.methods == method_settings() and set(ready.methods) == set(all_methods())
        assert info["family"] == "qwen3" and (Path(info["tokenizer"]) / "tokenizer.json").is_file() and info["eos_ids"]
        await link.stop()

    run(body)


def test_a_model_that_is_not_there_is_refused_with_its_sentence(tmp_path: Path) -> None:
    async def body() -> None:
        link = EngineLink("tiny-lama", root=tmp_path)
        with pytest.raises(EngineError, match="tiny-lama"):
            await link.start()
        assert not link.alive
        assert isinstance(EngineError("user", "x", "y"), LoricaError)

    run(body)


def test_after_kill_9_snapshot_and_replay_give_the_same_parameters_bit_for_bit(tmp_path: Path) -> None:
    spec = commands.RunSpec("lora", {"rank": 4, "dropout": 0.2}, seed=5)
    work = [c for i in range(6) for c in (train("a", *BATCH[i % 3 :]), commands.Step(0, "a", ADAM))]

    async def undisturbed() -> None:
        async with engine(tmp_path) as link:
            await link.call(commands.Open(0, "a", spec))
            for command in work:
                await link.call(command)
            await link.call(commands.Snapshot(0, "a", "expected"))

    async def killed() -> None:
        async with engine(tmp_path) as link:
            await link.call(commands.Open(0, "a", spec))
            for command in work[:5]:
                await link.call(command)
            await link.call(commands.Snapshot(0, "a", "half"))
            calls = [asyncio.ensure_future(link.call(command)) for command in work[5:]]
            await calls[1]
            pid = link.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert any(isinstance(result, EngineGone) for result in results)
            await link.wait_gone()
            with pytest.raises(EngineGone):
                await link.call(work[0])
            await link.restart()
            assert link.pid not in (None, pid)
            await link.call(commands.Open(0, "a", spec, snapshot="half"))
            for command in work[5:]:
                await link.call(command)
            await link.call(commands.Snapshot(0, "a", "again"))

    run(undisturbed)
    run(killed)
    one, two = read_state(tmp_path / "expected"), read_state(tmp_path / "again")
    assert one.record == two.record and set(one.tensors) == set(two.tensors) == {"flat", "exp_avg", "exp_avg_sq"}
    assert all(one.tensors[name].equal(two.tensors[name]) for name in one.tensors)


def test_signals_are_the_apis_and_the_end_of_the_socket_is_the_end(tmp_path: Path) -> None:
    async def body() -> None:
        async with engine(tmp_path) as link:
            pid = link.pid
            assert pid is not None
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
            await link.call(commands.Open(0, "a", SPEC))
            assert link.alive
            waiting = asyncio.ensure_future(link.call(sample(max_tokens=400, num_samples=256)))
            await asyncio.sleep(0.1)
            assert link._writer is not None
            link._writer.transport.abort()  # as when the API dies
            assert not await alive(pid)
            with pytest.raises(EngineGone):
                await waiting

    run(body)


def test_an_engine_whose_api_is_killed_ends_itself(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys\n"
        "from lorica.engine.link import EngineLink\n"
        "async def main():\n"
        "    link = EngineLink('tiny-llama', data=sys.argv[1], threads=1)\n"
        "    await link.start()\n"
        "    print(link.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    api = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert api.stdout is not None
    with api, api.stdout:
        pid = int(api.stdout.readline())
        api.kill()
        api.wait()
    assert not asyncio.run(alive(pid))


def test_who_stops_listening_to_a_stream_cancels_it(tmp_path: Path) -> None:
    async def body() -> None:
        async with engine(tmp_path, slots=1) as link:
            stream = link.stream(sample(max_tokens=450, stream=True))
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]
            short = await link.call(sample(max_tokens=2))
            assert short.sequences and link.open_calls == 0

    run(body)


def test_the_apis_side_imports_no_torch() -> None:
    program = "import sys, lorica.engine.link, lorica.engine.scheduler; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_settings_travel_as_arguments() -> None:
    settings = EngineSettings(model="a b", deterministic=True, kv_budget=0, data=Path("/x y"), threads=3)
    fd, found = parse(["--fd=7", *settings.arguments()])
    assert fd == 7 and found == settings
