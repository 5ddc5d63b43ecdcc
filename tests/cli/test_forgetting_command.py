"""`lorica forgetting`: the base and every adapter in one table, with how many directions each moved."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorica.client.local import Service
from lorica.methods import make_method
from lorica.models import load


@pytest.fixture
def folders(tmp_path):
    """A low rank and all weights of one kind of site, a little off the base, saved."""
    service = Service(load("nano", dtype="float32"))
    paths = []
    for name in ("lora", "delta"):
        client = service.training_client(
            make_method(name, **({"rank": 2} if name == "lora" else {})), "v_proj", name=name
        )
        client.adapter.flat.add_(0.01)
        paths.append(client.save(tmp_path / name))
    for name, lines in (("target", "Say a.\nSay b.\n"), ("source", "One two three.\n")):
        rows = "".join(f'{{"text": "{line}"}}\n' for line in lines.splitlines())
        Path(f"{name}.jsonl").write_text(rows)
    return paths


def test_losses_and_components_of_every_adapter_stand_beside_the_bases(run, ask, folders):
    words = ("forgetting", *folders, "--target", "target.jsonl", "--source", "source.jsonl", "--dtype", "float32")
    found = ask(*words)
    assert [row["method"] for row in found] == ["lora", "delta"]
    assert all(row["gained"] == row["target_before"] - row["target_after"] for row in found)
    assert {site["role"] for site in found[0]["components"]} == {"v_proj"}
    said = run(*words).stdout
    assert "(the base)" in said and "components for 90% of the change" in said and "1.0 of 128" in said


def test_rows_that_are_cut_are_told(run, folders):
    words = ("--target", "target.jsonl", "--source", "source.jsonl", "--max-length", "3")
    said = run("forgetting", folders[0], *words)
    assert said.exit_code == 0 and "target.jsonl: 2 of 2 rows longer than 3 tokens" in said.stderr


def test_a_missing_file_is_one_sentence(refuse, folders):
    assert "absent.jsonl" in str(
        refuse("forgetting", folders[0], "--target", "absent.jsonl", "--source", "source.jsonl")
    )
