"""Prompt tuning: a soft prompt of hard tokens is those tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorica.core.errors import MethodError
from lorica.engine.host import Host
from lorica.methods.prompt import Prompt
from lorica.models import Backbone
from tests.methods.one import matrix, same
from tests.tiny import tiny

FAMILIES = ["llama", "qwen3-moe", "gemma", "gpt2", "bert"]
HARD = [40, 41, 42]
TEXT = torch.tensor([[5, 9, 20, 7], [30, 11, 6, 8]])


def untied(family: str) -> Backbone:
    """Without a shared head, so that a row of the table acts at the input alone."""
    return tiny(family, dtype=torch.float64, tie_word_embeddings=False)


def prompted(base: Backbone, method: Prompt, *values: Tensor) -> Host:
    host = Host(base)
    adapter = host.add("a", method, dtype=torch.float64)
    for value in values:
        adapter.set("input", "prompt", value)
    host.activate("a")
    return host


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_token_embeddings_is_the_hard_prompt(family: str) -> None:
    base = tiny(family, dtype=torch.float64)
    hard = base.module(input_ids=torch.cat([torch.tensor([HARD, HARD]), TEXT], dim=1)).logits[:, 3:]
    host = prompted(base, Prompt(tokens=3, init_ids=HARD))
    soft = host(input_ids=TEXT).logits
    assert soft.shape == hard.shape
    same(soft, hard, 1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_its_gradient_is_that_of_the_hard_tokens_embeddings(family: str) -> None:
    base = untied(family)
    table = base.module.get_input_embeddings().weight  # type: ignore[operator]
    scale = base.sites["input"].scale
    table.requires_grad_(True)
    weights = matrix(2, 4, 128)
    ids = torch.cat([torch.tensor([HARD, HARD]), TEXT], dim=1)
    (base.module(input_ids=ids).logits[:, 3:] * weights).sum().backward()
    expected = table.grad[HARD] / scale
    table.requires_grad_(False)
    host = prompted(base, Prompt(tokens=3, init_ids=HARD))
    (host(input_ids=TEXT).logits * weights).sum().backward()
    same(host.adapter("a").grad.view(3, -1), expected, 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_shifted_past_the_prompt(family: str) -> None:
    base = tiny(family, dtype=torch.float64)
    ids = torch.cat([torch.tensor([HARD, HARD]), TEXT], dim=1)
    hard = base.module(input_ids=ids, labels=torch.cat([torch.full((2, 3), -100), TEXT], dim=1)).loss
    soft = prompted(base, Prompt(tokens=3, init_ids=HARD))(input_ids=TEXT, labels=TEXT).loss
    same(soft, hard, 1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_row(family: str, side: str) -> None:
    host = prompted(tiny(family, dtype=torch.float64), Prompt(tokens=3, init_ids=HARD))
    expected = host(input_ids=TEXT[:1]).logits[0]
    pad, own = torch.zeros(1, 2, dtype=torch.long), TEXT[:1]
    ids = torch.cat([pad, own] if side == "left" else [own, pad], dim=1)
    mask = torch.cat([torch.zeros(1, 2), torch.ones(1, 4)][:: 1 if side == "left" else -1], dim=1).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    y = host(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0]
    same(y[2:] if side == "left" else y[:4], expected, 1e-10)


def test_different_prompts_in_one_batch_are_separate_runs() -> None:
    host = prompted(tiny("llama", dtype=torch.float64), Prompt(tokens=3, init_ids=HARD))
    host.add("b", Prompt(tokens=5, init_from="normal"), dtype=torch.float64)
    with host.rows(["b", "a"]):
        mixed = host(input_ids=TEXT).logits
    for row, name in enumerate(("b", "a")):
        host.activate(name)
        same(mixed[row], host(input_ids=TEXT[row : row + 1]).logits[0], 1e-11)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_decoding_with_a_cache_is_the_whole_forward(family: str) -> None:
    host = prompted(tiny(family, dtype=torch.float64), Prompt(tokens=3, init_ids=HARD))
    whole = host(input_ids=TEXT).logits
    first = host(input_ids=TEXT[:, :2], use_cache=True)
    word = "cache" if "cache" in first else "past_key_values"
    pieces, cache = [first.logits], first[word]
    for step in (2, 3):
        out = host(input_ids=TEXT[:, step : step + 1], use_cache=True, **{word: cache})
        pieces.append(out.logits)
        cache = out[word]
    same(torch.cat(pieces, dim=1), whole, 1e-10)


def test_random_tokens_are_rows_of_the_table_and_noise_has_its_deviation() -> None:
    base = tiny("gemma", dtype=torch.float64)
    table = base.weight("input").matrix().T * base.sites["input"].scale
    values = prompted(base, Prompt(tokens=7)).adapter("a").flat.view(7, -1)
    for row in values:
        assert (table - row).abs().amax(1).min() < 1e-12
    noise = prompted(tiny("gemma"), Prompt(tokens=60, init_from="normal", init_std=0.5)).adapter("a").flat
    assert float(noise.std()) == pytest.approx(0.5, rel=0.06)


def test_few_ids_are_repeated_in_order() -> None:
    base = tiny("llama", dtype=torch.float64)
    values = prompted(base, Prompt(tokens=5, init_ids=(7, 9))).adapter("a").flat.view(5, -1)
    same(values, base.weight("input").matrix().T[[7, 9, 7, 9, 7]])


def test_a_token_outside_the_table_is_refused() -> None:
    with pytest.raises(MethodError, match="Token id 128 of `init_ids` is not in the embedding table, which has 128"):
        prompted(tiny("llama"), Prompt(tokens=1, init_ids=(128,)))


def test_a_mask_with_more_axes_is_refused() -> None:
    host = prompted(tiny("llama"), Prompt(tokens=2))
    with pytest.raises(MethodError, match="2-D attention mask"):
        host(input_ids=TEXT, attention_mask=torch.ones(2, 1, 4, 4))
