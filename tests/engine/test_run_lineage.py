"""What a server's runs and checkpoints say of where they come from: the client's names, no path of the server."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorica.adapters.lineage import Parent, lineage_at, sha256_of
from lorica.engine import commands
from lorica.engine.host import Host
from lorica.methods import make_method
from tests.engine.service import ADAM, SPEC, RefusedError, Service, datum, train
from tests.tiny import tiny

NAME = "tinker://s:train:0/weights/c1"


def stepped(home: Service, run: str) -> None:
    home.ask(train(run, datum(1)))
    home.ask(commands.Step(0, run, ADAM))


def test_a_run_from_a_checkpoint_is_continued_from_it_under_the_clients_name(tmp_path: Path) -> None:
    home = Service(folder=tmp_path)
    home.open("a", spec=SPEC)
    stepped(home, "a")
    home.ask(commands.Save(0, "a", "runs/secret/c1", state=True))
    assert lineage_at(tmp_path / "runs/secret/c1").parents == ()
    home.open("b", spec=commands.RunSpec("lora", parent="runs/secret/c1", parent_name=NAME))
    stepped(home, "b")
    home.ask(commands.Snapshot(0, "b", "kept"))
    home.ask(commands.Close(0, "b"))
    home.ask(commands.Open(0, "b", SPEC, snapshot="kept"))  # it survives what a crash leaves
    home.ask(commands.Save(0, "b", "c2", state=False))
    known = lineage_at(tmp_path / "c2")
    print = home.core.host.backbone.fingerprint()
    assert known.parents == (
        Parent("continued-from", NAME, sha256_of(tmp_path / "runs/secret/c1"), "lora", None, print),
    )
    assert known.base is not None and known.base.fingerprint == print
    assert str(tmp_path) not in (tmp_path / "c2/lorica.json").read_text()


def test_a_run_that_loads_a_checkpoint_continues_that(tmp_path: Path) -> None:
    home = Service(folder=tmp_path)
    home.open("a", spec=SPEC)
    home.ask(commands.Save(0, "a", "c1", state=True))
    stepped(home, "a")
    home.ask(commands.Load(0, "a", "c1", optimizer=True, name=NAME))
    home.ask(commands.Save(0, "a", "c2", state=False))
    (parent,) = lineage_at(tmp_path / "c2").parents
    assert (parent.relation, parent.path, parent.sha256) == ("continued-from", NAME, sha256_of(tmp_path / "c1"))


def test_what_was_trained_on_top_of_another_is_not_continued_without_it(tmp_path: Path) -> None:
    host = Host(tiny("llama"))
    host.add("below", make_method("lora"), seed=1)
    host.save(tmp_path / "below", "below")
    host.add("above", make_method("lora"), on="below")
    host.save(tmp_path / "above", "above")
    home = Service(folder=tmp_path)
    with pytest.raises(RefusedError, match="was trained on top of"):
        home.open("a", spec=commands.RunSpec("lora", parent="above"))
