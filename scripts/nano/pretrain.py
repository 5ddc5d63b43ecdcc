"""Pre-train nano on CPU cores: resumable, with a warm-up, a stable phase and a decay to zero.

In: the token cache of `prepare`.  Out: checkpoints (model, optimisers, position, schedule) and a log.
The decay starts at a wall-clock time (--stable-until), at a step (--stable-steps) or at once from a given
checkpoint (--decay-from); its length is given or follows from --finish-by.  --resume continues exactly.
Refuses to know: the text sets and the folder that ships.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer
from transformers import Qwen3ForCausalLM

from .model import fresh_model, layer_forward, loss_sum, nano_config
from .prepare import SCRATCH, TokenCache, epoch_rows, row_tensors
from .tokenizer import CONTEXT, VOCAB_SIZE

END_OF_TEXT_ID, TURN_END_ID = 0, 2


@dataclass
class Progress:
    """Everything but the weights and optimisers that a resumed run needs."""

    seed: int
    length: int
    rows: int
    step: int = 0
    epoch: int = 0
    row: int = 0
    tokens: int = 0
    seconds: float = 0.0
    factor: float = 0.0
    decay_left: int = -1
    decay_steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def optimisers(model: Qwen3ForCausalLM, args: argparse.Namespace) -> list[Optimizer]:
    """Muon for the hidden matrices, AdamW for the embedding and the norms."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    table = [model.model.embed_tokens.weight]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": table, "weight_decay": 0.01}, {"params": norms, "weight_decay": 0.0}]
    muon = Muon(hidden, lr=args.muon_lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")
    adam = AdamW(groups, lr=args.adam_lr, betas=(0.9, 0.95), fused=True)
    for optimiser in (muon, adam):
        for group in optimiser.param_groups:
            group["top_lr"] = group["lr"]
    return [muon, adam]


def clock(text: str, now: datetime | None = None) -> float:
    """The HH:MM (UTC) that is nearest to now, as seconds since the epoch: of today, yesterday or tomorrow."""
    hour, minute = map(int, text.split(":"))
    now = now or datetime.now(UTC)
    today = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return min((today + timedelta(days=d) for d in (-1, 0, 1)), key=lambda t: abs(t - now)).timestamp()


def next_factor(progress: Progress, args: argparse.Namespace, rate: float) -> float:
    """The learning-rate factor of this step; starts, and shortens if time is short, the decay."""
    seconds_left = clock(args.finish_by) - time.time() if args.finish_by else None
    if progress.decay_left < 0:
        late = args.stable_until and time.time() >= clock(args.stable_until)
        if args.decay_now or late or (args.stable_steps and progress.step >= args.stable_steps):
            args.decay_now = False
            fitting = int(seconds_left * rate) if seconds_left is not None else progress.step // 5
            progress.decay_left = progress.decay_steps = max(1, args.decay_steps or fitting)
            print(f"decay of {progress.decay_left} steps starts at step {progress.step}", flush=True)
        return min(1.0, (progress.step + 1) / args.warmup)
    if seconds_left is not None and progress.step % 20 == 0:
        progress.decay_left = min(progress.decay_left, max(1, int(seconds_left * rate)))
    return progress.factor * (1 - 1 / progress.decay_left) if progress.decay_left else 0.0


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, cache: TokenCache, length: int, layer_fn: Any, most: int = 0) -> float:
    """Mean loss per predicted token over the validation documents (every k-th of them when `most` is set)."""
    numbers = cache.indices(held=True)
    numbers = numbers[:: max(1, len(numbers) // most)] if most else numbers
    total, count = 0.0, 0
    rows = [[number] for number in sorted(numbers, key=lambda number: len(cache.documents[number]))]
    packed = [list(chain.from_iterable(rows[i : i + 4])) for i in range(0, len(rows), 4)]
    packed = [row for row in packed if sum(len(cache.documents[n]) for n in row) <= length] + [
        [n] for row in packed if sum(len(cache.documents[n]) for n in row) > length for n in row
    ]
    for start in range(0, len(packed), 16):
        batch = packed[start : start + 16]
        batch += [[] for _ in range(16 - len(batch))]
        ids, documents, labels = row_tensors(cache, batch, length)
        total += loss_sum(model, ids, documents, labels, layer_fn).item()
        count += int((labels >= 0).sum())
    return total / count


def save(path: Path, model: Qwen3ForCausalLM, opts: list[Optimizer], progress: Progress) -> None:
    """Write a checkpoint so that a reader never sees half of one."""
    state = {
        "model": model.state_dict(),
        "optimisers": [opt.state_dict() for opt in opts],
        "progress": asdict(progress),
        "rng": torch.get_rng_state(),
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load(path: Path, model: Qwen3ForCausalLM, opts: list[Optimizer]) -> Progress:
    """Read a checkpoint into the model and the optimisers."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for opt, saved in zip(opts, state["optimisers"], strict=True):
        opt.load_state_dict(saved)
    torch.set_rng_state(state["rng"])
    return Progress(**state["progress"])


class Feed:
    """Batches of packed rows, epoch after epoch, from any position."""

    def __init__(self, cache: TokenCache, progress: Progress) -> None:
        self.cache, self.progress = cache, progress
        self.rows = epoch_rows(cache, progress.length, progress.seed, progress.epoch)

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """The next batch; moves the position on."""
        p = self.progress
        if p.row + p.rows > len(self.rows):
            p.epoch, p.row = p.epoch + 1, 0
            self.rows = epoch_rows(self.cache, p.length, p.seed, p.epoch)
        p.row += p.rows
        return row_tensors(self.cache, self.rows[p.row - p.rows : p.row], p.length)


def train_step(model: Qwen3ForCausalLM, opts: list[Optimizer], feed: Feed, factor: float, layer_fn: Any) -> float:
    """One update; returns the mean training loss."""
    ids, documents, labels = feed.next()
    count = int((labels >= 0).sum())
    loss = loss_sum(model, ids, documents, labels, layer_fn) / count
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = group["top_lr"] * factor
        opt.step()
        opt.zero_grad(set_to_none=True)
    feed.progress.tokens += count
    return loss.item()


def run(model: Qwen3ForCausalLM, opts: list[Optimizer], cache: TokenCache, p: Progress, args: Any) -> None:
    """The training loop: step, log, evaluate, checkpoint, until the decay has ended."""
    layer_fn = torch.compile(layer_forward, dynamic=False) if args.compile else layer_forward
    feed, saved, mean, rate = Feed(cache, p), time.time(), 0.0, args.guess_rate
    while p.decay_left != 0:
        start = time.time()
        p.factor = next_factor(p, args, rate)
        loss = train_step(model, opts, feed, p.factor, layer_fn)
        p.decay_left -= p.decay_left > 0
        p.step += 1
        spent = time.time() - start
        p.seconds += spent
        rate = 0.98 * rate + 0.02 / spent if p.step > 20 else rate
        mean = 0.95 * mean + 0.05 * loss if mean else loss
        if p.step % 20 == 0:
            tail = f"lr {p.factor:.3f} epoch {p.epoch} {p.length * p.rows * rate:.0f} tokens/s"
            print(f"step {p.step} loss {mean:.4f} {tail} {p.seconds:.0f} s", flush=True)
        if p.step % args.eval_every == 0:
            score = evaluate(model, cache, p.length, layer_fn, most=160)
            p.history.append({"step": p.step, "tokens": p.tokens, "train": mean, "validation": score})
            print(f"step {p.step} validation {score:.4f} (a sample)", flush=True)
        if time.time() - saved > args.save_minutes * 60 or p.step == args.first_save:
            save(args.checkpoint, model, opts, p)
            saved = time.time()
    save(args.checkpoint, model, opts, p)
    print(json.dumps({"validation": evaluate(model, cache, p.length, layer_fn), "step": p.step}), flush=True)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=SCRATCH / "tokens.npz")
    parser.add_argument("--checkpoint", type=Path, default=SCRATCH / "checkpoint.pt", help="written here")
    parser.add_argument("--resume", action="store_true", help="continue from --checkpoint if it is there")
    parser.add_argument("--decay-from", type=Path, help="start the decay at once from this checkpoint")
    parser.add_argument("--stable-until", help="HH:MM UTC when the decay starts")
    parser.add_argument("--finish-by", help="HH:MM UTC when the decay must have ended")
    parser.add_argument("--stable-steps", type=int, default=0, help="step at which the decay starts")
    parser.add_argument("--decay-steps", type=int, default=0, help="default: what fits, or a fifth of the steps")
    parser.add_argument("--length", type=int, default=512, help="tokens in a row")
    parser.add_argument("--rows", type=int, default=16, help="rows in a step")
    parser.add_argument("--muon-lr", type=float, default=4e-3)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--first-save", type=int, default=20, help="also save after this step")
    parser.add_argument("--guess-rate", type=float, default=0.5, help="steps a second, until measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    if not (args.stable_until or args.stable_steps or args.decay_from):
        parser.error("say when the decay starts: --stable-until, --stable-steps or --decay-from.")
    return args


def main() -> None:
    """Build or load the state and train."""
    args = parse()
    torch.set_num_threads(args.threads)
    cache = TokenCache.load(args.cache)
    model = fresh_model(nano_config(VOCAB_SIZE, CONTEXT, TURN_END_ID, END_OF_TEXT_ID), args.seed)
    opts = optimisers(model, args)
    progress = Progress(seed=args.seed, length=args.length, rows=args.rows)
    source = args.checkpoint if args.resume and args.checkpoint.exists() else args.decay_from
    args.decay_now = source is not None and source == args.decay_from
    if source is not None:
        progress = load(source, model, opts)
    run(model, opts, cache, progress, args)


if __name__ == "__main__":
    main()
