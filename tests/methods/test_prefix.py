"""Prefix tuning: identities of its specification, with grouped keys."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorica.core.update import PrefixKV
from lorica.engine.host import Host
from lorica.methods.prefix import Prefix
from lorica.models import Backbone
from tests.methods.one import matrix, same
from tests.tiny import tiny

WORDS = torch.tensor([[40, 41, 42], [40, 41, 42]])
TEXT = torch.tensor([[5, 9, 20, 7], [30, 11, 6, 8]])
DECODERS = ["llama", "qwen3", "qwen3-moe", "gemma", "gemma2", "gpt2"]


def prefixed(base: Backbone, tables: list[Tensor] | None = None, *, tokens: int = 3, **fields: object) -> Host:
    """A host with one prefix; a table is [P, 2 · kv heads · head dim] for each attention site."""
    host = Host(base)
    adapter = host.add("a", Prefix(tokens=tokens, **fields), dtype=torch.float64)  # type: ignore[arg-type]
    for site, table in zip(adapter.layout.sites, tables or [], strict=False):
        adapter.set(site, "prefix", table)
    host.activate("a")
    return host


def tables_of(base: Backbone, seed: int = 0, tokens: int = 3) -> list[Tensor]:
    sites = [s for s in base.sites.values() if s.kind == "attention"]
    return [matrix(tokens, 2 * s.shape[0] * s.shape[1], seed=seed + i) for i, s in enumerate(sites)]


@pytest.mark.parametrize("family", DECODERS)
def test_a_prefix_of_real_words_keys_and_values_is_those_words(family: str) -> None:
    base = tiny(family, dtype=torch.float64)
    hard = base.module(input_ids=torch.cat([WORDS, TEXT], dim=1)).logits[:, 3:]
    out = base.module(input_ids=WORDS[:1], use_cache=True)
    cache = out["cache"] if "cache" in out else out["past_key_values"]
    tables = [
        torch.stack([layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)], dim=1).reshape(3, -1)
        for layer in cache.layers
    ]
    host = prefixed(base, tables)
    same(host(input_ids=TEXT).logits, hard, 1e-6)  # rotations are in float32


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_attention_is_a_mixture_of_text_and_prefix(family: str) -> None:
    """`(1 − λ) Attn(q, K_x, V_x) + λ Attn(q, K_P, V_P)` with λ the prefix's share of the softmax."""
    from lorica.engine.attention import attend_with_prefix

    base = tiny(family, dtype=torch.float64)
    site = next(s for s in base.sites.values() if s.kind == "attention")
    kv, width = site.shape
    heads, groups = site.query_heads, site.query_heads // kv
    q, k, v = matrix(heads, 4, width), matrix(kv, 4, width, seed=1), matrix(kv, 4, width, seed=2)
    pk, pv = matrix(3, kv, width, seed=3), matrix(3, kv, width, seed=4)
    module = base.module_of(site.name)
    causal = family in ("llama", "gpt2")
    y = attend_with_prefix(module, q, k, v, None, [PrefixKV(pk, pv)], scaling=width**-0.5)
    score_x = q @ k.repeat_interleave(groups, 0).transpose(1, 2) / math.sqrt(width)
    if causal:
        score_x = score_x.masked_fill(~torch.ones(4, 4, dtype=torch.bool).tril(), -torch.inf)
    score_p = q @ pk.transpose(0, 1).repeat_interleave(groups, 0).transpose(1, 2) / math.sqrt(width)
    z_x, z_p = score_x.exp().sum(-1, keepdim=True), score_p.exp().sum(-1, keepdim=True)
    share = z_p / (z_p + z_x)
    mixed = (1 - share) * (score_x.softmax(-1) @ v.repeat_interleave(groups, 0))
    mixed = mixed + share * (score_p.softmax(-1) @ pv.transpose(0, 1).repeat_interleave(groups, 0))
    same(y, mixed.transpose(0, 1), 1e-12)


def test_a_prefix_of_zeros_shrinks_attention_by_z_over_z_plus_p() -> None:
    from lorica.engine.attention import attend_with_prefix

    module = tiny("llama", dtype=torch.float64).module_of("model.layers.0.self_attn")
    q, k, v, zero = matrix(2, 4, 8), matrix(2, 4, 8, seed=1), matrix(2, 4, 8, seed=2), torch.zeros(5, 2, 8).double()
    with_zeros = attend_with_prefix(module, q, k, v, None, [PrefixKV(zero, zero)], scaling=1.0)
    alone = attend_with_prefix(module, q, k, v, None, [], scaling=1.0)
    scores = (q @ k.transpose(1, 2)).masked_fill(~torch.ones(4, 4, dtype=torch.bool).tril(), -torch.inf)
    z = scores.exp().sum(-1).T[..., None]
    same(with_zeros, alone * z / (z + 5), 1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_slots_may_be_permuted_differently_at_every_site(family: str) -> None:
    base = tiny(family, dtype=torch.float64)
    tables = tables_of(base, tokens=4)
    shuffled = [t[torch.randperm(4, generator=torch.Generator().manual_seed(i))] for i, t in enumerate(tables)]
    given = {"pixel_values": matrix(2, 3, 32, 32)} if family == "vit" else {"input_ids": TEXT}
    one = prefixed(base, tables, tokens=4)(**given).logits
    two = prefixed(tiny(family, dtype=torch.float64), shuffled, tokens=4)(**given).logits
    same(one, two, 1e-11)


def test_doubling_every_slot_adds_log_two_to_its_scores() -> None:
    from lorica.engine.attention import attend_with_prefix

    module = tiny("llama", dtype=torch.float64).module_of("model.layers.0.self_attn")
    q, k, v = matrix(2, 1, 8), matrix(2, 4, 8, seed=1), matrix(2, 4, 8, seed=2)
    pk, pv = matrix(3, 2, 8, seed=3), matrix(3, 2, 8, seed=4)
    twice = PrefixKV(torch.cat([pk, pk]), torch.cat([pv, pv]))
    y = attend_with_prefix(module, q, k, v, None, [twice], scaling=1.0)
    scores = q @ torch.cat([k, pk.transpose(0, 1)], dim=1).transpose(1, 2)
    scores[..., 4:] += math.log(2)
    expected = scores.softmax(-1) @ torch.cat([v, pv.transpose(0, 1)], dim=1)
    same(y, expected.transpose(0, 1), 1e-12)


@pytest.mark.parametrize("family", DECODERS)
def test_decoding_with_a_cache_is_the_whole_forward(family: str) -> None:
    base = tiny(family, dtype=torch.float64)
    host = prefixed(base, tables_of(base))
    whole = host(input_ids=TEXT).logits
    first = host(input_ids=TEXT[:, :2], use_cache=True)
    word = "cache" if "cache" in first else "past_key_values"
    pieces, cache = [first.logits], first[word]
    for step in (2, 3):
        out = host(input_ids=TEXT[:, step : step + 1], use_cache=True, **{word: cache})
        pieces.append(out.logits)
        cache = out[word]
    same(torch.cat(pieces, dim=1), whole, 1e-10)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_padding_does_not_change_a_row(family: str) -> None:
    base = tiny(family, dtype=torch.float64)
    host = prefixed(base, tables_of(base))
    expected = host(input_ids=TEXT[:1]).logits[0]
    ids = torch.cat([TEXT[:1], torch.zeros(1, 2, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    same(host(input_ids=ids, attention_mask=mask).logits[0, :4], expected, 1e-10)


def test_folding_the_mlp_into_its_table_changes_no_output() -> None:
    base = tiny("llama", dtype=torch.float64)
    host = prefixed(base, projection=True, hidden=8)
    y = host(input_ids=TEXT).logits
    adapter = host.adapter("a")
    method = adapter.method
    assert isinstance(method, Prefix)
    tables = [method.table({**adapter.tensors(""), **adapter.tensors(site)}) for site in adapter.layout.sites]
    assert all(t.shape == (3, 2 * 2 * 16) for t in tables)
    same(prefixed(tiny("llama", dtype=torch.float64), tables)(input_ids=TEXT).logits, y, 1e-11)


def test_a_prefix_has_as_many_heads_as_the_keys_not_as_the_queries() -> None:
    base = tiny("llama", dtype=torch.float64)  # 4 query heads, 2 kv heads of 16
    assert prefixed(base).adapter("a").layout.trainable_count() == 3 * 2 * 2 * (2 * 16)


def test_slots_start_different_so_that_they_do_not_stay_equal() -> None:
    base = tiny("llama", dtype=torch.float64)
    adapter = prefixed(base, init_std=0.3, tokens=50).adapter("a")
    values = adapter.tensors(next(iter(adapter.layout.sites)))["prefix"]
    assert values.unique(dim=0).shape[0] == 50
    assert float(values.detach().std()) == pytest.approx(0.3, rel=0.06)


def test_rows_of_different_prefix_lengths_share_a_batch_with_the_base() -> None:
    base = tiny("llama", dtype=torch.float64)
    host = prefixed(base, tables_of(base))
    host.add("long", Prefix(tokens=6), dtype=torch.float64)
    ids = torch.cat([TEXT, TEXT])
    with host.rows(["long", None, "a", ["a", "long"]]):
        mixed = host(input_ids=ids).logits
    for row, names in enumerate((("long",), (), ("a",), ("a", "long"))):
        host.activate(*names)
        same(mixed[row], host(input_ids=ids[row : row + 1]).logits[0], 1e-11)
