"""Two clients train a LoRA and a DoRA at once; one is killed, the server is killed, both continue; PEFT loads both."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
import torch

import lorica
from tests.server.conftest import Process

pytestmark = pytest.mark.slow
STEPS = 12
CLIENT = """
import json, sys, time
import tinker
from tinker import types

method, state, steps, saves = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True"
service = tinker.ServiceClient()
if state:
    run = service.create_training_client_from_state_with_optimizer(state).result()
else:
    run = service.create_lora_training_client(
        "nano", rank=4, seed=1, train_unembed=False, user_metadata={"method": method}
    ).result()
rows = [[11, 12, 13, 14, 15, 16, 17, 18], [30, 41, 52, 63, 74, 85]]
data = [
    types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={"target_tokens": ids[1:], "weights": [1.0] * (len(ids) - 1)},
    )
    for ids in rows
]
for step in range(steps):
    loss, done = run.forward_backward(data, "cross_entropy"), run.optim_step(types.AdamParams(learning_rate=5e-3))
    path = run.save_state(f"step{step}").result().path if saves else None
    done.result()
    print(json.dumps({"loss": loss.result().metrics["loss:sum"], "path": path}), flush=True)
print(json.dumps({"path": run.save_weights_for_sampler("end").result().path}), flush=True)
"""


class Client:
    """A client in a process of its own, which prints what it got."""

    def __init__(
        self, server: Process, method: str, *, state: str = "", steps: int = STEPS, saves: bool = True
    ) -> None:
        env = {**os.environ, "TINKER_BASE_URL": server.url, "TINKER_API_KEY": server.key, "TINKER_TELEMETRY": "0"}
        words = [sys.executable, "-W", "ignore", "-c", CLIENT, method, state, str(steps), str(saves)]
        self.process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True)
        self.told: list[dict[str, object]] = []

    def read(self, count: int | None = None) -> list[dict[str, object]]:
        """So many lines more, or all until its end."""
        while count is None or count > 0:
            line = self.process.stdout.readline()
            if not line:
                break
            self.told.append(json.loads(line))
            count = None if count is None else count - 1
        if count is None:
            assert self.process.wait(120) == 0
            self.process.stdout.close()
        return self.told

    def kill(self) -> list[dict[str, object]]:
        """What it got until it was killed, the lines that nobody has read yet included."""
        self.process.kill()
        with self.process.stdout as rest:
            self.told += [json.loads(line) for line in rest if line.endswith("}\n")]
        self.process.wait()
        return self.told


def undisturbed(tmp_path, method: str) -> list[float]:
    (tmp_path / method).mkdir()
    server = Process(tmp_path / method, "--deterministic")
    server.start()
    told = Client(server, method).read()
    assert server.terminate() == 0
    return [line["loss"] for line in told[:-1]]


def test_both_continue_and_their_adapters_load_in_peft(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    server = Process(tmp_path, "--deterministic")
    server.start()
    lora, dora = Client(server, "lora"), Client(server, "dora")
    lora.read(4)
    dora.read(4)
    before = dora.kill()
    server.kill("both")
    finished = lora.read()
    again = Client(server, "dora", state=before[-1]["path"], steps=STEPS - len(before))
    losses = {
        "lora": [line["loss"] for line in finished[:-1]],
        "dora": [line["loss"] for line in [*before, *again.read()[:-1]]],
    }
    for method, path in (("lora", finished[-1]["path"]), ("dora", again.told[-1]["path"])):
        folder = tmp_path / f"{method}-adapter"
        folder.mkdir()
        run, kind, name = path.removeprefix("tinker://").split("/")
        url = f"{server.url}/api/v1/training_runs/{run}/checkpoints/{kind}/{name}/external_weights_urls"
        for file, link in httpx.get(url, headers={"X-API-Key": server.key}).json()["urls"].items():
            (folder / file).write_bytes(httpx.get(link).content)
        model = peft.PeftModel.from_pretrained(lorica.load("nano").module, folder)
        ids = torch.tensor([[11, 12, 13, 14, 15, 16, 17, 18]])
        with torch.no_grad():
            scores = model(input_ids=ids).logits.log_softmax(-1)[0, torch.arange(7), ids[0, 1:]]
        assert float(-scores.sum()) < losses[method][0] / 2, "it is the trained adapter that PEFT has"
    assert server.terminate() == 0
    for method, curve in losses.items():
        assert np.array_equal(curve, undisturbed(tmp_path, method)), method


def test_a_full_disk_is_reported_and_the_run_goes_on_once_there_is_room(tmp_path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount a small file system, so no disk can be filled")
    try:
        server = Process(disk, "--deterministic")
        server.log = tmp_path / "log"
        server.start()
        client = Client(server, "lora", saves=False)
        client.read(2)
        with (disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while ballast.write(b"x" * 2**20):
                pass
        deadline = time.monotonic() + 60
        while b"storage" not in server.log.read_bytes() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert b"storage" in server.log.read_bytes(), "a full disk is said in the log"
        assert server.process.poll() is None, "and ends nothing"
        (disk / "ballast").unlink()
        curve = [line.get("loss") for line in client.read()[:-1]]
        assert server.terminate() == 0
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
    assert np.array_equal(curve, undisturbed(tmp_path, "lora"))
