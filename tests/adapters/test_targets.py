"""Targets: every way to name sites, what wins, and near misses for what matches nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.adapters.targets import KEYWORDS, Targets, select
from lorica.core.errors import ConfigError, LoricaError, MethodError, TargetError
from lorica.core.site import Site
from lorica.methods import all_methods, get_method, make_method
from lorica.models.builtin import FAMILIES
from tests.tiny import tiny

LORA = make_method("lora", rank=4)
SITES = tiny("llama", num_hidden_layers=12, hidden_size=16, intermediate_size=16, head_dim=4).sites
NAMES = list(SITES)


def chosen(targets: Any, method: Any = LORA, sites: dict[str, Site] = SITES) -> list[str]:
    return list(select(sites, method, Targets.of(targets)))


def test_a_suffix_begins_at_a_dot() -> None:
    assert all(name.endswith(".q_proj") for name in chosen("q_proj"))
    assert len(chosen("q_proj")) == 12
    with pytest.raises(TargetError, match="'proj' matches no site"):
        chosen("proj")
    assert chosen("0.self_attn.q_proj") == ["model.layers.0.self_attn.q_proj"]
    assert chosen("model.layers.1.mlp.up_proj") == ["model.layers.1.mlp.up_proj"]


@given(st.sampled_from([n for n in NAMES if SITES[n].kind == "linear"]), st.data())
def test_any_dotted_suffix_selects_the_site_and_nothing_with_another_ending(name: str, data: st.DataObject) -> None:
    parts = name.split(".")
    suffix = ".".join(parts[data.draw(st.integers(0, len(parts) - 1)) :])
    found = chosen(suffix)
    assert name in found
    assert all(n == suffix or n.endswith("." + suffix) for n in found)


@given(
    st.lists(
        st.sampled_from(["q_proj", "mlp.up_proj", "all-linear", "re:.*v_proj", "lm_head"]), min_size=1, unique=True
    )
)
def test_sites_come_once_and_in_backbone_order_whatever_the_order_of_entries(entries: list[str]) -> None:
    found = chosen(entries)
    assert found == [name for name in NAMES if name in set(found)]
    assert found == chosen(entries[::-1])
    assert set(found) == {name for entry in entries for name in chosen(entry)}


@given(st.sets(st.integers(0, 11), min_size=1))
def test_layers_keep_exactly_the_blocks_that_are_named(layers: set[int]) -> None:
    listed = ",".join(map(str, sorted(layers)))
    assert {SITES[n].layer for n in chosen({"include": "q_proj", "layers": listed})} == layers


@given(st.integers(0, 11), st.integers(0, 11))
def test_a_range_of_layers_holds_both_ends(a: int, b: int) -> None:
    first, last = min(a, b), max(a, b)
    found = {SITES[n].layer for n in chosen({"include": "q_proj", "layers": f"{first}-{last}"})}
    assert found == set(range(first, last + 1))


@pytest.mark.parametrize("number", [0, 3, 11])
def test_a_single_layer_may_be_a_number_as_yaml_reads_it(number: int) -> None:
    assert {SITES[n].layer for n in chosen({"include": "q_proj", "layers": number})} == {number}
    assert Targets(layers=number) == Targets(layers=str(number))


def test_layers_are_no_truth_value_and_no_fraction() -> None:
    for wrong in (True, 1.5):
        with pytest.raises(ConfigError, match="layers"):
            Targets(layers=wrong)


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3,,4", "1;2", "12", "0-12", "5-2"])
def test_layers_that_are_malformed_or_absent_are_refused(text: str) -> None:
    with pytest.raises(TargetError, match="Layers"):
        chosen({"include": "q_proj", "layers": text})


@given(st.sampled_from(["q_proj", "self_attn.v_proj", "re:.*mlp.*", "all-linear"]))
def test_an_exclusion_takes_out_exactly_what_it_names(entry: str) -> None:
    everything, out = set(chosen(["all-linear", "lm_head"])), set(chosen(entry))
    assert set(chosen({"include": ["all-linear", "lm_head"], "exclude": entry})) == everything - out


def test_a_regular_expression_matches_the_whole_name() -> None:
    assert chosen(r"re:model\.layers\.(0|11)\.mlp\.down_proj") == [f"model.layers.{i}.mlp.down_proj" for i in (0, 11)]
    with pytest.raises(TargetError, match="matches no site"):
        chosen("re:down_proj")
    with pytest.raises(TargetError, match="is not a regular expression"):
        chosen("re:(")


@given(st.from_regex(r"[qkvo]_proj|(gate|up|down)_proj", fullmatch=True))
def test_a_regular_expression_selects_what_python_says(role: str) -> None:
    pattern = rf".*\.{role}"
    assert chosen(f"re:{pattern}") == [n for n in NAMES if re.fullmatch(pattern, n)]


def test_all_linear_leaves_the_head_out_and_naming_it_takes_it_in() -> None:
    assert "lm_head" not in chosen("all-linear")
    assert len(chosen("all-linear")) == 12 * 7
    assert chosen("lm_head") == ["lm_head"]


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("keyword", list(KEYWORDS))
def test_a_keyword_selects_its_kind_or_says_that_there_is_none(family: str, keyword: str) -> None:
    sites = tiny(family).sites
    for name in all_methods():
        method = get_method(name)()
        expected = [s.name for s in sites.values() if KEYWORDS[keyword](s) and s.kind in method.kinds]
        if expected:
            assert chosen(keyword, method, sites) == expected
        else:
            with pytest.raises(TargetError, match=f"no '{keyword}' sites"):
                chosen(keyword, method, sites)


def outcome(sites: dict[str, Site], method: Any) -> dict[str, tuple[Site, Any]] | TargetError:
    """What the defaults select, or the error that says why they select nothing."""
    try:
        return select(sites, method, Targets())
    except TargetError as error:
        return error


@pytest.mark.parametrize("name", list(all_methods()))
def test_defaults_select_something_that_fits_or_say_why_not(name: str) -> None:
    method, served = get_method(name)(), 0
    for family in FAMILIES:
        found = outcome(tiny(family).sites, method)
        if isinstance(found, TargetError):
            assert "backbone has" in str(found)
        else:
            served += 1
            assert found and all(site.kind in method.kinds and not site.head for site, _ in found.values())
    assert served >= 2


def test_defaults_that_name_places_say_which_ones_are_missing() -> None:
    with pytest.raises(
        TargetError, match=r"'ia3' looks for .*'down_proj'.* by default, and this backbone has none"
    ) as e:
        select({"fc": Site("fc", "linear", (4, 4))}, make_method("ia3"), Targets())
    assert e.value.hint


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("q_porj", "'q_porj' matches no site of this backbone. Did you mean 'q_proj'"),
        ("all-linaer", "Did you mean 'all-linear'"),
        ("model.layers.0.self_attn.k_prj", "Did you mean 'model.layers.0.self_attn.k_proj'"),
        ("all-conv", "no 'all-conv' sites that 'lora' can adapt"),
        ("input_layernorm", "'lora' cannot adapt 'model.layers.0.input_layernorm': it is of kind 'norm'"),
    ],
)
def test_what_matches_nothing_names_near_misses(entry: str, words: str) -> None:
    with pytest.raises(TargetError, match=words):
        chosen(entry)


def test_everything_excluded_is_an_error() -> None:
    with pytest.raises(TargetError, match="select nothing"):
        chosen({"include": "q_proj", "exclude": "all-linear"})
    with pytest.raises(TargetError, match="matches no site"):
        chosen({"include": "q_proj", "exclude": "qproj"})


def test_patterns_set_rank_and_alpha_and_the_first_match_wins() -> None:
    targets = {
        "include": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 3},
        "alpha_pattern": {r"layers\.\d.*v_proj": 1.0},
    }
    picked = select(SITES, LORA, Targets.of(targets))
    ranks = {name: method.rank for name, (_, method) in picked.items()}  # type: ignore[attr-defined]
    assert ranks["model.layers.0.self_attn.q_proj"] == 2
    assert ranks["model.layers.7.self_attn.q_proj"] == 3
    assert ranks["model.layers.7.self_attn.v_proj"] == 4
    alphas = {name: method.alpha for name, (_, method) in picked.items()}  # type: ignore[attr-defined]
    assert alphas["model.layers.7.self_attn.v_proj"] == 1.0
    assert alphas["model.layers.7.self_attn.q_proj"] == 16.0


def test_a_pattern_is_anchored_at_a_dot_and_at_the_end() -> None:
    picked = select(SITES, LORA, Targets.of({"include": "q_proj", "rank_pattern": {r"layers\.1\..*": 1}}))
    low = [name for name, (_, method) in picked.items() if method.rank == 1]  # type: ignore[attr-defined]
    assert low == ["model.layers.1.self_attn.q_proj"], "layers 10 and 11 are others"


@pytest.mark.parametrize(
    ("fields", "method", "error", "words"),
    [
        ({"rank_pattern": {"k_proj": 2}}, LORA, TargetError, "'k_proj' matches no adapted site"),
        ({"alpha_pattern": {"(": 2.0}}, LORA, TargetError, "not a regular expression"),
        ({"rank_pattern": {"q_proj": 2}}, make_method("ia3"), MethodError, "'ia3' has no 'rank'"),
        ({"rank_pattern": {"q_proj": 0}}, LORA, ConfigError, "rank"),
    ],
)
def test_a_pattern_that_cannot_apply_is_refused(fields: Any, method: Any, error: type[LoricaError], words: str) -> None:
    with pytest.raises(error, match=words):
        select(SITES, method, Targets.of({"include": "q_proj", **fields}))


@pytest.mark.parametrize(
    "given_", ["q_proj", ["q_proj"], {"include": "q_proj"}, {"include": ["q_proj"]}, Targets(include=("q_proj",))]
)
def test_every_way_to_write_targets_is_one_specification(given_: Any) -> None:
    assert Targets.of(given_) == Targets(include=("q_proj",))


def test_nothing_given_is_the_methods_default() -> None:
    assert chosen(None) == chosen("all-linear")
    assert Targets.of(None) == Targets()


def test_an_unknown_field_names_its_neighbour() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'exclude'"):
        Targets.of({"exclud": "q_proj"})
