"""Measure the model that ships and write its card.

In: the folder that ships, the token cache and the checkpoint that it came from. Out: validation loss by source,
answers to a few prompts, and with --write the card beside the weights and in docs/. Refuses to know how the weights
were made.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from .corpus import EXERCISE_COUNT, MADE, SOURCES
from .prepare import MODEL_DIR, SCRATCH, TokenCache
from .tokenizer import CONTEXT

PAGE = Path(__file__).parents[2] / "docs" / "nano.md"
PROMPTS = (
    "What is the capital of France?",
    "Repeat: the small grey dog ran over the wet bridge",
    "The name is Ottilie. The town is Bath. The item is lamp.\nWhat is the town?",
    "Tom has 3 apples. He buys 4 more. How many apples does he have now?",
    "Is this review positive or negative? The film was dull, and I left before the end.",
    "Write a sentence with the words dog, ball, park.",
)
TEXTS = ("First Citizen:\n", "Once upon a time")
CARD = """\
# nano

A causal language model of {parameters} million parameters that ships with Lorica, so that every example, test and
benchmark has a real model without a download. Qwen3 architecture: 6 layers of width 256, 4 heads on 2 key-value heads
of width 64, tied embeddings, bfloat16. Its tokenizer is a byte-level BPE of 4096 tokens, digits apart, with a chat
template; its context is {context} tokens, and it was trained on rows of 512. It loads as any other model does:
`lorica.load("nano")`.

## What it can do, and what not

It writes English that is locally plausible, keeps to the form of a conversation, and copies words of a request when it
is asked in one of the ways of its exercises. It is a base for small fine-tuning tasks. It knows next to nothing: facts,
arithmetic and reasoning are wrong more often than right, and long texts wander. It was trained on public text as it
was, without any filter or alignment, so it may say something unpleasant. Use it to try and test software, and for
nothing else.

## Data

The English of T0's training mixture (`t0_templates`, Apache-2.0; the underlying sets keep their terms), the training
part of GSM8K (MIT), SVAMP (MIT), first names (makemore, MIT), Tiny Shakespeare (public domain), and {exercises}
copying exercises that `scripts/nano/exercises.py` makes of their words. Rows of one underlying text share a split, and
training rows that share text with held-out ones are dropped (`scripts/nano/corpus.py`).

## Training

{steps} steps of 8,192 tokens, {tokens} million of them trained, on two CPU cores: Muon for the matrices and AdamW for
the rest, at a constant rate, and a linear decay to zero over the last {decay} steps. The exercises joined after step
{joined}; the commands below have them from the start.

```sh
python -m scripts.nano.prepare
python -m scripts.nano.pretrain --stable-steps {stable} --decay-steps {decay_steps}   # --resume goes on after a stop
python -m scripts.nano.export
python -m scripts.nano.report --write
```

## Held-out loss

| source | documents | tokens | nats a token | bits a byte |
| --- | --- | --- | --- | --- |
{scores}

## Greedy answers, unedited

| prompt | answer |
| --- | --- |
{answers}
"""


@dataclass(frozen=True)
class Score:
    """Validation loss in nats a token, and in bits a byte."""

    documents: int
    tokens: int
    loss: float
    bits_per_byte: float


@torch.no_grad()
def score(model: Any, cache: TokenCache, source: int) -> Score:
    """Over all held-out documents of one source, each alone."""
    total, tokens, size = 0.0, 0, 0
    numbers = [i for i in cache.indices(held=True) if cache.source[i] == source]
    for number in numbers:
        ids = torch.from_numpy(cache.documents[number][:CONTEXT].astype("int64"))[None]
        logits = model(input_ids=ids[:, :-1]).logits[0].float()
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
        size += int(cache.size[number])
    return Score(len(numbers), tokens, total / tokens, total / size / math.log(2))


def answer(model: Any, tokenizer: Any, prompt: str, *, chat: bool) -> str:
    """The greedy continuation."""
    if chat:
        messages = [{"role": "user", "content": prompt}]
        given = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        given = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**given, max_new_tokens=48, do_sample=False)[0, given["input_ids"].shape[1] :]
    return str(tokenizer.decode(made, skip_special_tokens=True)).strip()


def card(scores: dict[str, Score], history: dict[str, Any], parameters: int, answers: dict[str, str]) -> str:
    """The model card."""
    rows = [f"| {n} | {s.documents} | {s.tokens:,} | {s.loss:.3f} | {s.bits_per_byte:.3f} |" for n, s in scores.items()]
    return CARD.format(
        parameters=f"{parameters / 1e6:.1f}",
        context=CONTEXT,
        steps=f"{history['step']:,}",
        tokens=f"{history['tokens'] / 1e6:.1f}",
        decay=f"{history['decay_steps']:,}",
        joined=f"{history['joined']:,}",
        exercises=f"{EXERCISE_COUNT:,}",
        stable=history["step"] - history["decay_steps"],
        decay_steps=history["decay_steps"],
        scores="\n".join(rows),
        answers="\n".join(f"| {_cell(prompt)} | {_cell(said)} |" for prompt, said in answers.items()),
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ⏎ ")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, default=MODEL_DIR)
    parser.add_argument("--cache", type=Path, default=SCRATCH / "tokens.npz")
    parser.add_argument("--checkpoint", type=Path, default=SCRATCH / "checkpoint.pt", help="whose steps are reported")
    parser.add_argument("--joined", type=int, default=0, help="step after which the exercises were in the data")
    parser.add_argument("--write", action="store_true", help="write README.md, and docs/nano.md with the same text")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model_dir)
    cache = TokenCache.load(args.cache)
    scores = {name: score(model, cache, code) for code, name in enumerate((*SOURCES, MADE))}
    answers = {p: answer(model, tokenizer, p, chat=True) for p in PROMPTS}
    answers |= {p: answer(model, tokenizer, p, chat=False) for p in TEXTS}
    history = torch.load(args.checkpoint, weights_only=True)["progress"] | {"joined": args.joined}
    text = card(scores, history, sum(p.numel() for p in model.parameters()), answers)
    print(text)
    if args.write:
        for path in (args.model_dir / "README.md", PAGE):
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
