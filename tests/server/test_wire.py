"""The wire: what the real SDK encodes, our codec reads; what our codec answers, the real SDK reads."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinker import types
from tinker.proto import request_conv, response_conv

from lorica.core.errors import DataError
from lorica.engine import arrays
from lorica.engine.commands import Array, Csr, Sampled, Sequence, TopK, Trained
from lorica.server.bodies import SampleBody
from lorica.server.wire import sampling, tensors, train
from lorica.server.wire.proto import pb


def request(data, loss="cross_entropy", config=None, seq=1):
    made = types.ForwardBackwardRequest(
        forward_backward_input=types.ForwardBackwardInput(data=data, loss_fn=loss, loss_fn_config=config),
        model_id="run",
        seq_id=seq,
    )
    return request_conv.forward_backward_request_to_proto(made)


def datum(tokens, **inputs):
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


def test_a_dense_request_of_the_sdk_becomes_a_train_command():
    body = request([datum([1, 2, 3], target_tokens=[2, 3, 4], weights=[1.0, -0.5, 0.0])], seq=7).SerializeToString()
    message = train.parse(body)
    assert train.head(message) == train.Head("run", 7, 3, True)
    command = train.command(message, id=5, run="run")
    assert command.backward and command.loss == "cross_entropy" and command.id == 5
    tokens, inputs = command.datums[0].tokens, command.datums[0].inputs
    assert arrays.numpy(tokens).tolist() == [1, 2, 3] and tokens.dtype == "int32"
    assert arrays.numpy(inputs["target_tokens"]).tolist() == [2, 3, 4]
    assert arrays.numpy(inputs["weights"]).tolist() == [1.0, -0.5, 0.0]


def test_forward_only_is_not_ignored():
    message = request([datum([1], target_tokens=[1], weights=[1.0])])
    message.forward_only = True
    assert not train.command(train.parse(message.SerializeToString()), id=1, run="r").backward


def test_sparse_targets_of_the_sdk_keep_their_values():
    torch = pytest.importorskip("torch")
    targets = torch.zeros(6, 50, dtype=torch.int64)
    targets[:, 0] = torch.arange(1, 7)
    weights = torch.zeros(6, 50)
    weights[:, 0] = 0.25
    made = datum(list(range(6)), target_tokens=targets, weights=weights)
    command = train.command(train.parse(request([made]).SerializeToString()), id=1, run="r")
    given_targets = command.datums[0].inputs["target_tokens"]
    assert isinstance(given_targets, Csr)
    assert np.array_equal(arrays.dense(given_targets), targets.numpy())
    assert np.array_equal(arrays.dense(command.datums[0].inputs["weights"]), weights.numpy())


def test_the_second_form_of_a_losss_settings_comes_first():
    message = request([datum([1], target_tokens=[1], weights=[1.0])], config={"beta": 0.1, "name": "x"})
    assert train.command(message, id=1, run="r").config == {"beta": 0.1, "name": "x"}
    message.ClearField("loss_fn_config_v2")
    assert set(train.command(message, id=1, run="r").config) == {"beta"}


def test_every_dtype_of_the_wire_is_read():
    values = np.array([1.5, -2.0, 0.25], np.float32)
    for dtype, data, wanted in (
        (pb.DTYPE_FLOAT32, values.tobytes(), values),
        (pb.DTYPE_INT64, np.array([1, -2, 3], np.int64).tobytes(), [1, -2, 3]),
        (pb.DTYPE_INT32, np.array([1, -2, 3], np.int32).tobytes(), [1, -2, 3]),
        (pb.DTYPE_BFLOAT16, (values.view(np.uint32) >> 16).astype(np.uint16).tobytes(), values),
    ):
        read = tensors.read_tensor(pb.Tensor(dense=data, dtype=dtype), "it")
        assert isinstance(read, Array) and arrays.numpy(read).tolist() == list(wanted)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (pb.Tensor(dense=b"123", dtype=pb.DTYPE_FLOAT32), "3 bytes"),
        (pb.Tensor(dense=b"1234", dtype=0), "dtype 0"),
        (pb.Tensor(dense=b"1234", dtype=pb.DTYPE_FLOAT32, shape=[2]), "needs 2"),
        (pb.Tensor(dense=b"1234", dtype=pb.DTYPE_FLOAT32, shape=[-1]), "no tensor"),
        (pb.Tensor(sparse_csr=pb.SparseCsr(values=b"1234"), dtype=pb.DTYPE_FLOAT32, shape=[1]), "two axes"),
        (pb.Tensor(sparse_csr=pb.SparseCsr(values=b"1234"), dtype=pb.DTYPE_FLOAT32, shape=[1, 1]), "crow"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_in_a_sentence(message, told):
    with pytest.raises(DataError, match=told):
        tensors.read_tensor(message, "Datum 0's 'weights'")


@given(st.binary(max_size=300))
def test_no_bytes_break_the_reader(body):
    with contextlib.suppress(DataError):
        train.command(train.parse(body), id=1, run="r")


def test_ragged_answers_reach_the_sdk_datum_by_datum():
    outputs = [
        {"logprobs": arrays.array(np.array([-1.0, -2.0], np.float32))},
        {"logprobs": arrays.array(np.array([[-1.0, -2.0], [-3.0, -4.0]], np.float32))},
        {"logprobs": arrays.array(np.array([-5.0], np.float32))},
    ]
    data = train.answer(Trained(1, outputs, {"loss:sum": float("nan"), "odd": 1.0}))
    read = response_conv.deserialize_forward_backward_output(data)
    assert [o["logprobs"].tolist() for o in read.loss_fn_outputs] == [
        [-1.0, -2.0],
        [[-1.0, -2.0], [-3.0, -4.0]],
        [-5.0],
    ]
    assert np.isnan(read.metrics["loss:sum"]) and set(read.metrics) == {"loss:sum", "odd:mean"}


def test_an_answer_without_fields_still_counts_its_datums():
    read = response_conv.deserialize_forward_backward_output(train.answer(Trained(1, [{}, {}], {"loss:sum": 0.0})))
    assert read.loss_fn_outputs == [{}, {}]


def test_samples_reach_the_sdk_with_tables_and_reasons():
    floats = arrays.array(np.array([-0.5, -1.5], np.float32))
    table = TopK(arrays.array(np.array([[1, 2]] * 3, np.int32)), arrays.array(np.full((3, 2), -1.0, np.float32)))
    reply = Sampled(
        1,
        [Sequence(arrays.array(np.array([7, 8], np.int32)), floats, reason) for reason in ("stop", "length")],
        arrays.array(np.array([0.0, -1.0, -2.0], np.float32)),
        table,
        cached=3,
    )
    read = response_conv.deserialize_sample_response(sampling.answer(reply, last=1))
    assert [s.stop_reason for s in read.sequences] == ["stop", "length"]
    assert read.sequences[0].tokens == [7, 8] and read.sequences[0].logprobs == [-0.5, -1.5]
    assert read.prompt_logprobs == [None, None, -2.0] and read.prompt_cache_hit_tokens == 3
    assert read.topk_prompt_logprobs_np.token_ids.tolist() == [[0, 0], [0, 0], [1, 2]]


def body(**fields):
    return SampleBody.model_validate(
        {"prompt": {"chunks": [{"tokens": [1, 2, 3], "type": "encoded_text"}]}, "sampling_params": {}, **fields}
    )


def test_a_sample_request_becomes_a_command():
    asked = body(num_samples=2, sampling_params={"max_tokens": 4, "top_k": -1, "seed": 9, "temperature": 0.5})
    command = sampling.command(asked, id=3, tenant="t", adapters=["a"], context=100, seed=1, stop_ids=[2])
    assert (command.num_samples, command.max_tokens, command.top_k, command.seed) == (2, 4, None, 9)
    assert command.adapters == ["a"] and command.temperature == 0.5


def test_without_max_tokens_a_sample_may_fill_the_context():
    assert sampling.command(body(), id=3, tenant="", adapters=[], context=10, seed=1, stop_ids=[]).max_tokens == 7


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"prompt_alt_tokens_k": 2}, "prompt_alt_tokens_k"),
        ({"record_stability_info": True}, "stability info.*importance_sampling"),
        ({"target_prompt_logprobs": {"data": [1]}}, "target_prompt_logprobs"),
        ({"prompt_logprobs_last_n": 1}, "needs prompt_logprobs"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 3}, "1 to 2"),
        ({"sampling_params": {"top_k": 0}}, "top_k"),
        ({"sampling_params": {"max_tokens": 98}}, "do not fit"),
        ({"prompt": {"chunks": []}}, "no tokens"),
    ],
)
def test_what_sampling_cannot_do_is_said(fields, told):
    with pytest.raises(DataError, match=told):
        sampling.check(body(**fields), 100)
