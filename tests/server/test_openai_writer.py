"""A sample's text and tokens, as they may be shown while it is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorica
from lorica.server.openai.writer import Writer
from lorica.server.text import Text

TEXT = Text(str(Path(lorica.__file__).parent / "models" / "nano"))
END = 2


def ids(text):
    return TEXT.tokenizer.encode(text)


def parts(writer, tokens, *, taking):
    """What is shown while tokens come one by one, asked after each or only in the end."""
    shown = []
    for token in tokens:
        writer.feed([token], [-1.0])
        if taking:
            shown.append(writer.take())
    writer.finish()
    return [*shown, writer.take()]


def whole(writer, tokens, *, taking=True):
    found = parts(writer, tokens, taking=taking)
    return "".join(p.text for p in found), [said for p in found for said in p.tokens], found[-1].reason


@given(st.text(max_size=30), st.booleans())
def test_a_sample_is_its_text_without_the_end_token_and_all_its_tokens(text, taking):
    tokens = [*ids(text), END]
    said, told, reason = whole(Writer(TEXT, [], [END]), [*tokens, *ids("never")], taking=taking)
    assert (said, reason) == (TEXT.tokenizer.decode(tokens[:-1]), "stop")
    assert [one.token for one in told] == tokens
    assert told[-1].offset == len(said)


def test_a_sample_that_nothing_ended_has_reached_its_length():
    assert whole(Writer(TEXT, ["zzz"], [END]), ids("a zz"))[::2] == ("a zz", "length")


@given(st.text("abc \n", max_size=30), st.lists(st.text("abc \n", min_size=1, max_size=3), min_size=1, max_size=4))
def test_asking_often_changes_neither_text_nor_reason(text, stops):
    often = whole(Writer(TEXT, stops, [END]), ids(text), taking=True)
    once = whole(Writer(TEXT, stops, [END]), ids(text), taking=False)
    assert often[::2] == once[::2]
    assert [(o.token, o.offset) for o in often[1]] == [(o.token, o.offset) for o in once[1]]
    assert (often[2] == "stop") == any(stop in text for stop in stops)


def test_what_was_shown_is_never_taken_back():
    found = parts(Writer(TEXT, [" end."], [END]), ids("The end of an end. More"), taking=True)
    assert "".join(part.text for part in found) == "The end of an"
    assert found[-1].reason == "stop"


def test_tokens_of_a_stop_string_are_told_and_begin_where_the_text_ends():
    said, told, _ = whole(Writer(TEXT, [" stop"], [END], begin=10), ids("Go stop now"))
    assert said == "Go"
    assert "".join(TEXT.pieces.spell(one.token) for one in told) == "Go stop"
    assert [one.offset for one in told] == [min(10 + "Go stop".index(TEXT.pieces.spell(o.token)), 12) for o in told]


def test_a_character_in_halves_is_shown_when_it_is_whole_or_never_will_be():
    tokens = ids("😀")
    found = parts(Writer(TEXT, [], [END]), tokens, taking=True)
    assert [part.text for part in found] == [*[""] * (len(tokens) - 1), "😀", ""]
    assert [one.offset for part in found for one in part.tokens] == [0] * len(tokens)
    assert whole(Writer(TEXT, [], [END]), tokens[:1])[0] == "�"


@pytest.mark.parametrize(
    ("turn", "text", "ended", "wanted"),
    [
        ((" ", " "), " Hello you ", True, "Hello you"),
        ((" ", " "), " Hello you ", False, "Hello you "),
        ((" ", " "), "Hello", True, "Hello"),
        (("<think>\n", "\n\n"), "<think>\nyes\n\n\n", True, "yes\n"),
        (("<think>\n", ""), "<thin", False, "<thin"),
        (("", ""), " x ", True, " x "),
    ],
)
def test_what_the_template_puts_around_the_words_is_taken_away(turn, text, ended, wanted):
    tokens = [*ids(text), *([END] if ended else [])]
    assert whole(Writer(TEXT, [], [END], turn=turn), tokens)[0] == wanted
