"""Messages of the service to data: layouts, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lorica.core.errors import DataError
from lorica.engine import commands
from lorica.engine.arrays import array
from lorica.engine.engine import Engine, Item
from lorica.engine.host import Host
from lorica.engine.intake import checked, take_in
from lorica.training.losses import CROSS_ENTROPY, make_loss
from tests.contract.cases import backbone

HOST = Host(backbone("qwen3"))
TOKENS = array(np.array([1, 2, 3], np.int32))


def csr(values: np.ndarray) -> commands.Csr:
    rows, cols = np.nonzero(values)
    crow = np.concatenate([[0], np.bincount(rows, minlength=len(values)).cumsum()]).astype(np.int64)
    return commands.Csr(array(values[rows, cols]), array(crow), array(cols.astype(np.int64)), values.shape)


def message(**inputs: commands.Array | commands.Csr) -> commands.Datum:
    return commands.Datum(TOKENS, inputs)


@given(hnp.arrays(np.int64, (3, 4), elements=st.integers(0, 3)))
def test_a_sparse_array_holds_what_its_dense_form_holds(values: np.ndarray) -> None:
    assert (checked(csr(values), "x") == values).all()


@given(
    hnp.arrays(np.int64, (3, 4), elements=st.integers(0, 5)),
    hnp.arrays(np.float32, (3, 4), elements=st.sampled_from([0.0, 0.5, -1.0])),
)
def test_sparse_and_dense_targets_give_one_loss_even_where_a_target_is_token_zero(
    targets: np.ndarray, weights: np.ndarray
) -> None:
    engine = Engine(HOST)
    found = []
    for make in (array, csr):
        intake = take_in(message(target_tokens=make(targets), weights=make(weights)), CROSS_ENTROPY, "d")
        (result,) = engine.forward([Item(intake.datum, None)])
        out = np.frombuffer(intake.output(result.logprobs).data, np.float32).reshape(intake.shape)
        found.append((result.loss, out))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5, abs=1e-5)
    filled = (targets != 0) | (weights != 0)
    np.testing.assert_allclose(found[1][1][filled], found[0][1][filled], rtol=1e-5)
    assert not found[1][1][~filled].any()


def test_several_targets_with_weights_are_their_single_losses_summed() -> None:
    engine = Engine(HOST)
    weights = np.array([[0.5, 0.25], [0.0, 1.0], [-1.0, 2.0]], np.float32)
    targets = np.array([[4, 5], [6, 7], [8, 9]], np.int64)
    both = take_in(message(target_tokens=array(targets), weights=array(weights)), CROSS_ENTROPY, "d").datum
    (whole,) = engine.forward([Item(both, None)])
    parts = [
        take_in(
            message(target_tokens=array(targets[:, k].copy()), weights=array(weights[:, k].copy())), CROSS_ENTROPY, "d"
        ).datum
        for k in range(2)
    ]
    single = engine.forward([Item(part, None) for part in parts])
    assert whole.loss == pytest.approx(sum(result.loss for result in single), rel=1e-6)
    np.testing.assert_allclose(whole.logprobs.reshape(3, 2)[:, 0], single[0].logprobs, rtol=1e-6)


def test_a_micro_batch_may_mix_losses_and_layouts() -> None:
    targets, ones = array(np.array([4, 5, 6])), array(np.ones(3, np.float32))
    loss = make_loss("ppo")
    cases = [
        (message(target_tokens=targets, weights=ones), CROSS_ENTROPY),
        (message(target_tokens=targets, logprobs=array(-np.ones(3, np.float32)), advantages=ones), loss),
        (
            message(
                target_tokens=array(np.array([[4, 5], [0, 0], [1, 1]])), weights=array(np.ones((3, 2), np.float32))
            ),
            CROSS_ENTROPY,
        ),
    ]
    items = [Item(take_in(given, own, "d").datum, None, own) for given, own in cases]
    together = Engine(HOST).forward(items)
    for item, result in zip(items, together, strict=True):
        (alone,) = Engine(HOST).forward([item])
        assert result.loss == pytest.approx(alone.loss, rel=1e-6)
        np.testing.assert_allclose(result.logprobs, alone.logprobs, rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (message(weights=array(np.ones(3, np.float32))), "no 'target_tokens'"),
        (message(target_tokens=array(np.ones(3, np.float32))), "token ids and indices are integers"),
        (message(target_tokens=array(np.ones(2, np.int64))), r"\(3,\) or \(3, K\) is right"),
        (
            message(target_tokens=array(np.ones(3, np.int64)), weights=array(np.ones(2, np.float32))),
            "weights has shape",
        ),
        (message(target_tokens=commands.Array(b"123", "int64", (3,))), "3 bytes; they do not make"),
        (message(target_tokens=commands.Array(b"", "object", (0,))), "is 'object'"),
        (message(target_tokens=commands.Array(b"", "int64", (-1, 0))), "do not make"),
        (message(target_tokens=commands.Csr(*[array(np.zeros(1, np.int64))] * 3, (3, 10**12))), "at most"),
        (message(target_tokens=commands.Csr(*[array(np.zeros(1, np.int64))] * 3, (3, 2))), "row pointers"),
        (
            message(
                target_tokens=commands.Csr(
                    array(np.ones(1, np.int64)), array(np.array([0, 1, 1, 1])), array(np.array([7])), (3, 2)
                )
            ),
            "column indices",
        ),
    ],
)
def test_messages_whose_parts_do_not_fit_are_refused(given: commands.Datum, said: str) -> None:
    with pytest.raises(DataError, match=said):
        take_in(given, CROSS_ENTROPY, "datum 2")
