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
    assert all(row["gained"] == row["targets"][0]["before"] - row["targets"][0]["after"] for row in found)
    assert {site["role"] for site in found[0]["components"]} == {"v_proj"}
    said = run(*words).stdout
    assert "the base" in said and "components for 90% of the change" in said and "1.0 of 128" in said


def test_several_files_make_a_matrix_of_data_and_adapters(run, ask, folders):
    Path("other.jsonl").write_text('{"text": "Red and blue."}\n')
    words = ["forgetting", *folders, "--target", "target.jsonl", "--target", "other.jsonl"]
    words += ["--source", "source.jsonl", "--dtype", "float32"]
    found = ask(*words)
    assert [[loss["data"] for loss in row["targets"]] for row in found] == [["target.jsonl", "other.jsonl"]] * 2
    assert found[0]["gained"] == pytest.approx(-sum(loss["change"] for loss in found[0]["targets"]) / 2)
    said = run(*words).stdout
    for loss in found[1]["targets"]:
        line = next(line for line in said.splitlines() if f"target {loss['data']}" in line)
        assert f"{loss['before']:.4f}" in line and line.endswith(f"{loss['after']:.4f} ({loss['change']:+.4f})")


def test_rows_that_are_cut_are_told(run, folders):
    words = ("--target", "target.jsonl", "--source", "source.jsonl", "--max-length", "3")
    said = run("forgetting", folders[0], *words)
    assert said.exit_code == 0 and "target.jsonl: 2 of 2 rows longer than 3 tokens" in said.stderr


def test_a_missing_file_is_one_sentence(refuse, folders):
    assert "absent.jsonl" in str(
        refuse("forgetting", folders[0], "--target", "absent.jsonl", "--source", "source.jsonl")
    )
