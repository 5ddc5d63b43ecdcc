"""Nothing acknowledged is lost: the engine, the API or both are killed while the real SDK trains, and it goes on."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time

import pytest
import tinker
from tinker import types

from tests.server.conftest import Process, adam, datum, step

pytestmark = pytest.mark.slow
DATA = [datum(range(10, 26)), datum(range(40, 52))]


@pytest.fixture
def flags():
    return ["--deterministic"]


@pytest.fixture
def process(tmp_path, flags):
    made = Process(tmp_path, *flags, "--set", "snapshots.every_requests=7", "--set", "long_poll_seconds=5")
    made.start()
    yield made
    if made.process.poll() is None:
        while clients:  # one that is left asks a dead server for minutes
            clients.pop().close("success").result(60)
        made.process.kill()
        made.process.wait()


clients: list[tinker.ServiceClient] = []


def curve(process, steps, disturb=None, metadata=None):
    """The losses of a run; `disturb` is called before each step."""
    client = tinker.ServiceClient(base_url=process.url, api_key=process.key)
    run = client.create_lora_training_client("nano", rank=4, seed=3, user_metadata=metadata).result()
    losses = []
    for i in range(steps):
        if disturb is not None:
            disturb(i)
        losses.append(step(run, DATA, lr=2e-3, weight_decay=0.01))
    clients.append(client)
    return run, losses


@pytest.mark.parametrize("flags", [["--deterministic"], []], ids=["deterministic", "alone"])
@pytest.mark.parametrize("what", ["engine", "api", "both"])
def test_a_kill_changes_no_bit_of_the_loss_curve(process, what):
    undisturbed = curve(process, 8)[1]

    def disturb(i):
        if i in (3, 5):
            threading.Timer(0.05, process.kill, [what]).start()

    run, disturbed = curve(process, 8, disturb)
    time.sleep(1)
    assert disturbed == undisturbed
    sampler = run.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints([1, 2, 3])
    before = sampler.compute_logprobs(prompt).result()
    process.kill(what)
    assert sampler.compute_logprobs(prompt).result() == before, "a snapshot can be sampled after a restart"


@pytest.mark.parametrize("settings", [{"method": "adalora", "steps": "8"}, {"method": "lora_pro"}], ids=str)
def test_a_kill_of_both_loses_nothing_that_a_method_keeps_between_steps(process, settings):
    undisturbed = curve(process, 8, metadata=settings)[1]

    def disturb(i):
        if i in (3, 5):
            threading.Timer(0.05, process.kill, ["both"]).start()

    assert curve(process, 8, disturb, settings)[1] == undisturbed
    time.sleep(1)  # the last kill may come after the last step


def test_fifty_kills_at_random_moments_change_no_bit(process):
    steps = 120
    undisturbed = curve(process, steps)[1]
    rng = random.Random(0)
    kills: list[str] = []
    stop = threading.Event()

    def killer():
        while len(kills) < 50 and not stop.is_set():
            time.sleep(rng.uniform(0.1, 1.5))
            what = rng.choice(["engine", "api", "both"])
            process.kill(what)
            kills.append(what)

    thread = threading.Thread(target=killer)
    thread.start()
    run, _ = curve(process, 0)
    disturbed = []
    while thread.is_alive() or len(disturbed) < steps:
        loss = step(run, DATA, lr=2e-3, weight_decay=0.01)
        disturbed.append(loss)
        if len(disturbed) >= steps and not thread.is_alive():
            break
    stop.set()
    thread.join()
    assert len(kills) >= 50 and disturbed[:steps] == undisturbed


def test_sigterm_drains_and_the_next_start_goes_on(process):
    run, _ = curve(process, 3)
    pending = [run.forward_backward(DATA, "cross_entropy") for _ in range(4)]
    time.sleep(0.2)
    assert process.terminate() == 0
    process.start()
    assert len({f.result().metrics["loss:sum"] for f in pending}) == 1
    run.optim_step(adam()).result()
    while clients:
        clients.pop().close("success").result(60)
    process.terminate()
    check = subprocess.run(
        [sys.executable, "-m", "lorica.cli.main", "store", "check", "--data-dir", str(process.folder / "data")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stdout
