"""Supervised fine-tuning as one flat loop: read it top to bottom, copy it, change it.

In: a model, a data file, a method. Out: an adapter folder. `recipes.sft` is the same program with checkpoints,
evaluation, tracking and resuming. Refuses to know configs.
"""

from __future__ import annotations

import sys

from lorica.adapters.lineage import Data
from lorica.client.local import Service
from lorica.data.packing import Sampler
from lorica.data.records import load_records
from lorica.data.render import Renderer, prepare
from lorica.methods import Method
from lorica.models import load
from lorica.training.optimizer import AdamWConfig


def train(
    model: str, data: str, method: Method, out: str, *, steps: int = 100, batch_size: int = 16, lr: float = 2e-3
) -> float:
    """Fine-tune `model` on `data` and write the adapter to `out`. Returns the mean loss of the last step.

    The loss of a step is `Σ w · −log p / Σ w` over the step's trained tokens. Raises DataError for rows that cannot
    be used.
    """
    backbone = load(model)
    renderer = Renderer(backbone.tokenizer)
    dataset = load_records(data)
    examples = prepare(dataset, renderer, max_length=1024).examples
    batches = Sampler(examples, batch_size=batch_size, seed=0)

    service = Service(backbone)
    client = service.training_client(method, optimizer=AdamWConfig(lr=lr), steps=steps)
    recipe = {"name": "sft_loop", "steps": steps, "batch_size": batch_size, "lr": lr}
    client.note(recipe, Data(dataset.path, dataset.fingerprint, len(examples)))  # what its folder will say of it

    loss = float("nan")
    for step in range(steps):
        batch = [examples[i] for i in next(batches)]
        loss = client.forward_backward(batch).mean
        done = client.optim_step()
        print(f"step {step + 1}/{steps}  loss {loss:.4f}  lr {done.lr:.2e}  grad {done.grad_norm:.3f}", file=sys.stderr)

    client.save(out)
    return loss
