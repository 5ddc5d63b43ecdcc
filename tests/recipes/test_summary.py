"""What a summary says of an adapter before it is trained."""

from __future__ import annotations

import pytest

from lorica.engine.host import Host
from lorica.methods import make_method
from lorica.models import tiny
from lorica.recipes.summary import what_is_trained


@pytest.mark.parametrize(("rank", "told"), [(32, 0), (33, 1), (64, 1)])
def test_a_rank_that_costs_more_than_the_weight_is_told(rank: int, told: int) -> None:
    host = Host(tiny("llama"))  # q_proj is 64 x 64, so rank 32 is as large as the weight
    trained = what_is_trained(host.add("a", make_method("lora", rank=rank), ["q_proj"]), host.backbone)
    assert len(trained.oversized) == told
    assert all(f"{128 * rank:,} values for a weight of 4,096" in sentence for sentence in trained.oversized)
