"""A small language model made for an experiment: a Llama of a few layers, pre-trained on a stream of tokens.

In: tokens, sizes, a seed. Out: a backbone, and the same one with its positions stretched. It is trained plainly, all
weights, as a base is; adapters come later. Refuses to know tokenizers, papers and methods.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn

from lorica.core.config import Config
from lorica.core.errors import DataError
from lorica.models import Backbone, tiny

MADE = "made here"
"""The name of such a model, where a setting may name any other instead."""


class SmallLM(Config):
    """What the model is and how it is pre-trained."""

    width: int = Field(64, ge=8, multiple_of=8, description="width; four heads")
    layers: int = Field(3, ge=1, description="blocks")
    context: int = Field(64, ge=8, description="tokens of a pre-training sequence")
    steps: int = Field(400, ge=1, description="pre-training steps, AdamW with cosine on all weights")
    batch_size: int = Field(32, ge=1, description="sequences of one step")
    lr: float = Field(4e-3, gt=0, description="peak learning rate of pre-training")


def pretrain_lm(tokens: Tensor, vocabulary: int, config: SmallLM, seed: int, say: Callable[[str], None]) -> Backbone:
    """A Llama with random weights from `seed`, trained on windows of the stream. Raises DataError for a short one."""
    if len(tokens) <= config.context:
        raise DataError(f"The stream has {len(tokens)} tokens; a window takes {config.context} and the one after it.")
    backbone = _made(vocabulary, config, seed)
    module = backbone.module.requires_grad_(True)
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.lr, weight_decay=0.01)
    warm = max(1, config.steps // 20)
    plan = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, 1.0, warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, config.steps - warm)),
        ],
        [warm],
    )
    loss = torch.tensor(0.0)
    for _ in range(config.steps):
        starts_B = torch.randint(len(tokens) - config.context, (config.batch_size,), generator=rng)
        ids_BT = tokens[starts_B[:, None] + torch.arange(config.context + 1)]
        logits_BTV = module(input_ids=ids_BT[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        plan.step()
    say(f"seed {seed}: base pre-trained on {len(tokens):,} tokens, {config.steps} steps, loss {loss.item():.3f}")
    return copy_of(backbone, vocabulary, config)


def copy_of(backbone: Backbone, vocabulary: int, config: SmallLM, *, position_scale: float = 1.0) -> Backbone:
    """A frozen copy of a model made here, its rotary positions divided by `position_scale`."""
    copied = _made(vocabulary, config, 0, position_scale=position_scale)
    copied.module.load_state_dict(backbone.module.state_dict())
    return copied


def _made(vocabulary: int, config: SmallLM, seed: int, position_scale: float = 1.0) -> Backbone:
    return tiny(
        "llama",
        seed=seed,
        vocab_size=vocabulary,
        hidden_size=config.width,
        intermediate_size=5 * config.width // 2,
        num_hidden_layers=config.layers,
        num_key_value_heads=4,
        head_dim=config.width // 4,
        max_position_embeddings=config.context,
        position_scale=position_scale,
    )
