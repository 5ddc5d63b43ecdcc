"""What an adapter knows of where it comes from: records, hashes, and what saving, exporting and merging write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorica.adapters.export import export_lora
from lorica.adapters.lineage import (
    KEY,
    RELATIONS,
    Base,
    Data,
    Lineage,
    Parent,
    lineage_at,
    parent_at,
    sha256_of,
)
from lorica.adapters.parents import folded_in, lineage_of, lineage_of_weights, note_training, parent_of
from lorica.adapters.save_merged import save_merged
from lorica.core.errors import FormatError, MethodError, MissingError
from lorica.engine.host import Host
from lorica.methods import make_method
from lorica.models import load
from tests.contract.cases import perturb
from tests.tiny import tiny

words = st.text(max_size=8)
parents = st.builds(Parent, st.sampled_from(RELATIONS), words, words, words, st.none() | st.floats(-2, 2), words)
settings = st.dictionaries(words, st.none() | st.integers() | words | st.lists(st.integers(), max_size=2), max_size=2)
lineages = st.builds(
    Lineage,
    st.lists(parents, max_size=3).map(tuple),
    st.none() | st.builds(Base, words, words),
    st.none() | settings,
    st.none() | st.builds(Data, words, words, st.none() | st.integers(0, 9)),
    st.none() | words,
    settings,
)


def host(family: str = "llama") -> Host:
    return Host(tiny(family, dtype=torch.float32))


def trained(home: Host, name: str, method: str = "lora", seed: int = 0, **fields: Any) -> Any:
    adapter = home.add(name, make_method(method, **fields), ["q_proj", "v_proj"], seed=seed)
    perturb(adapter, 0.1, seed)
    return adapter


@given(lineages)
def test_a_lineage_comes_back_from_json_as_it_was(lineage: Lineage) -> None:
    meta = json.loads(json.dumps({KEY: lineage.to_meta()}))
    assert Lineage.from_meta(meta) == lineage


def test_folders_from_before_there_were_lineages_say_what_they_know() -> None:
    old = {"recipe": "sft", "data": {"path": "rows.jsonl", "fingerprint": "ab12"}, "exported_from": "dora"}
    assert Lineage.from_meta(old) == Lineage(
        recipe={"name": "sft"}, data=Data("rows.jsonl", "ab12"), how="export lora", settings={"method": "dora"}
    )
    assert Lineage.from_meta({}) == Lineage()


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            {"parents": [{"relation": "cousin", "path": "", "sha256": "", "method": ""}]},
            "parents.0.relation is 'cousin'",
        ),
        ({"data": {"path": 3}}, "lineage.data"),
        ("words", "lineage is 'words'"),
    ],
)
def test_a_broken_lineage_is_refused_with_its_place(record: Any, said: str) -> None:
    with pytest.raises(FormatError, match="The folder has a broken lineage") as caught:
        Lineage.from_meta({KEY: record}, "The folder")
    assert said in str(caught.value)


def test_the_hash_tells_values_and_settings_and_nothing_that_is_only_told(tmp_path: Path) -> None:
    home = host()
    adapter = trained(home, "a", rank=2)
    home.save(tmp_path / "a", "a")
    before = sha256_of(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert sha256_of(tmp_path / "copy") == before
    note_training(adapter, home.backbone, {"name": "mine"}, Data("rows.jsonl", "ab"))
    home.save(tmp_path / "told", "a")
    assert sha256_of(tmp_path / "told") == before
    adapter.forwards += 1
    home.save(tmp_path / "counted", "a")
    assert sha256_of(tmp_path / "counted") != before
    adapter.forwards -= 1
    adapter.flat[0] += 1e-3
    home.save(tmp_path / "moved", "a")
    assert sha256_of(tmp_path / "moved") != before
    with pytest.raises(MissingError):
        sha256_of(tmp_path)


def test_a_new_adapter_knows_its_base_and_says_so_in_its_folder(tmp_path: Path) -> None:
    home = host()
    adapter = trained(home, "a")
    note_training(adapter, home.backbone, {"name": "mine", "steps": 3}, Data("rows.jsonl", "ab", 7))
    home.save(tmp_path / "a", "a")
    again = host().load(tmp_path / "a", "again")
    expected = Lineage(
        base=Base("tiny-llama", home.backbone.fingerprint()),
        recipe={"name": "mine", "steps": 3},
        data=Data("rows.jsonl", "ab", 7),
    )
    assert lineage_of(again) == lineage_at(tmp_path / "a") == expected


def test_a_loaded_parent_is_named_by_its_folder_only_while_that_holds_the_same(tmp_path: Path) -> None:
    home = host()
    adapter = trained(home, "a", "dora", rank=2)
    assert parent_of(adapter, home.backbone, "merged-from").path == ""
    home.save(tmp_path / "a", "a")
    found = parent_of(adapter, home.backbone, "merged-from", 0.5)
    assert found == parent_at(tmp_path / "a", "merged-from", 0.5)
    assert found == Parent(
        "merged-from", str(tmp_path / "a"), sha256_of(tmp_path / "a"), "dora", 0.5, home.backbone.fingerprint()
    )
    adapter.flat[0] += 1e-3
    assert parent_of(adapter, home.backbone, "merged-from").path == ""
    adapter.flat[0] -= 1e-3


def test_an_export_says_what_it_was_and_what_it_stands_on(tmp_path: Path) -> None:
    home = host()
    trained(home, "below", rank=2)
    home.save(tmp_path / "below", "below")
    adapter = home.add("a", make_method("dora", rank=2), ["q_proj"], on=["below"])
    perturb(adapter)
    note_training(adapter, home.backbone, {"name": "mine"})
    unsaved, _ = export_lora(adapter, home.backbone, rank=3)
    assert lineage_of(unsaved).recipe == {"name": "mine"}  # nobody could look it up elsewhere
    home.save(tmp_path / "a", "a")
    exported, _ = export_lora(adapter, home.backbone, rank=3)
    known = lineage_of(exported)
    assert [(p.relation, p.path) for p in known.parents] == [
        ("derived-from", str(tmp_path / "a")),
        ("stacked-on", str(tmp_path / "below")),
    ]
    assert (known.how, known.settings, known.recipe) == ("export lora", {"method": "dora", "rank": 3}, None)


def test_a_merge_is_told_by_the_weights_and_forgotten_when_it_is_undone(tmp_path: Path) -> None:
    home = host()
    trained(home, "a")
    home.save(tmp_path / "a", "a")
    trained(home, "b", seed=1)
    before = home.backbone.fingerprint()
    home.merge("a", "b")
    told = lineage_of_weights(home.backbone)
    assert [p.path for p in told.parents] == [str(tmp_path / "a"), ""]
    assert told.base == Base("tiny-llama", before)
    home.unmerge()
    assert home.backbone.lineage is None


def test_what_is_trained_on_a_merged_model_names_all_that_was_ever_folded_in(tmp_path: Path) -> None:
    home = Host(load("nano", dtype="float32"))
    for number, name in enumerate(("a", "b")):
        trained(home, name, seed=number)
        home.save(tmp_path / name, name)
        home.merge(name)
        path = save_merged(home.backbone, tmp_path / f"merged-{name}")
        home = Host(load(str(path), dtype="float32"))
    assert [p.path for p in folded_in(home.backbone)] == [str(tmp_path / "a"), str(tmp_path / "b")]
    child = lineage_of(trained(home, "c"))
    assert child.base is not None
    assert child.base.name == str(tmp_path / "merged-b")
    assert [(p.relation, p.path, p.sha256) for p in child.parents] == [
        ("trained-from", str(tmp_path / name), sha256_of(tmp_path / name)) for name in ("a", "b")
    ]


def test_a_model_directory_with_a_broken_lineage_is_refused(tmp_path: Path) -> None:
    home = Host(load("nano", dtype="float32"))
    trained(home, "a")
    home.merge("a")
    path = save_merged(home.backbone, tmp_path / "merged")
    (path / "lorica_lineage.json").write_text("[]")
    with pytest.raises(FormatError, match="lorica_lineage.json"):
        load(str(path))
    (path / "lorica_lineage.json").write_text('{"parents": 3}')
    with pytest.raises(FormatError, match="broken lineage"):
        trained(Host(load(str(path))), "b")


def test_one_trained_on_top_of_others_goes_on_above_them_alone(tmp_path: Path) -> None:
    home = host()
    for number, name in enumerate(("a", "b")):
        trained(home, name, seed=number)
        home.save(tmp_path / name, name)
    top = home.add("top", make_method("lora"), ["q_proj"], on=["a", "b"])
    assert [p.relation for p in lineage_of(top).parents] == ["stacked-on"] * 2
    home.save(tmp_path / "top", "top")
    other = host()
    other.load(tmp_path / "a", "a")
    other.load(tmp_path / "b", "b")
    for on in ((), ("a",), ("b", "a")):
        with pytest.raises(MethodError, match="was trained on top of") as caught:
            other.continue_from(tmp_path / "top", "top", on=on)
        assert str(tmp_path / "a") in str(caught.value)
        assert "top" not in other.adapters
    known = lineage_of(other.continue_from(tmp_path / "top", "top", on=("a", "b")))
    assert [p.relation for p in known.parents] == ["continued-from", "stacked-on", "stacked-on"]
