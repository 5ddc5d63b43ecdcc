"""Tokens become text one by one exactly as all at once; stop strings cut exactly, wherever tokens end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

import lorica
from lorica.core.errors import DataError, FormatError, MissingError
from lorica.data.render import Renderer
from lorica.server.text import Pieces, Reader, StopFinder, Text, overlap
from lorica.server.tokenizer import FileTokenizer

NANO = Path(lorica.__file__).parent / "models" / "nano"
TEXT = Text(str(NANO))
SIZE = TEXT.tokenizer.fast.get_vocab_size()


def llama():
    """A small tokenizer that decodes as Llama's does: ▁ for a blank, bytes where the vocabulary ends."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hello", "▁world", "!", "é", "▁▁a"]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def stream(pieces, tokens, *, opens):
    reader = Reader(pieces, opens=opens)
    parts = [reader.feed(token) for token in tokens]
    return [*parts, reader.finish()]


@given(st.lists(st.integers(0, SIZE - 1), max_size=30))
def test_any_tokens_read_one_by_one_give_the_text_that_the_tokenizer_gives(tokens):
    assert "".join(stream(TEXT.pieces, tokens, opens=True)) == TEXT.tokenizer.decode(tokens)


@given(st.text(max_size=40))
def test_any_text_survives_its_tokens_and_no_part_of_a_character_is_shown(text):
    tokens = TEXT.tokenizer.encode(text)
    parts = stream(TEXT.pieces, tokens, opens=True)
    assert "".join(parts) == text
    assert not any("�" in part for part in parts) or "�" in text


def test_the_bytes_of_a_character_wait_for_each_other():
    tokens = TEXT.tokenizer.encode("😀")
    assert len(tokens) > 1
    assert stream(TEXT.pieces, tokens, opens=False) == ["", *[""] * (len(tokens) - 2), "😀", ""]
    assert stream(TEXT.pieces, tokens[:-1], opens=False)[-1] == "�"
    assert [TEXT.pieces.spell(token) for token in tokens] == ["bytes:\\xf0\\x9f", "bytes:\\x98", "bytes:\\x80"]


def test_a_text_opens_without_the_blank_that_its_tokenizer_adds_and_goes_on_with_it():
    tokenizer = llama()
    pieces = Pieces(tokenizer)
    tokens = [tokenizer.token_to_id(word) for word in ("▁Hello", "▁world", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "!")]
    assert "".join(stream(pieces, tokens, opens=True)) == tokenizer.decode(tokens) == "Hello world😀!"
    assert "".join(stream(pieces, tokens[1:], opens=False)) == " world😀!"
    two = [tokenizer.token_to_id(word) for word in ("▁▁a", "▁world")]
    assert "".join(stream(pieces, two, opens=True)) == tokenizer.decode(two) == " a world"


def test_a_decoder_that_looks_ahead_is_refused_by_name():
    tokenizer = llama()
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(DataError, match="'WordPiece'"):
        Pieces(tokenizer)


@given(st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=20))
def test_offsets_say_where_each_token_begins(tokens):
    text, offsets = TEXT.read(tokens)
    assert len(offsets) == len(tokens)
    for token, begin in zip(tokens, offsets, strict=True):
        piece = TEXT.pieces.spell(token)
        assert piece.startswith("bytes:") or text[begin:].startswith(piece) or "�" in text


def _divided(text, cuts):
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    return [text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _found(parts, stops):
    finder = StopFinder(stops)
    shown = [finder.feed(part) for part in parts]
    return "".join([*shown, finder.finish()]), finder.found


@given(
    st.text("ab\n", max_size=20),
    st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(0, 20), max_size=8),
)
def test_a_stop_string_cuts_at_the_same_place_however_the_text_is_divided(text, stops, cuts):
    whole = _found(list(text), stops)
    assert _found(_divided(text, cuts), stops) == whole
    shown, found = whole
    assert found == any(stop in text for stop in stops)
    assert text.startswith(shown)
    if not found:
        assert shown == text
    else:
        assert any(text.startswith(stop, len(shown)) for stop in stops)
        assert not any(stop in shown for stop in stops)


def test_text_is_held_back_only_while_it_may_begin_a_stop_string():
    finder = StopFinder(["\n\nQ:", "END"])
    assert [finder.feed(part) for part in ("one\n", "\ntwo", " E", "Nd", "\n\nQ", ":", "more")] == [
        "one",
        "\n\ntwo",
        " ",
        "ENd",
        "",
        "",
        "",
    ]
    assert finder.found
    assert finder.finish() == ""
    assert overlap("abc", ["cab"]) == 1
    assert overlap("abc", ["xyz"]) == 0


MESSAGES = (
    [{"role": "user", "content": "Hi, who are you?"}],
    [
        {"role": "system", "content": "Be brief. ☃"},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B\n"},
        {"role": "user", "content": "C"},
    ],
)


@pytest.mark.parametrize("messages", MESSAGES)
def test_a_conversation_has_the_tokens_that_transformers_gives_it(messages):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(NANO)
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert TEXT.renderer.prompt(messages) == list(wanted) == Renderer(theirs).prompt(messages)
    assert TEXT.renderer.stop_ids == Renderer(theirs).stop_ids
    assert TEXT.renderer.prompt("Once upon") == Renderer(theirs).prompt("Once upon")


GENERAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}\n"
    "  {% generation %}<|im_start|>{{ m.role }}: {{ m | tojson }}<|im_end|>{% endgeneration %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>{{ strftime_now('%Y') }}{% endif %}"
)


def _copy(directory, **config):
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        (directory / name).write_bytes((NANO / name).read_bytes())
    known = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**known, **config}))
    return directory


def test_templates_may_use_all_that_transformers_offers_them(tmp_path):
    from transformers import AutoTokenizer

    _copy(tmp_path, bos_token={"content": "<|endoftext|>"}, chat_template=[{"name": "default", "template": GENERAL}])
    (tmp_path / "chat_template.jinja").unlink()
    ours = FileTokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(NANO, bos_token="<|endoftext|>")
    messages = [{"role": "user", "content": "é <b>"}, {"role": "tool", "content": "x"}]
    wanted = theirs.apply_chat_template(messages, chat_template=GENERAL, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(messages, add_generation_prompt=True) == wanted
    assert ours.bos_token_id == 0


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path):
    _copy(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(DataError, match="no chat template|refuses"):
        Text(str(tmp_path)).renderer.prompt([{"role": "user", "content": "x"}])


def test_what_is_no_tokenizer_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(MissingError, match="no tokenizer.json"):
        Text(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match="cannot be read"):
        Text(str(tmp_path))
    with pytest.raises(DataError, match="surrogate"):
        TEXT.tokenizer.encode("\ud800")


def test_text_needs_neither_torch_nor_transformers():
    program = (
        "import sys; from lorica.server.text import text_of; "
        f"text_of({str(NANO)!r}).renderer.prompt([dict(role='user', content='x')]); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
