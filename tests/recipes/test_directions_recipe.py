"""Directions as a recipe: what an extraction states, conditions with their controls, tables of scalars."""

from __future__ import annotations

import pytest
import torch

from lorica.client.local import Service
from lorica.core.errors import DataError, MethodError, TargetError
from lorica.data.records import Chat
from lorica.data.render import Renderer
from lorica.data.token_parts import parted
from lorica.engine.recording import Seen, record_means
from lorica.methods import make_method
from lorica.models import load
from lorica.recipes.directions import (
    PLAIN,
    DirectionSettings,
    Side,
    adapter_conditions,
    conditions,
    extract,
    sample_under,
    scalar_table,
)
from lorica.sampling.params import SamplingParams


@pytest.fixture(scope="module")
def service():
    made = Service(load("nano", dtype="float32"))
    for name, method, targets in (
        ("one", make_method("lora", rank=1), {"include": "down_proj", "layers": "1-2"}),
        ("wide", make_method("lora", rank=2), "v_proj"),
    ):
        adapter = made.training_client(method, targets, name=name).adapter
        adapter.flat.add_(0.2 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(1)))
    return made


@pytest.fixture(scope="module")
def renderer(service):
    return Renderer(service.host.backbone.tokenizer)


def rows(renderer, *answers):
    def chat(answer):
        return Chat(({"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}), "here")

    return [parted(renderer, chat(answer)) for answer in answers]


def test_an_extraction_is_the_difference_of_means_and_states_how_it_was_made(service, renderer):
    loud, calm = rows(renderer, "ALARM", "ALARM IS SET"), rows(renderer, "alarm")
    found = extract(service, Side("loud", loud, "one"), Side("calm", calm), DirectionSettings(header_in_answer=False))
    means = [
        record_means(service.host, [Seen(r.tokens, [p == "answer" for p in r.parts], name) for r in side])
        for side, name in ((loud, "one"), (calm, None))
    ]
    for layer in found.layers:
        torch.testing.assert_close(found.vectors[layer], means[0][layer].mean - means[1][layer].mean)
    about = found.about
    assert about["settings"] == {"tokens": "answer", "header_in_answer": False, "layers": None}
    assert [(s["name"], s["adapter"], s["rows"]) for s in about["sides"]] == [("loud", ["one"], 2), ("calm", [], 1)]
    assert [s["tokens"] for s in about["sides"]] == [means[0][0].count, means[1][0].count]
    assert found.base == service.host.backbone.fingerprint() and "proves no cause" in about["limits"]


def test_swapping_the_sides_turns_the_direction_round_and_equal_sides_have_none(service, renderer):
    loud, calm = Side("loud", rows(renderer, "ALARM")), Side("calm", rows(renderer, "alarm"))
    forth, back = extract(service, loud, calm), extract(service, calm, loud)
    assert all(torch.equal(forth.vectors[n], -back.vectors[n]) for n in forth.layers)
    assert not any(vector.any() for vector in extract(service, loud, loud).vectors.values())


def test_what_cannot_be_extracted_is_one_sentence(service, renderer):
    side = Side("loud", rows(renderer, "ALARM"))
    with pytest.raises(DataError, match="no rows of 'none'"):
        extract(service, side, Side("none", []))
    with pytest.raises(TargetError, match="layers 0 to 5"):
        extract(service, side, side, DirectionSettings(layers="4-7"))


def test_every_intervention_has_its_controls_and_the_same_prompts_are_sampled_in_each(service, renderer):
    found = extract(service, Side("loud", rows(renderer, "ALARM")), Side("calm", rows(renderer, "alarm")))
    plan = conditions(found, kappas=(4.0, -4.0), ablate=True, layers=[2, 3], controls=2, seed=5)
    names = [
        PLAIN,
        *(f"{kind}{end}" for kind in ("ablate", "steer +4", "steer -4") for end in ("", ", random 0", ", random 1")),
    ]
    assert [one.name for one in plan] == names and [one.control for one in plan] == ["random" in name for name in names]
    params = SamplingParams(max_tokens=5)
    prompts = [row.tokens[:6] for row in rows(renderer, "x", "y")]
    before = service.sampling_client("one").sample(prompts, params)
    sampled = sample_under(service, "one", prompts, params, plan)
    assert list(sampled) == names and sampled[PLAIN] == before
    assert len({tuple(s.logprobs for s in own) for own in sampled.values()}) == len(names)
    assert service.sampling_client("one").sample(prompts, params) == before
    with pytest.raises(MethodError, match="no direction of layer 9"):
        conditions(found, ablate=True, layers=[9])


def test_a_rank_1_adapter_is_silenced_beside_random_ones(service, renderer):
    plan = adapter_conditions("one", kappas=(5.0,), controls=2)
    assert [one.name for one in plan] == [PLAIN, "silent", "random adapter 0", "random adapter 1", "writes +5"]
    prompts = [rows(renderer, "x")[0].tokens[:6]]
    sampled = sample_under(service, "one", prompts, SamplingParams(max_tokens=4), plan)
    assert sampled["silent"] == service.sampling_client(None).sample(prompts, SamplingParams(max_tokens=4))
    assert len({own[0].logprobs for own in sampled.values()}) == 5


def test_a_table_of_scalars_is_aligned_with_texts_and_parts(service, renderer):
    read = rows(renderer, "alarm", "set")
    table = scalar_table(service, renderer, read, "one", labels=[{"class": "a"}, {"class": "b"}])
    assert len(table.lines) == sum(len(row.tokens) for row in read)
    assert "".join(line.text for line in table.lines if line.row == 0) == renderer.tokenizer.decode(read[0].tokens)
    assert [line.part for line in table.lines if line.row == 1] == list(read[1].parts)
    assert table.label("class")[0] == "a" and table.label("class")[-1] == "b"
    assert table.sites == ("model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj")
    assert "sign of c" in table.about["limits"]
