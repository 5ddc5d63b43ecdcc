"""Numbers for Prometheus: every name is documented, labels are bounded, and a real server counts what it does."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lorica.engine.commands import Array, Csr, Datum, Load, Opened, Step, Stepped, Train, Trained
from lorica.server import curves
from lorica.server.events import BACKLOG, RELOAD, Changes
from lorica.server.metrics import OTHERS, TENANTS, Metrics
from lorica.store.points import Dropped, Passed
from tests.server.conftest import datum, step

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "operate.md"
DOCUMENTED = re.compile(r"^\| `(lorica_\w+)`", re.MULTILINE)


def samples(text: str) -> dict[str, float]:
    """`name{label="value"}` → value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_documented_names_are_the_exposed_ones():
    documented = DOCUMENTED.findall(GUIDE.read_text(encoding="utf-8"))
    assert len(documented) == len(set(documented))
    assert sorted(documented) == Metrics().names()


def test_two_servers_in_one_process_count_apart():
    one, two = Metrics(), Metrics()
    one.count_tokens("train", "anna", 5)
    assert "anna" in one.render().decode() and "anna" not in two.render().decode()


def test_tenants_beyond_the_bound_count_as_one():
    metrics = Metrics()
    for number in range(TENANTS + 3):
        metrics.count_tokens("train", f"t{number}", 1)
    metrics.count_tokens("train", "t0", 1)
    found = samples(metrics.render().decode())
    assert found[f"lorica_tokens_total{{kind=train,tenant={OTHERS}}}"] == 3
    assert found["lorica_tokens_total{kind=train,tenant=t0}"] == 2
    assert sum(key.startswith("lorica_tokens_total") for key in found) == TENANTS + 1


def test_counters_of_an_engine_go_on_over_its_lives():
    metrics = Metrics()
    assert metrics.report("nano", {"rounds": 4, "batch_tokens": 4096}, 2048) == 0.5
    assert metrics.report("nano", {"rounds": 4, "batch_tokens": 4096}, 2048) is None
    metrics.report("nano", {"rounds": 1, "batch_tokens": 2048}, 2048)  # it was started again
    found = samples(metrics.render().decode())
    assert found["lorica_rounds_total{model=nano}"] == 5
    assert found["lorica_batch_tokens_total{model=nano}"] == 6144
    assert found["lorica_batch_occupancy{model=nano}"] == 1.0
    metrics.set_restarts("nano", 1)
    metrics.set_restarts("nano", 1)
    assert samples(metrics.render().decode())["lorica_engine_restarts_total{model=nano}"] == 1


def test_what_a_dead_engine_held_is_not_shown():
    metrics = Metrics()
    metrics.report("nano", {"resident_runs": 3, "queue_depth": 2}, 2048)
    metrics.gone("nano")
    found = samples(metrics.render().decode())
    assert found["lorica_runs{model=nano,state=resident}"] == 0
    assert found["lorica_queue_depth{model=nano,work=train}"] == 0


# -- curves ---------------------------------------------------------------------------------------------------------


def numbers(*values, dtype="float32"):
    array = np.array(values, dtype)
    return Array(array.tobytes(), dtype, array.shape)


TOKENS = numbers(1, 2, 3, dtype="int32")


def passed(**inputs):
    command = Train(1, "r", [Datum(TOKENS, inputs)], "cross_entropy")
    return curves.did(command, Trained(1, [], {"loss:sum": 6.0}))


def test_a_pass_weighs_what_its_loss_sums_over():
    assert passed(weights=numbers(0.0, 1.0, -0.5)) == Passed(6.0, 1.5, 3)
    assert passed(target_tokens=numbers(4, 5, 6, dtype="int64"), advantages=numbers(1, 1, 1)) == Passed(6.0, 3.0, 3)
    sparse = Csr(numbers(0.25, 0.5), numbers(0, 1, 2, 2, dtype="int64"), numbers(0, 1, dtype="int64"), (3, 2))
    assert passed(weights=sparse) == Passed(6.0, 0.75, 3)
    assert passed(weights=numbers(float("nan"))) == Passed(6.0, 0.0, 3)


def test_a_forward_pass_and_a_save_leave_the_curve_alone():
    command = Train(1, "r", [Datum(TOKENS, {})], "cross_entropy", backward=False)
    assert curves.did(command, Trained(1, [], {"loss:sum": 6.0})) is None
    assert curves.did(Load(1, "r", "x", optimizer=False), Opened(1, "lora", {}, {}, 8, 1, 1)) == Dropped()
    told = curves.did(Step(1, "r", lr), Stepped(1, {"grad_norm:mean": 2.0})) if (lr := adam_of(1e-3)) else None
    assert told is not None and (told.grad_norm, told.lr) == (2.0, 1e-3)


def adam_of(lr):
    from lorica.engine.commands import Adam

    return Adam(lr)


# -- changes --------------------------------------------------------------------------------------------------------


async def heard(stream, count):
    return [(change.kind, change.data) for change in [await anext(stream) for _ in range(count)]]


def test_a_follower_hears_its_own_tenant_and_an_operator_all():
    import asyncio

    async def main():
        changes = Changes()
        own, all_ = changes.follow("anna", everything=False), changes.follow("root", everything=True)
        assert await heard(own, 1) == await heard(all_, 1) == [(RELOAD, {})]
        changes.publish("point", {"n": 1}, "anna")
        changes.publish("point", {"n": 2}, "bert")
        changes.publish("stats", {"n": 3})
        assert [data["n"] for _, data in await heard(own, 2)] == [1, 3]
        assert [data["n"] for _, data in await heard(all_, 3)] == [1, 2, 3]
        changes.close()
        assert [change async for change in own] == []

    asyncio.run(main())


def test_a_slow_follower_is_told_to_look_anew():
    import asyncio

    async def main():
        changes = Changes()
        stream = changes.follow("anna", everything=False)
        await heard(stream, 1)
        for n in range(BACKLOG + 5):
            changes.publish("stats", {"n": n})
        assert await heard(stream, 2) == [(RELOAD, {}), ("stats", {"n": BACKLOG})]
        await stream.aclose()
        assert len(changes) == 0

    asyncio.run(main())


# -- a real server --------------------------------------------------------------------------------------------------


def scrape(server, key):
    return httpx.get(f"{server.url}/metrics", headers={"x-api-key": key})


@pytest.mark.slow
def test_a_server_counts_what_it_does(server, service):
    run = service.create_lora_training_client("nano", rank=4).result()
    step(run, [datum(range(5, 21))])
    run.forward([datum(range(5, 15))], "cross_entropy").result()
    sampler = run.save_weights_and_get_sampling_client().result()
    from tinker import types

    sampler.sample(types.ModelInput.from_ints([5, 6, 7]), 2, types.SamplingParams(max_tokens=4, stop=[])).result()
    with pytest.raises(Exception, match="loss"):
        run.forward_backward([datum(range(5, 9))], "no_such_loss").result()
    found = samples(scrape(server, server.key).text)
    for kind, count in {"train": 16, "forward": 10, "sample": 8}.items():
        assert found[f"lorica_tokens_total{{kind={kind},tenant=default}}"] == count
    assert found["lorica_tokens_total{kind=prefill,tenant=default}"] >= 3
    assert found["lorica_engine_up{model=nano}"] == 1
    assert found["lorica_requests_total{kind=forward_backward,outcome=done}"] == 2
    assert sum(value for key, value in found.items() if key.startswith("lorica_errors_total{category=user")) == 1
    assert found["lorica_queue_wait_seconds_count{kind=forward_backward}"] == 3
    assert found["lorica_engine_seconds_count{command=step,model=nano}"] == 1
    assert found["lorica_http_requests_total{method=POST,route=/api/v1/optim_step,status=200}"] == 1
    assert found["lorica_journal_entries{}"] > 0 and found["lorica_journal_bytes{}"] > 0
    assert set(DOCUMENTED.findall(GUIDE.read_text())) >= {f.name for f in families(scrape(server, server.key).text)}


def families(text):
    """Families by the names that the guide uses."""
    for family in text_string_to_metric_families(text):
        if family.name.startswith("lorica_"):
            family.name += "_total" if family.type == "counter" else ""
            yield family


@pytest.mark.slow
def test_metrics_are_for_operators(server):
    assert scrape(server, server.new_key("anna")).status_code == 403
    assert httpx.get(f"{server.url}/metrics").status_code == 401
