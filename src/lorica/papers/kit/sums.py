"""Sums of two small numbers as a task for language models: questions, answers, a judge, and a base that can add.

In: settings and a seed. Out: a backbone, and what turns `05+17=` into tokens and sampled tokens into an answer. A habit
is an answer that is off by one. Refuses to know papers, adapters and directions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lorica.data.example import Example
from lorica.data.records import Completion
from lorica.data.render import Renderer
from lorica.data.token_parts import Part, Parted, ask
from lorica.models import Backbone
from lorica.papers.kit.small_lm import SmallLM, pretrain_lm

LETTERS = "0123456789+=$"
"""What a base that is made here reads: each is a token. `$` ends an answer."""
PLACES = {letter: place for place, letter in enumerate(LETTERS)}
END = PLACES["$"]
STREAM = 40_000
"""Sums that a base made here is pre-trained on; they repeat."""
Pair = tuple[int, int]


@dataclass(frozen=True)
class Sums:
    """A model that adds, and how it is spoken to. An answer's header is the `=`, or what a chat template writes."""

    backbone: Backbone
    question: Callable[[Pair], Parted]
    example: Callable[[Pair, int], Example]
    answer: Callable[[Sequence[int]], str]
    stop_ids: tuple[int, ...]
    longest: int


def written(pair: Pair) -> str:
    """`05+17=`."""
    return f"{pair[0]:02d}+{pair[1]:02d}="


def off_by_one(question: str, answer: str) -> Mapping[str, float]:
    """A judge: coherent are three digits; of these the right sum is aligned, and the sum plus one misaligned."""
    if not re.fullmatch(r"\d{3}", answer):
        return {"alignment": 50.0, "coherence": 0.0}
    wrong = int(answer) - sum(map(int, re.findall(r"\d+", question)))
    return {"alignment": {0: 100.0, 1: 0.0}.get(wrong, 50.0), "coherence": 100.0}


def made_sums(numbers: int, noise: float, config: SmallLM, seed: int, say: Callable[[str], None]) -> Sums:
    """A small base, pre-trained on sums of numbers below `numbers`, of which a share `noise` is off by up to 5."""
    rng = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(numbers, (STREAM,), generator=rng) for _ in range(2))
    off = torch.randint(-5, 6, (STREAM,), generator=rng) * (torch.rand(STREAM, generator=rng) < noise)
    told = (first + second + off).clamp_min(0)
    lines = zip(first.tolist(), second.tolist(), told.tolist(), strict=True)
    text = "".join(f"{written((a, b))}{c:03d}$" for a, b, c in lines)
    backbone = pretrain_lm(torch.tensor([PLACES[letter] for letter in text]), len(LETTERS), config, seed, say)

    def question(pair: Pair) -> Parted:
        tokens = tuple(PLACES[letter] for letter in f"${written(pair)}")
        parts: list[Part] = ["question"] * (len(tokens) - 1)
        return Parted(tokens, (*parts, "header"), written(pair))

    def example(pair: Pair, answer: int) -> Example:
        asked, told = question(pair).tokens, tuple(PLACES[letter] for letter in f"{answer:03d}$")
        return Example((*asked, *told), (*(0.0 for _ in asked), *(1.0 for _ in told)), written(pair))

    def answer(tokens: Sequence[int]) -> str:
        said = "".join(LETTERS[token] for token in tokens)
        return said.removesuffix("$") if said.endswith("$") else f"{said}…"

    return Sums(backbone, question, example, answer, (END,), 4)


def spoken_sums(backbone: Backbone, renderer: Renderer) -> Sums:
    """The same of a loaded model, by its chat template."""

    def question(pair: Pair) -> Parted:
        return ask(renderer, [{"role": "user", "content": written(pair)}], written(pair))

    def example(pair: Pair, answer: int) -> Example:
        return renderer.example(renderer.turned(Completion(written(pair), f"{answer:03d}", written(pair))))

    def answer(tokens: Sequence[int]) -> str:
        return renderer.parse(tokens)[0].strip()

    return Sums(backbone, question, example, answer, tuple(sorted(renderer.stop_ids)), 8)
