"""What holds for every rule of merging: found in the registry, so that a new one is checked as well."""

from __future__ import annotations

import pytest

from lorica.adapters.merging import all_mergings, make_merging
from lorica.adapters.merging.change import Change
from lorica.core.errors import ConfigError, MergeError
from tests.adapters.test_merging_rules import SITE, change, dense, merge, neutral
from tests.methods.one import same

ALL = sorted(all_mergings())


@pytest.mark.parametrize("name", ALL)
def test_a_rule_says_what_it_is_and_describes_its_parameters(name: str) -> None:
    cls = all_mergings()[name]
    assert cls.summary and cls.__doc__
    assert all(info.description for info in cls.model_fields.values())
    assert cls.paper is None or cls.paper.arxiv in cls.__doc__


@pytest.mark.parametrize("name", ALL)
def test_a_rule_that_is_not_ordered_does_not_depend_on_the_order_of_parents(name: str) -> None:
    rule = all_mergings()[name]()
    changes = [change(seed=s, bias=True) for s in (1, 2, 3)]
    weights = [1.0, 1.0, 1.0] if not rule.weighted else [0.5, 1.0, 2.0]
    one, other = rule.merge(SITE, changes, weights), rule.merge(SITE, changes[::-1], weights[::-1])
    if rule.ordered:
        assert float((one.matrix() - other.matrix()).abs().max()) > 1e-3
        return
    same(one.matrix(), other.matrix(), 1e-9)
    assert one.bias_O is not None and other.bias_O is not None
    same(one.bias_O, other.bias_O)


@pytest.mark.parametrize("name", ALL)
def test_a_parent_that_does_not_act_changes_nothing_for_a_sum_and_is_never_an_error(name: str) -> None:
    rule, nothing = all_mergings()[name](**neutral(name)), Change.nothing((7, 5))
    own = change(seed=1)
    found = rule.merge(SITE, [own, nothing], [1.0, 1.0])
    same(found.matrix(), own.matrix(), 1e-10)
    empty = rule.merge(SITE, [nothing, nothing], [1.0, 1.0])
    assert not empty.matrix().any()


@pytest.mark.parametrize("name", ["linear", "soup", "robustmerge", "ties", "dare", "magnitude_prune"])
def test_factors_of_other_ranks_are_refused_where_they_are_added_entry_by_entry(name: str) -> None:
    on = {"on": "factors"} if "on" in all_mergings()[name].model_fields else {}
    with pytest.raises(MergeError, match="ranks differ: 2 of a parent, 3 of a parent") as error:
        merge(name, [change(2), change(3)], **on)
    assert "`cat`" in str(error.value.hint)


@pytest.mark.parametrize("name", ["linear", "soup", "robustmerge", "cat"])
def test_a_dense_change_is_refused_where_factors_are_needed(name: str) -> None:
    with pytest.raises(MergeError, match="changes site 'fc' densely") as error:
        merge(name, [change(2), dense()])
    assert "`task_arithmetic`" in str(error.value.hint)


def test_svd_of_a_dense_change_needs_a_rank() -> None:
    with pytest.raises(ConfigError, match="'svd' needs a rank"):
        merge("svd", [dense()])
    assert merge("svd", [dense()], rank=2).rank == 2


def test_a_rule_or_parameter_that_does_not_exist_is_refused_with_the_nearest() -> None:
    with pytest.raises(MergeError, match="Did you mean 'ties'"):
        make_merging("tise")
    with pytest.raises(ConfigError, match="Did you mean 'density'"):
        make_merging("ties", densty=0.3)
    with pytest.raises(ConfigError, match="density"):
        make_merging("ties", density=0.0)
