"""Soft prompts at the model's entrance: every way that transformers takes its inputs."""

from __future__ import annotations

import pytest
import torch

from lorica.core.errors import MethodError
from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.host import Host
from lorica.methods import make_method
from tests.contract.cases import close
from tests.tiny import tiny

IDS = torch.tensor([[5, 9, 20, 7], [30, 11, 6, 8]])


def prompted(family: str = "llama", tokens: int = 3) -> Host:
    host = Host(tiny(family, dtype=torch.float64))
    host.add("a", make_method("prompt", tokens=tokens), dtype=torch.float64)
    host.activate("a")
    return host


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "bert"])
def test_embeddings_instead_of_ids_are_the_same(family: str) -> None:
    host = prompted(family)
    embeds = host.backbone.module_of("input")(IDS)
    close(host(inputs_embeds=embeds).logits, host(input_ids=IDS).logits, 1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_positions_that_the_caller_gives_are_moved_behind_the_prompt(family: str) -> None:
    host = prompted(family)
    close(host(input_ids=IDS, position_ids=torch.arange(4)[None]).logits, host(input_ids=IDS).logits, 1e-12)


def test_every_output_has_the_length_of_the_text() -> None:
    host = prompted()
    out = host(input_ids=IDS, output_hidden_states=True)
    assert out.logits.shape[1] == 4
    assert {h.shape[1] for h in out.hidden_states} == {4}


def test_logits_to_keep_count_from_the_end_as_without_a_prompt() -> None:
    host = prompted()
    whole = host(input_ids=IDS).logits
    close(host(input_ids=IDS, logits_to_keep=2).logits, whole[:, -2:], 1e-12)
    assert host(input_ids=IDS, logits_to_keep=1).logits.shape[1] == 1


def test_as_many_logits_kept_as_the_padded_length_are_not_cut() -> None:
    host = prompted(tokens=3)
    whole = host(input_ids=IDS).logits
    close(host(input_ids=IDS, logits_to_keep=4).logits, whole, 1e-12)


def test_prompt_and_prefix_of_one_row_stand_behind_each_other() -> None:
    host = prompted()
    host.add("p", make_method("prefix", tokens=2), dtype=torch.float64)
    host.activate("a", "p")
    both = host(input_ids=IDS).logits
    with host.rows([["p", "a"], ["a", "p"]]):
        close(host(input_ids=IDS).logits, both, 1e-11)
    host.activate("a")
    assert not torch.allclose(host(input_ids=IDS).logits, both)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prompt_of_hard_tokens_behind_a_prefix_is_those_tokens_behind_it(family: str) -> None:
    host = Host(tiny(family, dtype=torch.float64))
    host.add("p", make_method("prefix", tokens=2, init_std=2.0), dtype=torch.float64)
    host.add("a", make_method("prompt", tokens=3, init_ids=(40, 41, 42)), dtype=torch.float64)
    host.activate("p")
    hard = host(input_ids=torch.cat([torch.tensor([[40, 41, 42]] * 2), IDS], dim=1)).logits[:, 3:]
    for stack in (("a", "p"), ("p", "a")):
        host.activate(*stack)
        close(host(input_ids=IDS).logits, hard, 1e-11)
        packed = Engine(host).forward([Item(Example((*IDS[0].tolist(), 3), (0.0, 1, 1, 1, 1)), stack)])
        expected = hard[0].log_softmax(-1).gather(1, torch.tensor([[9], [20], [7], [3]]))[:, 0]
        assert packed[0].logprobs == pytest.approx(expected.tolist(), rel=1e-9)


def test_rows_without_a_prompt_have_the_base_logits_whatever_their_neighbours() -> None:
    host = prompted(tokens=7)
    with host.disabled():
        base = host(input_ids=IDS).logits
    with host.rows([None, "a"]):
        y = host(input_ids=IDS).logits
    close(y[0], base[0], 1e-11)
    host.activate("a")
    close(y[1], host(input_ids=IDS[1:]).logits[0], 1e-11)


def test_two_prompts_in_a_stack_come_innermost_first() -> None:
    host = Host(tiny("llama", dtype=torch.float64))
    for name, ids in (("a", (40,)), ("b", (41, 42))):
        host.add(name, make_method("prompt", tokens=len(ids), init_ids=ids), dtype=torch.float64)
    host.activate("a", "b")
    hard = torch.cat([torch.tensor([[40, 41, 42]] * 2), IDS], dim=1)
    soft = host(input_ids=IDS).logits
    with host.disabled():
        close(soft, host(input_ids=hard).logits[:, 3:], 1e-11)


def test_generating_with_transformers_own_loop_works_with_a_prompt() -> None:
    host = prompted()
    made = host.model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    ids = IDS
    for _ in range(4):
        ids = torch.cat([ids, host(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, ids)


def test_a_four_axis_mask_is_refused() -> None:
    with pytest.raises(MethodError, match="2-D attention mask"):
        prompted()(input_ids=IDS, attention_mask=torch.zeros(2, 1, 4, 4))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_transformers_own_generation_on_a_padded_mixed_batch_is_each_row_alone(method: str, family: str) -> None:
    host = Host(tiny(family, dtype=torch.float64))
    for seed, tokens in enumerate((3, 5)):
        host.add(f"v{tokens}", make_method(method, tokens=tokens), seed=seed, dtype=torch.float64)
    prompts, owners = [[5, 9, 20, 7], [30, 11], [8, 8, 8]], ["v5", None, "v3"]
    ids = torch.tensor([[0] * (4 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (4 - len(p)) + [1] * len(p) for p in prompts])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    generate = host.model.generate  # type: ignore[union-attr]
    with host.rows(owners):
        mixed = generate(input_ids=ids, attention_mask=mask, **options)[:, 4:]  # type: ignore[operator]
    for row, (prompt, owner) in enumerate(zip(prompts, owners, strict=True)):
        with host.rows([owner]):
            alone = generate(input_ids=torch.tensor([prompt]), **options)[0, len(prompt) :]  # type: ignore[operator]
        assert torch.equal(mixed[row], alone)


def test_segment_ids_are_extended_over_the_prompt() -> None:
    host = prompted("bert")
    y = host(input_ids=IDS, token_type_ids=torch.zeros_like(IDS)).logits
    assert torch.equal(y, host(input_ids=IDS).logits)
    assert not torch.equal(y, host(input_ids=IDS, token_type_ids=torch.tensor([[0, 0, 1, 1]] * 2)).logits)


def test_the_batch_is_that_of_the_ids_in_whatever_order_arguments_come() -> None:
    host = prompted()
    with host.rows([None, "a"]):
        y = host(position_ids=torch.arange(4)[None], input_ids=IDS).logits
        close(y, host(input_ids=IDS).logits, 1e-12)
