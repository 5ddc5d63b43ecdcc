"""Small parts by themselves: limits, futures, links, stop strings, uploads."""

from __future__ import annotations

import asyncio
import json
import struct
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from lorica.core.errors import DataError, FormatError
from lorica.models.loading import locate
from lorica.server import stops, uploads
from lorica.server.completions import Completions
from lorica.server.errors import ApiError
from lorica.server.futures import Futures, Result, dump
from lorica.server.limits import Limiter
from lorica.server.settings import Limits
from lorica.server.signing import Signer, load_secret
from lorica.server.text import text_of
from lorica.store.keys import Quotas


def test_tokens_per_minute_are_a_time_to_wait():
    limiter = Limiter(Limits(tokens_per_minute=600))
    assert limiter.wait("a", 600) == 0
    assert 5 < limiter.wait("a", 60) <= 6.1
    assert limiter.wait("b", 10_000) == 0, "a request larger than the bucket needs a full one"
    limiter.set_quotas("c", Quotas(tokens_per_minute=0))
    assert limiter.wait("c", 10**9) == 0


def test_samples_at_once_are_counted_and_given_back():
    limiter = Limiter(Limits(concurrent_samples=2))
    limiter.begin_samples("a", 2, 0)
    with pytest.raises(ApiError) as caught:
        limiter.begin_samples("a", 1, 0)
    assert caught.value.status == 429 and "retry-after-ms" in caught.value.headers
    limiter.begin_samples("b", 2, 0)
    limiter.end_samples("a", 2)
    limiter.begin_samples("a", 1, 0)


def test_a_result_wakes_its_waiters_and_the_first_one_stays():
    async def run():
        futures = Futures()
        futures.open("r", "a")
        assert futures.known("r", "a") and not futures.known("r", "b")
        assert await futures.wait("r", 0.01) is None
        waiting = [asyncio.create_task(futures.wait("r", 10)) for _ in range(3)]
        await asyncio.sleep(0)
        futures.resolve("r", "a", Result.of({"x": 1}))
        futures.resolve("r", "a", Result.of({"x": 2}))
        assert [json.loads(r.data) for r in await asyncio.gather(*waiting)] == [{"x": 1}] * 3
        assert len(futures) == 0

    asyncio.run(run())


def test_results_in_memory_are_bounded():
    async def run():
        futures = Futures(keep_bytes=5000)
        for n in range(10):
            futures.resolve(str(n), "a", Result("x", b"x" * 40))
        assert futures.known("9", "a") and not futures.known("0", "a")

    asyncio.run(run())


def test_numbers_that_json_lacks_are_words_that_the_sdk_reads():
    from tinker.types import OptimStepResponse

    data = dump({"metrics": {"a:mean": float("nan"), "b:mean": float("-inf"), "c:mean": 1.0}})
    assert b"NaN" in data and json.loads(data, parse_constant=pytest.fail)
    read = OptimStepResponse.model_validate(json.loads(data)).metrics
    assert np.isnan(read["a:mean"]) and read["b:mean"] == -np.inf


def test_a_link_is_good_for_its_subject_and_its_time(tmp_path):
    signer = Signer(load_secret(tmp_path / "secret"))
    assert (tmp_path / "secret").stat().st_mode & 0o077 == 0
    later = int(time.time()) + 60
    signature = signer.query("a/b", later).rpartition("=")[2]
    assert signer.valid("a/b", later, signature)
    assert not signer.valid("a/c", later, signature)
    assert not signer.valid("a/b", later + 1, signature)
    old = int(time.time()) - 1
    assert not signer.valid("a/b", old, signer.query("a/b", old).rpartition("=")[2])
    assert Signer(load_secret(tmp_path / "secret")).valid("a/b", later, signature)


def test_completions_are_read_on_from_a_cursor():
    async def run():
        log = Completions()
        log.add("s", 0, "r0", Result.of({}))
        log.add("s", 1_000_000_000, "clone", Result.failed("user", "x", "y"))
        found, cursor = await log.after("s", 0, 0, 0)
        assert [f["request_id"] for f in found] == ["r0"]
        assert await log.after("s", 0, cursor, 0) == ([], cursor)
        waiting = asyncio.create_task(log.after("s", 0, cursor, 5))
        await asyncio.sleep(0.01)
        log.add("s", 1, "r1", Result.of({}))
        assert [f["request_id"] for f in (await waiting)[0]] == ["r1"]
        assert (await log.after("s", 1, 0, 0))[0][0]["state"] == "failed"

    asyncio.run(run())


NANO = str(locate("nano"))


def test_stops_mean_what_the_protocol_says():
    assert stops.stops(None, [2], NANO).ids == [2]
    assert stops.stops([], [2], NANO).ids == []
    assert stops.stops([7], [2], NANO).ids == [2, 7]
    assert stops.stops("end", [2], NANO).strings == ["end"]
    with pytest.raises(DataError, match="tokenizer"):
        stops.stops("end", [2], "")
    with pytest.raises(DataError, match="empty"):
        stops.stops([""], [2], NANO)


def test_a_watcher_finds_the_token_that_completes_a_string():
    ids = text_of(NANO).tokenizer.fast.encode("the little dog ran away from the house").ids
    watcher = stops.Watcher(["dog r"], NANO)
    for n, token in enumerate(ids, 1):
        if watcher.feed([token]) is not None:
            assert watcher.end == n
            break
    text = text_of(NANO).tokenizer.fast.decode(ids[: watcher.end], skip_special_tokens=False)
    before = text_of(NANO).tokenizer.fast.decode(ids[: watcher.end - 1], skip_special_tokens=False)
    assert "dog r" in text and "dog r" not in before


@pytest.fixture
def folder(tmp_path):
    (tmp_path / uploads.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}, tmp_path / uploads.WEIGHTS)
    return tmp_path


def test_a_good_upload_is_described(folder):
    found = uploads.check_folder(folder)
    assert found.tensors == 2 and found.opened == {"method": "lora", "rank": 4, "config": {"rank": 4, "alpha": 8}}


def spoiled(folder, header=None, data=b""):
    text = json.dumps(header or {}).encode()
    (folder / uploads.WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    ("header", "data", "told"),
    [
        ({}, b"", "no tensors"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234", "does not lie"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345678", "belong to no tensor"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234", "no possible shape"),
        ({"a": {"dtype": "PY", "shape": [1], "data_offsets": [0, 4]}}, b"1234", "dtype"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"1234", "data_offsets"),
        ({"a": 3}, b"1234", "data_offsets"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, np.array([np.nan], "f4").tobytes(), "finite"),
        ({"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}, b"\x80\x7f", "finite"),
    ],
)
def test_a_spoiled_upload_is_refused_in_a_sentence(folder, header, data, told):
    spoiled(folder, header, data)
    with pytest.raises(FormatError, match=told):
        uploads.check_folder(folder)


def test_other_files_are_no_uploads(folder):
    (folder / uploads.WEIGHTS).write_bytes(b"\x80\x04pickle")
    with pytest.raises(FormatError, match="no safetensors"):
        uploads.check_folder(folder)
    (folder / uploads.CONFIG).write_text("{}")
    with pytest.raises(FormatError, match="peft_type"):
        uploads.check_folder(folder)
