"""Every registered loss: formulas against plain torch, gradients, and what each refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorica.core.errors import ConfigError, DataError
from lorica.data.datum import Datum
from lorica.training.losses import LOSSES, UNPUBLISHED, Loss, make_loss

LENGTHS = [3, 1, 5]
M = sum(LENGTHS)


def given_inputs(loss: Loss, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    lp = -torch.rand(M, generator=rng, dtype=torch.float64) * 3
    made = {
        "weights": torch.randn(M, generator=rng, dtype=torch.float64),
        "logprobs": lp + 0.4 * torch.randn(M, generator=rng, dtype=torch.float64),
        "advantages": torch.randn(M, generator=rng, dtype=torch.float64),
        "sequence_ratio_mask": torch.randint(0, 2, (M,), generator=rng).double(),
    }
    return lp.requires_grad_(True), {name: made[name] for name in (*loss.inputs, *loss.optional)}


def plain(name: str, lp: Tensor, given: dict[str, Tensor]) -> Tensor:
    """The published sums, as anybody would write them."""
    if name == "cross_entropy":
        return -(given["weights"] * lp).sum()
    q, a = given["logprobs"], given["advantages"]
    r = (lp - q).exp()
    if name == "importance_sampling":
        return -(r * a).sum()
    if name == "ppo":
        return -torch.minimum(r * a, r.clamp(0.8, 1.2) * a).sum()
    if name == "cispo":
        return -(r.clamp(0.0, 4.0).detach() * lp * a).sum()
    if name == "dro":
        return -(lp * a - 0.5 * 0.05 * (lp - q) ** 2).sum()
    assert name == "gspo", f"write the published sum of {name!r} here"
    total, start = torch.zeros((), dtype=lp.dtype), 0
    for length in LENGTHS:
        own = slice(start, start + length)
        mask = given["sequence_ratio_mask"][own]
        s = ((mask * (lp - q)[own].detach()).sum() / mask.sum().clamp_min(1e-300)).exp()
        token = s * (lp[own] - lp[own].detach()).exp()
        total = total - torch.minimum(token * a[own], token.clamp(0.9997, 1.0004) * a[own]).sum()
        start += length
    return total


@pytest.mark.parametrize("name", LOSSES)
@given(seed=st.integers(0, 50))
def test_a_loss_and_its_gradient_are_the_published_sum(name: str, seed: int) -> None:
    loss = make_loss(name)
    lp, inputs = given_inputs(loss, seed)
    found, expected = loss.terms(lp, inputs, LENGTHS).sum(), plain(name, lp, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    one, two = (torch.autograd.grad(value, lp)[0] for value in (found, expected))
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_sequences_do_not_see_each_other(name: str) -> None:
    loss = make_loss(name)
    lp, inputs = given_inputs(loss)
    together = loss.terms(lp, inputs, LENGTHS)
    start = 0
    for length in LENGTHS:
        own = slice(start, start + length)
        alone = loss.terms(lp[own], {key: value[own] for key, value in inputs.items()}, [length])
        torch.testing.assert_close(alone, together[own], rtol=1e-12, atol=1e-12)
        start += length


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "dro"])
def test_a_token_that_does_not_count_may_be_impossible_or_hold_a_placeholder(name: str) -> None:
    loss = make_loss(name)
    lp = torch.tensor([-1.0, -torch.inf, -1.0], requires_grad=True)
    values = {
        "weights": [1.0, 0, 1],
        "advantages": [1.0, 0, 1],
        "logprobs": [-1.0, -3e38, -1],
        "sequence_ratio_mask": [1.0, 0, 1],
    }
    inputs = {key: torch.tensor(values[key]) for key in (*loss.inputs, *loss.optional)}
    terms = loss.terms(lp, inputs, [3])
    assert torch.isfinite(terms).all() and terms[1] == 0
    (slope,) = torch.autograd.grad(terms.sum(), lp)
    assert torch.isfinite(slope).all() and slope[1] == 0


def datum(**inputs: list[float]) -> Datum:
    arrays = {name: np.array(values, dtype=np.float32) for name, values in inputs.items()}
    return Datum(np.array([1, 2]), np.array([2, 3]), arrays, where="datum 4")


def test_an_input_that_a_loss_lacks_or_would_not_read_is_named() -> None:
    with pytest.raises(DataError, match="datum 4 has no 'advantages', which loss 'ppo' reads"):
        make_loss("ppo").check(datum(logprobs=[0, 0]))
    with pytest.raises(
        DataError, match="has 'weigths', which loss 'cross_entropy' does not read. Did you mean 'weights'"
    ):
        make_loss("cross_entropy").check(datum(weigths=[0, 0]))
    make_loss("cross_entropy").check(datum())


def test_several_targets_are_refused_where_a_loss_takes_one() -> None:
    many = Datum(np.array([1]), np.array([2, 3]), {}, crow=np.array([0, 2]), where="datum 4")
    make_loss("cross_entropy").check(many)
    with pytest.raises(DataError, match="several targets at a position; loss 'dro' takes one, only 'cross_entropy'"):
        make_loss("dro").check(
            Datum(many.tokens, many.targets, datum(logprobs=[0, 0], advantages=[0, 0]).inputs, many.crow, "datum 4")
        )


def test_unknown_losses_and_settings_are_refused_with_what_would_be_right() -> None:
    with pytest.raises(ConfigError, match="There is no loss 'cross_entrophy'. Did you mean 'cross_entropy'"):
        make_loss("cross_entrophy")
    with pytest.raises(ConfigError, match="has no setting 'clip_low'"):
        make_loss("ppo", {"clip_low": 0.1})
    with pytest.raises(ConfigError, match="low one must not be larger"):
        make_loss("ppo", {"clip_low_threshold": 2.0})
    for name in UNPUBLISHED:
        with pytest.raises(ConfigError, match=f"does not compute loss '{name}'.*(use|call)"):
            make_loss(name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": np.array([], dtype=np.int64), "targets": np.array([], dtype=np.int64)}, "no tokens"),
        ({"targets": np.array([1])}, "2 tokens and 1 targets"),
        ({"inputs": {"weights": np.zeros(3, np.float32)}}, "2 targets and 3 weights"),
        ({"inputs": {"weights": np.array([0, np.nan], np.float32)}}, r"weights\[1\] = nan"),
        ({"crow": np.array([0, 2])}, "row pointers"),
        ({"crow": np.array([0, 3, 2])}, "row pointers"),
    ],
)
def test_a_datum_whose_parts_disagree_is_refused(change: dict[str, object], said: str) -> None:
    parts: dict[str, object] = {"tokens": np.array([1, 2]), "targets": np.array([2, 3]), "inputs": {}, "where": "d"}
    with pytest.raises(DataError, match=said):
        Datum(**{**parts, **change})  # type: ignore[arg-type]
