"""Sampling a mixed batch greedily is taking each row's likeliest token from the plain model, one row at a time."""

from __future__ import annotations

import pytest
import torch

from lorica.engine.sample import generate
from lorica.sampling.params import SamplingParams
from tests.contract.cases import DEVICE, logits
from tests.contract.test_packed_batches import every_causal, residents

STEPS = 4


@every_causal
def test_a_mixed_batch_of_every_method_samples_what_each_row_alone_does(family: str) -> None:
    host, owners = residents(family, head=False)
    prompts = [[5 + i, 9, 20 + i, 7, 30][: 1 + i % 5] for i in range(len(owners))]
    samples = generate(host, list(zip(prompts, owners, strict=True)), SamplingParams(max_tokens=STEPS))
    for prompt, owner, sample in zip(prompts, owners, samples, strict=True):
        assert len(sample.tokens) == STEPS and not sample.stopped
        ids = torch.tensor([[*prompt, *sample.tokens]], device=DEVICE)
        with host.rows([owner]), torch.no_grad():
            expected = logits(host.model(input_ids=ids[:, :-1]))[0, len(prompt) - 1 :].log_softmax(-1)
        assert expected.argmax(-1).tolist() == list(sample.tokens)
        assert sample.logprobs == pytest.approx(expected.max(-1).values.tolist(), rel=1e-5)
