"""The main flow of the real SDK against a real server: train, save, sample, come back."""

from __future__ import annotations

import warnings

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

from lorica.server.text import text_of
from tests.server.conftest import adam, datum, step

DATA = [datum(range(10, 27)), datum(range(30, 41))]


def test_the_required_flow_runs_from_beginning_to_end(service, server):
    assert [m.model_name for m in server.rest().get_server_capabilities().result().supported_models] == ["nano"]
    run = service.create_lora_training_client("nano", rank=8, seed=1, user_metadata={"who": "test"}).result()
    info = run.get_info()
    assert info.is_lora and info.lora_rank == 8 and info.model_data.model_name == "nano"
    losses = [step(run, DATA, lr=5e-3) for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and np.isfinite(losses).all()
    saved = run.save_weights_for_sampler("s1").result()
    sampler = service.create_sampling_client(model_path=saved.path).result()
    prompt = types.ModelInput.from_ints([10, 11, 12])
    params = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])
    result = sampler.sample(prompt, 2, params, include_prompt_logprobs=True, topk_prompt_logprobs=2).result()
    assert [len(s.tokens) for s in result.sequences] == [4, 4]
    assert result.sequences[0].tokens == result.sequences[1].tokens
    assert result.prompt_logprobs[0] is None and len(result.prompt_logprobs) == 3
    assert all(s.logprobs is not None and len(s.logprobs) == 4 for s in result.sequences)


def test_a_run_continues_from_a_checkpoint_with_its_optimizer(service):
    run = service.create_lora_training_client("nano", rank=4, seed=2).result()
    step(run, DATA)
    path = run.save_state("here").result().path
    after = [step(run, DATA) for _ in range(2)]
    again = service.create_training_client_from_state_with_optimizer(path).result()
    assert again.get_info().lora_rank == 4
    assert [step(again, DATA) for _ in range(2)] == after


def test_a_checkpoint_loaded_in_place_brings_the_weights_back(service):
    run = service.create_lora_training_client("nano", rank=4, seed=2).result()
    before = run.forward(DATA, "cross_entropy").result().metrics["loss:sum"]
    path = run.save_state("start").result().path
    step(run, DATA, lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        run.load_state(path).result()
    assert run.forward(DATA, "cross_entropy").result().metrics["loss:sum"] == before


def test_any_method_is_one_word_of_metadata(service):
    run = service.create_lora_training_client("nano", rank=4, user_metadata={"method": "dora"}).result()
    assert step(run, DATA) > 0
    ia3 = service.create_lora_training_client("nano", user_metadata={"method": "ia3"}).result()
    assert ia3.get_info().lora_rank is None and step(ia3, DATA) > 0


def test_an_unknown_method_fails_with_the_nearest_names(service):
    with pytest.raises(tinker.RequestFailedError, match="dora"):
        service.create_lora_training_client("nano", user_metadata={"method": "dorra"}).result()


def test_an_unknown_base_model_is_refused_by_name(service):
    with pytest.raises(tinker.NotFoundError, match="nana.*nano"):
        service.create_lora_training_client("nana").result()
    with pytest.raises(tinker.NotFoundError, match="not served"):
        service.create_sampling_client(base_model="nana").result()


def test_the_base_model_can_be_sampled_and_scored(service):
    sampler = service.create_sampling_client(base_model="nano").result()
    prompt = types.ModelInput.from_ints([5, 6, 7, 8])
    params = types.SamplingParams(max_tokens=5, seed=3, stop=[])
    first, second = (sampler.sample(prompt, 2, params).result() for _ in range(2))
    assert [s.tokens for s in first.sequences] == [s.tokens for s in second.sequences]
    assert first.sequences[0].tokens != first.sequences[1].tokens
    scored = sampler.compute_logprobs(prompt).result()
    assert scored[0] is None and all(value < 0 for value in scored[1:])


def test_stop_strings_end_a_sample_with_the_token_that_completes_them(service, server):
    words = text_of(server.server.backbones.find("nano").info["tokenizer"]).tokenizer.fast
    sampler = service.create_sampling_client(base_model="nano").result()
    prompt = types.ModelInput.from_ints(words.encode("Once upon a time").ids)
    free = sampler.sample(prompt, 1, types.SamplingParams(max_tokens=30, temperature=0.0, stop=[])).result()
    text = words.decode(free.sequences[0].tokens, skip_special_tokens=False)
    stop = text[len(text) // 3 : len(text) // 3 + 4]
    cut = sampler.sample(prompt, 1, types.SamplingParams(max_tokens=30, temperature=0.0, stop=[stop])).result()
    sequence = cut.sequences[0]
    assert sequence.stop_reason == "stop" and stop in words.decode(sequence.tokens, skip_special_tokens=False)
    assert stop not in words.decode(sequence.tokens[:-1], skip_special_tokens=False)
    assert len(sequence.logprobs) == len(sequence.tokens)


def test_checkpoints_are_listed_kept_for_a_time_published_and_deleted(service, server):
    run = service.create_lora_training_client("nano", rank=4).result()
    path = run.save_state("kept", user_metadata={"step": "1"}).result().path
    rest = server.rest()
    listed = rest.list_checkpoints(run.model_id).result().checkpoints
    assert [c.tinker_path for c in listed] == [path] and listed[0].user_metadata == {"step": "1"}
    assert listed[0].size_bytes > 0 and listed[0].checkpoint_id == "weights/kept"
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    rest.publish_checkpoint_from_tinker_path(path).result()
    other = server.rest(server.new_key("reader"))
    assert other.get_weights_info_by_tinker_path(path).result().lora_rank == 4
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    shown = rest.get_training_run(run.model_id).result()
    assert shown.last_checkpoint.tinker_path == path and shown.last_checkpoint.expires_at is not None
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert rest.list_checkpoints(run.model_id).result().checkpoints == []


def test_the_export_is_a_folder_that_peft_loads(service, server, tmp_path):
    import urllib.request

    peft = pytest.importorskip("peft")
    run = service.create_lora_training_client("nano", rank=4, train_unembed=False).result()
    step(run, DATA)
    path = run.save_weights_external("out").result().path
    urls = server.rest().get_external_weights_urls(path).result().urls
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(urls)
    for name, url in urls.items():
        (tmp_path / name).write_bytes(urllib.request.urlopen(url).read())
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert config.r == 4 and config.lora_alpha == 32


def test_a_custom_loss_equals_the_loss_that_it_imitates(service):
    import torch

    plain = service.create_lora_training_client("nano", rank=4, seed=5).result()
    custom = service.create_lora_training_client("nano", rank=4, seed=5).result()

    def loss(data, logprobs):
        return -sum(values.sum() for values in logprobs), {}

    torch.manual_seed(0)
    custom.forward_backward_custom(DATA, loss).result()
    plain.forward_backward(DATA, "cross_entropy").result()
    for run in (plain, custom):
        run.optim_step(adam(1e-2)).result()
    ends = [run.forward(DATA, "cross_entropy").result().metrics["loss:sum"] for run in (plain, custom)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


def test_an_inflight_sampler_follows_the_weights_and_a_snapshot_does_not(service):
    run = service.create_lora_training_client("nano", rank=4, seed=9).result()
    prompt = types.ModelInput.from_ints(list(range(10, 18)))
    step(run, DATA, lr=1e-2)
    follows = run.save_weights_and_get_sampling_client(kind="inflight").result()
    stays = run.save_weights_and_get_sampling_client().result()
    first = follows.compute_logprobs(prompt).result()
    assert stays.compute_logprobs(prompt).result() == first
    step(run, DATA, lr=1e-2)
    run.save_weights_and_get_sampling_client(kind="inflight").result()
    assert follows.compute_logprobs(prompt).result() != first
    assert stays.compute_logprobs(prompt).result() == first


def test_a_copy_of_a_checkpoint_outlives_it_and_is_made_once(service, server):
    import httpx

    run = service.create_lora_training_client("nano", rank=4, seed=9).result()
    path = run.save_state("source").result().path
    session = run.model_id.split(":")[0]
    asked = {"session_id": session, "model_seq_id": 50, "source_path": path}
    headers = {"X-API-Key": server.key, "X-Idempotency-Key": "k1"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=30) as web:
        first, second = (web.post("/api/v1/copy_weights", json=asked).json()["tinker_path"] for _ in range(2))
    assert first == second != path
    server.rest().delete_checkpoint_from_tinker_path(path).result()
    again = service.create_training_client_from_state_with_optimizer(first).result()
    assert step(again, DATA) > 0


def test_a_sampling_client_may_poll_for_all_its_requests_at_once(service, server):
    import httpx

    sampler = service.create_sampling_client(base_model="nano").result()
    prompt = types.ModelInput.from_ints([1, 2, 3])
    for future in [sampler.sample(prompt, 1, types.SamplingParams(max_tokens=2)) for _ in range(3)]:
        future.result()
    target = {"type": "sampling_session", "sampling_session_id": sampler._sampling_session_id, "cloned_sampler_id": 0}
    with httpx.Client(base_url=server.url, headers={"X-API-Key": server.key}, timeout=30) as web:
        told = web.post("/api/v1/retrieve_futures", json={"target": target, "prev_cursor": 0}).json()
        assert [c["state"] for c in told["completions"]] == ["finished"] * 3
        asked = {"target": target, "prev_cursor": told["cursor"], "timeout": 0}
        assert web.post("/api/v1/retrieve_futures", json=asked).json()["completions"] == []


def test_the_documentation_page_holds_every_route_and_loads_nothing_from_elsewhere(server):
    schema = httpx.get(server.url + "/openapi.json").json()
    page = httpx.get(server.url + "/docs").text
    assert len(schema["paths"]) > 40
    for path, methods in schema["paths"].items():
        for method in methods:
            assert f"{method.upper()} {path}" in page
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert "sampling_session_id" in page and "sampling_params" in page, "fields of bodies"
