"""The language model that is made for an experiment learns its stream, stretches, and its attention is counted."""

from __future__ import annotations

import pytest
import torch

from lorica.client.local import Service
from lorica.core.errors import ConfigError, DataError
from lorica.data.example import Example
from lorica.models.shifted_attention import Shifted
from lorica.papers.kit.flops import attention_flops
from lorica.papers.kit.small_lm import SmallLM, copy_of, pretrain_lm
from lorica.papers.kit.text import TextArena, stream

CONFIG = SmallLM(width=16, layers=1, context=12, steps=60, batch_size=8, lr=2e-2)
STREAM = torch.arange(600) % 7


def silent(text):
    pass


@pytest.fixture(scope="module")
def base():
    return pretrain_lm(STREAM, 7, CONFIG, 0, silent)


def loss(service, tokens):
    example = Example.whole(tokens)
    (found,) = service.sampling_client(None).logprobs([example])
    return found.loss / example.trained


def test_it_learns_its_stream_and_is_frozen_after(base):
    assert loss(Service(copy_of(base, 7, CONFIG)), STREAM[:13].tolist()) < 0.5
    assert not any(parameter.requires_grad for parameter in base.module.parameters())


def test_a_seed_gives_the_same_model_and_another_one_another(base):
    again, other = (pretrain_lm(STREAM, 7, CONFIG.replace(steps=3), seed, silent) for seed in (0, 1))
    same = pretrain_lm(STREAM, 7, CONFIG.replace(steps=3), 0, silent)
    assert again.fingerprint() == same.fingerprint() != other.fingerprint()


def test_a_copy_is_the_same_model_and_a_stretched_one_reads_divided_positions(base):
    plain, wide = (copy_of(base, 7, CONFIG, position_scale=scale) for scale in (1.0, 4.0))
    ids = STREAM[None, :12]
    places = torch.arange(12)[None]
    assert torch.equal(plain.module(input_ids=ids).logits, base.module(input_ids=ids).logits)
    stretched = wide.module(input_ids=ids, position_ids=4 * places).logits
    torch.testing.assert_close(stretched, base.module(input_ids=ids).logits)
    assert not torch.allclose(wide.module(input_ids=ids).logits, stretched, atol=1e-3)


def test_a_stream_that_is_shorter_than_a_window_is_refused():
    with pytest.raises(DataError, match="12 tokens; a window takes 12"):
        pretrain_lm(STREAM[:12], 7, CONFIG, 0, silent)


def test_attention_in_groups_of_a_quarter_has_a_quarter_of_the_arithmetic(base):
    """Squares, masked halves too: 4 (S/4)² of S² in unshifted heads, 3 (S/4)² + 2 (S/8)² in shifted ones."""
    service = Service(copy_of(base, 7, CONFIG))
    length = 256
    dense = attention_flops(service, length)
    heads, size, products = 4, CONFIG.width // 4, 6  # two products forward and four backward
    assert dense == CONFIG.layers * products * 2 * heads * size * length**2
    service.host.set_attention(Shifted(ratio=0.25))
    share = (4 / 16 + (3 / 16 + 2 / 64)) / 2
    assert attention_flops(service, length) == share * dense
    assert not service.host.adapters


def test_texts_become_one_run_of_tokens_with_lines_between():
    class Letters:
        chat_template = bos_token_id = eos_token_id = added_tokens_decoder = None

        def encode(self, text, **options):
            assert options == {"add_special_tokens": False}
            return [ord(letter) for letter in text]

    assert stream(Letters(), ["ab", "c"]) == [97, 98, 10, 99, 10]


def test_an_arena_that_answers_needs_a_renderer(base):
    with pytest.raises(ConfigError, match="Answers need a renderer"):
        TextArena(base, None, {}, batch_size=1, exact=3)
