"""Runs: spilled, snapshotted, saved and loaded, they continue bit for bit; what is damaged is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorica.adapters.files import load_adapter
from lorica.adapters.targets import Targets, select
from lorica.core.errors import LoricaError
from lorica.core.site import Site
from lorica.engine import commands
from lorica.engine.residency import Recent
from lorica.engine.runs import OPTIMIZER
from lorica.methods import all_methods, get_method
from tests.engine.service import ADAM, SPEC, RefusedError, Service, datum, train
from tests.tiny import tiny

BATCH = [datum(i, 5 + 3 * i) for i in range(4)]
SPECS = {
    **{name: commands.RunSpec(name, seed=3) for name in all_methods()},
    "lora": commands.RunSpec("lora", {"rank": 4, "dropout": 0.2}, seed=3),
    "dora": commands.RunSpec("dora", {"rank": 2}, {"include": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3}}),
    "vera": commands.RunSpec("vera", {"rank": 8}),
    "pissa": commands.RunSpec("pissa", {"rank": 2}),
    # nobody tells an engine how many steps a run will have; here the choice of triplets becomes final in the middle
    "adalora": commands.RunSpec("adalora", {"rank": 4, "steps": 4, "final": 1, "keep": 0.5}),
    "delta": commands.RunSpec("delta", {}, {"include": ["q_proj"]}),
    "glora supernet": commands.RunSpec("glora", {"rank": 2, "supernet": True}),
    "intrinsic": commands.RunSpec("intrinsic", {"dimension": 60}),
    "lora_fa correct": commands.RunSpec("lora_fa", {"rank": 2, "correct": True}),
    "lora_fused": commands.RunSpec("lora_fused", {"rank": 2}, {"include": ["c_attn"]}),
    "lora_pro factor": commands.RunSpec("lora_pro", {"rank": 2, "state": "factor"}),
    "lora_pro sgd": commands.RunSpec("lora_pro", {"rank": 2, "optimizer": "sgd"}),
    "singlora": commands.RunSpec("singlora", {"rank": 2, "ramp": 5}),
}
"""Every method that is registered, and further settings of some whose step hooks do something else there."""
HOOKED = [key for key, spec in SPECS.items() if get_method(spec.method).has_step_hooks()]
QUICK = {"lora", "adalora", "glora supernet", "lora_pro", "singlora"}
"""No hooks, and hooks that keep counts, draw, keep moments of another shape, and count steps."""


def quickly(keys: Iterable[str]) -> list[Any]:
    return [key if key in QUICK else pytest.param(key, marks=pytest.mark.slow) for key in keys]


def service(key: str, **settings: Any) -> Service:
    """An engine whose backbone has a site for the method."""
    return Service(tiny(next(f for f in ("llama", "gpt2") if _fits(f, SPECS[key]))), **settings)


@cache
def _sites(family: str) -> dict[str, Site]:
    return tiny(family).sites


def _fits(family: str, spec: commands.RunSpec) -> bool:
    method = get_method(spec.method).parse(spec.config)
    try:
        return bool(select(_sites(family), method, Targets.parse(spec.targets)))
    except LoricaError:
        return False


def same_runs(one: Service, two: Service, *runs: str) -> None:
    """Values, gradients, what hooks wrote, and what the optimiser and the method keep: every bit."""
    for run in runs:
        (a, a_optimizer), (b, b_optimizer) = (home.core.runs.get(run).live() for home in (one, two))
        assert torch.equal(a.flat, b.flat)
        assert torch.equal(a.grad, b.grad)
        assert a_optimizer.done == b_optimizer.done
        for mine, other in ((a.changing(), b.changing()), (a_optimizer.tensors(), b_optimizer.tensors())):
            assert mine.keys() == other.keys()
            assert all(torch.equal(value, other[name]) for name, value in mine.items())


def work(home: Service, run: str, steps: int = 2) -> list[dict[str, float]]:
    """Steps, and a gradient that waits."""
    told = []
    for i in range(steps):
        told.append(home.ask(train(run, *BATCH[i % 2 :])).metrics)
        told.append(home.ask(commands.Step(0, run, commands.Adam(lr=0.02, weight_decay=0.1))).metrics)
    told.append(home.ask(train(run, *BATCH)).metrics)
    return told


@pytest.mark.parametrize("method", quickly(SPECS))
def test_a_snapshot_continues_bit_for_bit_in_another_engine(method: str, tmp_path: Path) -> None:
    first, second = service(method, folder=tmp_path), service(method, folder=tmp_path)
    first.open("a", spec=SPECS[method])
    work(first, "a")
    saved = first.ask(commands.Snapshot(0, "a", "snap/one.safetensors"))
    assert saved.size == (tmp_path / "snap/one.safetensors").stat().st_size
    opened = second.ask(commands.Open(0, "a", SPECS[method], snapshot="snap/one.safetensors"))
    assert opened.method == SPECS[method].method and second.core.runs.resident == 0, "tensors are read on first use"
    for home in (first, second):
        home.told_ = [home.ask(commands.Step(0, "a", ADAM)).metrics, *work(home, "a")]  # type: ignore[attr-defined]
    assert first.told_ == second.told_  # type: ignore[attr-defined]
    same_runs(first, second, "a")


@pytest.mark.parametrize("method", quickly(SPECS))
def test_runs_that_were_spilled_come_back_bit_for_bit(method: str, tmp_path: Path) -> None:
    crowded, roomy = service(method, folder=tmp_path, resident=2), service(method, folder=tmp_path, resident=20)
    told = []
    for home in (crowded, roomy):
        home.open(*"abc", spec=SPECS[method])
        told.append([work(home, run, 1) for _ in range(2) for run in "abc"])
    assert told[0] == told[1]
    assert (crowded.core.runs.resident, crowded.core.runs.spilled) == (2, 1)
    assert len(crowded.core.host.adapters) == 2
    same_runs(crowded, roomy, *"abc")
    for run in "abc":
        crowded.ask(commands.Close(0, run))
    assert not list((crowded.core.runs.spill).iterdir()), "what was spilled goes with its run"


def test_the_hosts_memory_comes_before_files_where_the_device_has_its_own(tmp_path: Path) -> None:
    crowded, roomy = Service(folder=tmp_path, resident=1), Service(folder=tmp_path)
    crowded.core.runs._hosted = Recent(2)  # as for a GPU
    for home in (crowded, roomy):
        home.open(*"abcde", spec=SPECS["lora"])
    told = [[work(home, run, 1) for _ in range(2) for run in "abcde"] for home in (crowded, roomy)]
    assert told[0] == told[1]
    assert len(list(crowded.core.runs.spill.iterdir())) == 2, "five runs: one resident, two in memory, two in files"


def test_more_runs_than_places_share_rounds_of_large_requests(tmp_path: Path) -> None:
    crowded, roomy = (Service(folder=tmp_path, resident=n, token_budget=32) for n in (2, 20))
    for home in (crowded, roomy):
        home.open(*"abcde", spec=SPECS["lora"])
        ids = [home.send(train(run, *[datum(i, 20) for i in range(4)])) for run in "abcde"]
        home.run()
        assert all(home.told(id) for id in ids)
    for run in "abcde":
        torch.testing.assert_close(crowded.grad(run), roomy.grad(run), rtol=1e-4, atol=1e-6)


def test_a_run_that_only_looked_is_not_written_again(tmp_path: Path) -> None:
    home = Service(folder=tmp_path, resident=1)
    home.open("a", "b")
    (file,) = home.core.runs.spill.iterdir()
    written = file.stat().st_mtime_ns
    home.ask(train("a", *BATCH, backward=False))
    home.ask(train("b", *BATCH, backward=False))
    assert file.stat().st_mtime_ns == written
    home.ask(train("a", *BATCH))
    assert not file.exists()


def test_many_known_runs_cost_memory_for_the_resident_ones_alone(tmp_path: Path) -> None:
    home = Service(folder=tmp_path, resident=2)
    home.open("a")
    home.ask(commands.Snapshot(0, "a", "one"))
    for i in range(300):
        home.core.submit(commands.Open(i, f"r{i}", SPEC, snapshot="one"))
    while home.core.busy:
        home.core.turn()
    assert (len(home.core.runs), home.core.runs.resident, len(home.core.host.adapters)) == (301, 1, 1)
    work(home, "r299", 1)


def test_a_snapshot_may_be_deleted_once_a_later_one_is_there(tmp_path: Path) -> None:
    home = Service(folder=tmp_path, resident=1)
    home.open("a", "b")
    work(home, "a")
    home.ask(commands.Snapshot(0, "a", "one"))
    home.ask(commands.Close(0, "a"))
    home.open("a", snapshot="one")
    home.ask(commands.Snapshot(0, "a", "two"))
    (tmp_path / "one").unlink()
    before = home.flat("a")
    home.ask(train("b", *BATCH))
    assert torch.equal(home.flat("a"), before)


def test_optimiser_and_gradient_rows_are_made_when_they_are_needed(tmp_path: Path) -> None:
    home = Service(folder=tmp_path)
    home.open("a")
    home.ask(commands.Snapshot(0, "a", "one"))
    size = home.flat("a").numel() * 4
    assert size < (tmp_path / "one").stat().st_size < 1.5 * size + 20_000
    assert home.core.runs.get("a").live()[0]._grad is None


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", quickly(HOOKED))
def test_a_checkpoint_with_its_optimiser_has_all_that_a_method_keeps_between_steps(method: str, tmp_path: Path) -> None:
    first, second = service(method, folder=tmp_path), service(method, folder=tmp_path)
    first.open("a", spec=SPECS[method])
    work(first, "a")
    first.ask(commands.Step(0, "a", ADAM))
    first.ask(commands.Save(0, "a", "c1", state=True))
    second.open("a", spec=commands.RunSpec(SPECS[method].method, parent="c1"))
    second.ask(commands.Load(0, "a", "c1", optimizer=True))
    same_runs(first, second, "a")
    assert work(first, "a") == work(second, "a")
    same_runs(first, second, "a")


def test_a_step_that_its_method_refuses_leaves_the_gradient_bit_for_bit_and_the_run_as_it_was(tmp_path: Path) -> None:
    home, other = Service(folder=tmp_path), Service(folder=tmp_path)
    for one in (home, other):
        one.open("a", spec=commands.RunSpec("adalora", {"rank": 2}))
        one.ask(train("a", *BATCH))
    with pytest.raises(RefusedError, match="nobody said how many steps there are. Set the method's `steps`") as caught:
        home.ask(commands.Step(0, "a", commands.Adam(lr=0.02, clip=1e-3)))
    assert (caught.value.reply.category, caught.value.reply.code) == ("user", "method")
    same_runs(home, other, "a")
    assert home.ask(train("a", *BATCH)).metrics == other.ask(train("a", *BATCH)).metrics
    same_runs(home, other, "a")


def test_a_training_checkpoint_continues_with_its_optimiser_in_the_same_and_in_a_new_run(tmp_path: Path) -> None:
    home = Service(folder=tmp_path)
    home.open("a", spec=SPECS["lora"])
    work(home, "a")
    home.ask(commands.Step(0, "a", ADAM))
    home.ask(commands.Save(0, "a", "c1", state=True))
    assert {file.name for file in (tmp_path / "c1").iterdir()} >= {OPTIMIZER, "adapter_model.safetensors"}
    expected = [work(home, "a"), home.flat("a")]
    home.ask(commands.Load(0, "a", "c1", optimizer=True))
    assert [work(home, "a")] == expected[:1] and torch.equal(home.flat("a"), expected[1])
    home.open("b", spec=commands.RunSpec("lora", parent="c1"))
    opened = home.ask(commands.Load(0, "b", "c1", optimizer=True))
    assert (opened.method, opened.rank, opened.config["dropout"]) == ("lora", 4, 0.2)
    assert [work(home, "b")] == expected[:1]
    home.ask(commands.Load(0, "b", "c1", optimizer=False))
    assert not home.grad("b").any()
    assert [work(home, "b")] != expected[:1]


def test_a_saved_adapter_is_a_peft_folder(tmp_path: Path) -> None:
    home = Service(folder=tmp_path)
    home.open("a")
    work(home, "a")
    home.ask(commands.Save(0, "a", "w/s1", state=False))
    config = json.loads((tmp_path / "w/s1/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and not (tmp_path / "w/s1" / OPTIMIZER).exists()
    loaded = load_adapter(tmp_path / "w/s1", home.core.host.backbone, "x")
    assert torch.equal(loaded.flat, home.flat("a"))
    with pytest.raises(RefusedError, match="holds no optimizer.safetensors"):
        home.ask(commands.Load(0, "a", "w/s1", optimizer=True))
    assert torch.equal(loaded.flat, home.flat("a")), "who was refused is as before"


def test_an_adapter_with_no_numbers_is_not_saved_but_its_snapshot_is_exact(tmp_path: Path) -> None:
    home = Service(folder=tmp_path)
    home.open("a")
    home.core.runs.get("a").live()[0].flat[3] = float("nan")
    with pytest.raises(RefusedError, match="holds NaN or infinity"):
        home.ask(commands.Save(0, "a", "c", state=True))
    assert not (tmp_path / "c").exists()
    home.ask(commands.Snapshot(0, "a", "one"))
    home.open("b", snapshot="one")
    assert torch.equal(home.flat("b").view(torch.int32), home.flat("a").view(torch.int32))


# -- damage ----------------------------------------------------------------------------------------------------------


def snapshot(tmp_path: Path) -> tuple[Service, Path]:
    home = Service(folder=tmp_path)
    home.open("a")
    work(home, "a")
    home.ask(commands.Snapshot(0, "a", "one"))
    return home, tmp_path / "one"


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_a_snapshot_that_was_cut_short_is_refused(keep: int, tmp_path: Path) -> None:
    home, file = snapshot(tmp_path)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(RefusedError, match="corrupt") as caught:
        home.open("b", snapshot="one")
        home.ask(train("b", *BATCH))
    assert caught.value.reply.code == "format"
    work(home, "a")


def test_a_snapshot_with_one_wrong_bit_is_refused(tmp_path: Path) -> None:
    home, file = snapshot(tmp_path)
    content = bytearray(file.read_bytes())
    content[-50] ^= 4
    file.write_bytes(content)
    home.open("b", snapshot="one")
    with pytest.raises(RefusedError, match="its tensors are not those that were written"):
        home.ask(train("b", *BATCH))


def test_a_snapshot_of_another_base_or_later_format_is_refused(tmp_path: Path) -> None:
    _, file = snapshot(tmp_path)
    other = Service(tiny("llama", seed=1), folder=tmp_path)
    other.open("b", snapshot="one")
    with pytest.raises(RefusedError, match="was made for"):
        other.ask(train("b", *BATCH))
    content = file.read_bytes().replace(b'\\"format\\": 1, \\"info', b'\\"format\\": 7, \\"info')
    file.write_bytes(content)
    with pytest.raises(RefusedError, match="format 7"):
        other.open("c", snapshot="one")
    with pytest.raises(RefusedError, match="There is no file"):
        other.open("c", snapshot="two")


def test_an_optimiser_that_cannot_be_is_refused(tmp_path: Path) -> None:
    home = Service(folder=tmp_path)
    for run, rank in (("a", 2), ("b", 3)):
        home.open(run, spec=commands.RunSpec("lora", {"rank": rank}))
        work(home, run)
        home.ask(commands.Save(0, run, run, state=True))
    (tmp_path / "a" / OPTIMIZER).write_bytes((tmp_path / "b" / OPTIMIZER).read_bytes())
    with pytest.raises(RefusedError, match="belongs to another adapter"):
        home.ask(commands.Load(0, "a", "a", optimizer=True))
    assert set(load_file(tmp_path / "b" / OPTIMIZER)) == {"exp_avg", "exp_avg_sq"}


def test_a_full_disk_is_the_servers_fault_and_leaves_what_was_there(tmp_path: Path, monkeypatch: Any) -> None:
    home, file = snapshot(tmp_path)
    before = file.read_bytes()
    work(home, "a")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RefusedError, match="No space left on device") as caught:
        home.ask(commands.Snapshot(0, "a", "one"))
    assert (caught.value.reply.category, caught.value.reply.code) == ("server", "storage")
    monkeypatch.undo()
    assert file.read_bytes() == before and [f.name for f in tmp_path.iterdir() if "partial" in f.name] == []
    home.ask(commands.Snapshot(0, "a", "one"))


def test_the_least_recently_used_goes_first_and_what_is_kept_stays() -> None:
    recent = Recent(3)
    for name in "abcab":
        recent.use(name)
    assert recent.surplus(1) == ["c"]
    assert recent.surplus(1, keep={"c"}) == ["a"]
    assert recent.surplus(2) == ["c", "a"]
    recent.drop("c")
    assert recent.surplus(1) == [] and len(recent) == 2
