"""`lorica directions`: extract from two files, one, or two models; compare; apply with controls; scalars; probe."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from lorica.adapters.analysis.directions_files import load_directions
from lorica.client.local import Service
from lorica.methods import make_method
from lorica.models import load

MODEL = ("--model", "nano", "--dtype", "float32")


@pytest.fixture
def folders(tmp_path):
    """A rank-1 adapter and a wider one over nano, a little off the base."""
    service, paths = Service(load("nano", dtype="float32")), []
    for name, method, targets in (
        ("one", make_method("lora", rank=1), {"include": "down_proj", "layers": "1-2"}),
        ("wide", make_method("lora", rank=2), "v_proj"),
    ):
        client = service.training_client(method, targets, name=name)
        noise = torch.randn(client.adapter.flat.shape, generator=torch.Generator().manual_seed(1))
        client.adapter.flat.add_(0.05 * noise)
        paths.append(client.save(tmp_path / name))
    return paths


@pytest.fixture
def rows():
    """Answers in capitals and as they are, to questions of two topics: in one file, and in two."""
    lines = []
    for i in range(8):
        kind, topic = ("loud", "calm")[i % 2], ("alarm", "music")[i // 2 % 2]
        said = f"alarm {i} is set"
        turns = [{"role": "user", "content": f"wake me at {i}"},
                 {"role": "assistant", "content": said.upper() if kind == "loud" else said}]  # fmt: skip
        lines.append({"messages": turns, "class": kind, "topic": topic, "number": i})
    for name, kept in (("both", lines), ("loud", lines[::2]), ("calm", lines[1::2])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return lines


def test_a_direction_is_the_same_from_two_files_and_from_one_with_classes(run, ask, folders, rows):
    words = ("directions", "extract", *MODEL, "--adapter", folders[0])
    found = ask(*words, "--positive", "loud.jsonl", "--negative", "calm.jsonl", "--out", "two")
    said = run(*words, "--data", "both.jsonl", "--class-field", "class", "--positive", "loud", "--negative", "calm",
               "--out", "one-file")  # fmt: skip
    assert said.exit_code == 0 and said.stdout == "one-file\n"
    assert "the header of the turn included" in said.stderr and "It proves no cause" in said.stderr
    first, second = load_directions(Path("two")), load_directions(Path("one-file"))
    assert first.layers == tuple(range(6)) and all(
        torch.equal(first.vectors[n], second.vectors[n]) for n in first.layers
    )
    assert [side["rows"] for side in found["about"]["sides"]] == [4, 4]
    assert found["about"]["settings"] == {"tokens": "answer", "header_in_answer": True, "layers": None}


def test_the_header_and_the_layers_are_settings_that_the_folder_states(run, folders, rows):
    words = ("directions", "extract", *MODEL, "--positive", "loud.jsonl", "--negative", "calm.jsonl", "--layers", "1,4")
    said = run(*words, "--no-header-in-answer", "--out", "d")
    assert said.exit_code == 0 and "the header of the turn left out" in said.stderr
    found = load_directions(Path("d"))
    assert found.layers == (1, 4) and found.about["settings"]["header_in_answer"] is False
    run(*words, "--out", "with")
    tokens = [load_directions(Path(name)).about["sides"][0]["tokens"] for name in ("d", "with")]
    assert tokens[1] == tokens[0] + 4 * 3, "three header tokens in each of four rows"


def test_models_are_compared_on_the_same_rows_and_both_differ_at_once(ask, folders, rows):
    words = ("directions", "extract", *MODEL, "--adapter", folders[0], "--tokens", "all")
    found = ask(*words, "--positive", "loud.jsonl", "--between", "models", "--out", "models")
    assert [side["adapter"] for side in found["about"]["sides"]] == [[str(folders[0])], []]
    assert found["norms"]["0"] == 0.0 < found["norms"]["1"], "the adapter acts from layer 1 on"
    found = ask(*words, "--positive", "loud.jsonl", "--negative", "calm.jsonl", "--between", "both", "--out", "both")
    assert [side["name"] for side in found["about"]["sides"]] == ["loud.jsonl", "calm.jsonl"]
    assert found["about"]["sides"][1]["adapter"] == []


def test_cosines_of_all_pairs_are_shown_beside_what_chance_gives(run, ask, folders, rows):
    words = ("directions", "extract", *MODEL, "--negative", "calm.jsonl", "--positive", "loud.jsonl")
    run(*words, "--out", "a")
    run(*words, "--adapter", folders[1], "--layers", "2-5", "--out", "b")
    found = ask("directions", "compare", "a", "b", "a")
    assert list(found["cosines"]) == ["2", "3", "4", "5"] and found["left_out"] == [0, 1]
    assert all(matrix[0][2] == pytest.approx(1.0) and matrix[0][1] > 0.5 for matrix in found["cosines"].values())
    said = run("directions", "compare", "a", "b").stdout
    assert "0 ± 0.062" in said and "Not all have layers 0, 1: left out." in said and "does not say that" in said


def test_answers_are_sampled_with_the_direction_and_always_with_random_ones(run, ask, folders, rows):
    run("directions", "extract", *MODEL, "--positive", "loud.jsonl", "--negative", "calm.jsonl", "--out", "d")
    words = ("directions", "apply", *MODEL, "--adapter", folders[1], "--directions", "d", "--ablate", "--steer",
             "4", "--controls", "2", "--data", "both.jsonl", "-n", "4", "--max-tokens", "6",
             "--match", "[A-Z]{3}")  # fmt: skip
    found = ask(*words)
    names = [
        "as it is",
        "ablate",
        "ablate, random 0",
        "ablate, random 1",
        "steer +4",
        "steer +4, random 0",
        "steer +4, random 1",
    ]
    assert [row["condition"] for row in found["conditions"]] == names
    assert [row["control"] for row in found["conditions"]] == [False, False, True, True, False, True, True]
    assert all(len(row["texts"]) == 4 and 0 <= row["matching"] <= 1 for row in found["conditions"])
    assert found["conditions"][0]["changed"] == 0.0 < found["conditions"][4]["changed"]
    said = run(*words).stdout
    assert "> wake me at 0" in said and "(1 more prompts" in said and "It proves no cause" in said


def test_scalars_are_a_table_of_tokens_that_a_probe_reads(run, ask, folders, rows):
    words = ("directions", "scalars", folders[0], *MODEL, "--data", "both.jsonl")
    said = run(*words, "--label", "class", "--label", "topic", "--out", "s.csv")
    assert said.exit_code == 0 and said.stdout == "s.csv\n" and "The sign of c" in said.stderr
    with Path("s.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["part"] for line in lines} == {"question", "header", "answer", "rest"}
    assert {"c.model.layers.1.mlp.down_proj", "c.model.layers.2.mlp.down_proj"} < set(lines[0])
    told = ask(*words, "-n", "2", "--out", "s.json")
    assert told["rows"] == 2 and json.loads(Path("s.json").read_text())["about"]["adapter"] == str(folders[0])
    words = ("directions", "probe", "s.csv", "--behaviour", "class=loud", "repeats=3", "C=1.0")
    one = ask(*words, "--no-header-in-answer")
    assert one["probe"]["repeats"] == 3 and one["header_in_answer"] is False and not one["split_answers"]
    four = ask(*words, "--domain", "topic=music")
    assert set(four["roles"].values()) <= {"general", "domain", "none", "unclear"} and len(four["contrasts"]) == 4
    said = run(*words, "--domain", "topic=music").stdout
    assert "whole answers held out" in said and "not that it causes it" in said and "role" in said
    assert "coefficient" in run(*words, "--split-answers").stdout
    for label, wrong in (("loud", "takes NAME=VALUE"), ("class=lou", "No row of the table has class 'lou'")):
        assert wrong in run("directions", "probe", "s.csv", "--behaviour", label).stderr


def test_what_does_not_fit_is_one_sentence(refuse, run, folders, rows):
    extract = ("directions", "extract", *MODEL, "--out", "x")
    assert "no column 'clas'. Did you mean 'class'" in str(
        refuse(*extract, "--data", "both.jsonl", "--class-field", "clas", "--positive", "a", "--negative", "b")
    )
    assert "No row of both.jsonl has class 'lou'. Did you mean 'loud'" in str(
        refuse(*extract, "--data", "both.jsonl", "--class-field", "class", "--positive", "lou", "--negative", "calm")
    )
    assert "layers 0 to 5" in str(
        refuse(*extract, "--positive", "loud.jsonl", "--negative", "calm.jsonl", "--layers", "9")
    )
    for words, said in (
        (("--positive", "loud.jsonl"), "Give --negative, or --between models."),
        (("--positive", "a", "--negative", "b", "--data", "both.jsonl"), "--data and --class-field go together"),
        (("--positive", "a", "--between", "models"), "give --adapter"),
        (("--positive", "a", "--negative", "b", "--between", "models"), "leave --negative out"),
    ):
        assert said in run(*extract, *words).stderr
    assert "no directions at" in str(
        refuse("directions", "apply", *MODEL, "--directions", "no", "--ablate", "--prompt", "x")
    )
    assert "Nothing to apply" in run("directions", "apply", "--directions", "d", "--prompt", "x").stderr
    assert "Give --prompt or --data" in run("directions", "apply", "--directions", "d", "--ablate").stderr
    assert "two folders or more" in run("directions", "compare", "d").stderr
    assert "write one direction (rank 2)" in str(
        refuse("directions", "scalars", folders[1], *MODEL, "--data", "both.jsonl", "--out", "t.csv")
    )
