"""Copying exercises made of the words of the text sets: what a small model does not learn from so little text.

In: first names, and sentences of the other sets. Out: short conversations that ask to repeat, quote, pick or list words
that stand in the request. The same each time. Refuses to know: tokens, the model, where the words come from.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence

REPEAT = (
    "Repeat: {}",
    "Say this again: {}",
    "Copy these words.\n{}",
    "Write the same words once more: {}",
    "{}\nRepeat that.",
)
QUOTE = ("Put this in quotes: {}", "Quote these words: {}", "{}\nNow with quotation marks.")
LIST = ("Write these as a JSON list: {}", "Make a JSON list of {}", "{}\nAs a JSON list, please.")
OBJECT = ("Make a JSON object: {}", "Write as JSON: {}", "{}\nAs JSON.")
ASK = ("{}\nWhat is the {}?", "{}\nTell me the {}.", "Read this and give the {1}.\n{0}")
AFTER = ("{}\nWhich word comes after {}?", "{}\nWhat follows {}?")
FIELDS = (
    *("name", "friend", "town", "place", "item", "word", "song", "title", "topic", "animal", "colour", "number"),
    *("day", "time", "street", "food", "job", "answer", "message", "subject"),
)

Exercise = Callable[["Words", random.Random], tuple[str, str]]


class Words:
    """What exercises are made of: names, runs of words, numbers."""

    def __init__(self, names: Sequence[str], sentences: Sequence[str]) -> None:
        self.names = list(names)
        self.sentences = [found for s in sentences if len(found := re.findall(r"[A-Za-z']+", s)) > 4]

    def run(self, rng: random.Random, most: int) -> str:
        """Up to `most` neighbouring words of a sentence."""
        sentence = rng.choice(self.sentences)
        count = rng.randint(1, min(most, len(sentence)))
        start = rng.randint(0, len(sentence) - count)
        return " ".join(sentence[start : start + count])

    def thing(self, rng: random.Random) -> str:
        """A name, a few words, or a number; often in lower case."""
        kind = rng.random()
        if kind < 0.15:
            return str(rng.randint(0, 9999))
        found = rng.choice(self.names) if kind < 0.5 else self.run(rng, 3)
        return found.lower() if rng.random() < 0.5 else found


def repeat(words: Words, rng: random.Random) -> tuple[str, str]:
    """The same words again; sometimes twice."""
    text = words.run(rng, 14) if rng.random() < 0.6 else " ".join(words.thing(rng) for _ in range(rng.randint(2, 9)))
    if rng.random() < 0.2:
        return f"Say this twice: {text}", f"{text}\n{text}"
    return rng.choice(REPEAT).format(text), text


def quote(words: Words, rng: random.Random) -> tuple[str, str]:
    text = words.run(rng, 8)
    return rng.choice(QUOTE).format(text), f'"{text}"'


def make_list(words: Words, rng: random.Random) -> tuple[str, str]:
    things = [words.thing(rng) for _ in range(rng.randint(2, 5))]
    return rng.choice(LIST).format(", ".join(things)), json.dumps(things)


def make_object(words: Words, rng: random.Random) -> tuple[str, str]:
    fields = {field: words.thing(rng) for field in rng.sample(FIELDS, rng.randint(1, 4))}
    said = rng.choice((", ", "; ")).join(f"{field} {value}" for field, value in fields.items())
    return rng.choice(OBJECT).format(said), json.dumps(fields)


def ask(words: Words, rng: random.Random) -> tuple[str, str]:
    """One of several fields."""
    fields = {field: words.thing(rng) for field in rng.sample(FIELDS, rng.randint(2, 5))}
    wanted = rng.choice(list(fields))
    said = "\n".join(f"{field}: {value}" for field, value in fields.items())
    if rng.random() < 0.5:
        said = ". ".join(f"The {field} is {value}" for field, value in fields.items()) + "."
    return rng.choice(ASK).format(said, wanted), fields[wanted]


def after(words: Words, rng: random.Random) -> tuple[str, str]:
    """The neighbour of a word in a list without repetitions."""
    things = rng.sample(words.names, rng.randint(3, 8))
    place = rng.randrange(len(things) - 1)
    return rng.choice(AFTER).format(", ".join(things), things[place]), things[place + 1]


EXERCISES: tuple[tuple[Exercise, float], ...] = (
    (repeat, 4.0),
    (quote, 1.0),
    (make_list, 1.0),
    (make_object, 2.0),
    (ask, 2.0),
    (after, 1.0),
)


def exercises(words: Words, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Requests and answers."""
    rng = random.Random(seed)
    makers, weights = zip(*EXERCISES, strict=True)
    for _ in range(count):
        (maker,) = rng.choices(makers, weights)
        yield maker(words, rng)
