"""What a client does, with whichever tinker SDK Python finds first; prints one JSON document of what came back.

In: TINKER_BASE_URL and TINKER_API_KEY, a base model's name. Out: versions, losses, log-probabilities, listings. Uses
only what every SDK since 0.22 has, and refuses to import Lorica.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import tinker
from tinker import types

TOKENS = [[11, 12, 13, 14, 15, 16, 17, 18], [21, 22, 23, 24, 25], [31, 32, 33]]


def made(client: Any) -> Any:
    """A client, which since 0.38 is first a future of one."""
    return client.result() if hasattr(client, "result") else client


def datum(tokens: list[int], weight: float = 1.0) -> types.Datum:
    """A sequence of which everything after the first token is predicted."""
    inputs: Any = {"target_tokens": tokens[1:], "weights": [weight] * (len(tokens) - 1)}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def train(client: tinker.TrainingClient, steps: int) -> list[float]:
    """`steps` pipelined steps; the loss of each."""
    found = []
    for _ in range(steps):
        passed = client.forward_backward([datum(tokens) for tokens in TOKENS], "cross_entropy")
        stepped = client.optim_step(types.AdamParams(learning_rate=0.01))
        found.append(float(passed.result().metrics["loss:sum"]))
        stepped.result()
    return found


def logprobs(client: tinker.TrainingClient) -> list[float]:
    """The trainer's log-probabilities of the first sequence, without touching gradients."""
    result = client.forward([datum(TOKENS[0])], "cross_entropy").result()
    return [float(value) for value in result.loss_fn_outputs[0]["logprobs"].tolist()]


def squares(data: list[types.Datum], values: list[Any]) -> tuple[Any, dict[str, float]]:
    """A loss of the client's own."""
    loss = sum((value**2).sum() for value in values)
    return loss, {"squares": float(loss)}


def flow(model: str) -> dict[str, Any]:
    """Create, train, save, sample, score, load, list and delete."""
    service = tinker.ServiceClient()
    client = made(service.create_lora_training_client(base_model=model, rank=4, seed=7))
    told: dict[str, Any] = {
        "sdk": tinker.__version__,
        "models": [m.model_name for m in service.get_server_capabilities().supported_models],
        "info": client.get_info().model_data.model_name,
        "rank": client.get_info().lora_rank,
        "losses": train(client, 3),
        "custom": float(client.forward_backward_custom([datum(TOKENS[0])], squares).result().metrics["squares"]),
    }
    client.optim_step(types.AdamParams(learning_rate=0.0)).result()
    told["trainer"] = logprobs(client)
    state = client.save_state("c1").result().path
    sampler = client.save_weights_for_sampler("s1").result().path
    sampling = made(service.create_sampling_client(model_path=sampler))
    prompt = types.ModelInput.from_ints(TOKENS[0])
    wanted = types.SamplingParams(max_tokens=5, temperature=1.0, seed=3, stop=[2])
    answer = sampling.sample(prompt=prompt, num_samples=2, sampling_params=wanted).result()
    told |= {
        "sampler": list(sampling.compute_logprobs(prompt).result())[1:],
        "sequences": [list(sequence.tokens) for sequence in answer.sequences],
        "sampled": [len(sequence.logprobs or []) for sequence in answer.sequences],
        "after": train(client, 1),
    }
    ephemeral = made(client.save_weights_and_get_sampling_client())
    told["ephemeral"] = list(ephemeral.compute_logprobs(prompt).result())[1:]
    continued = made(service.create_training_client_from_state_with_optimizer(state))
    told |= {"loaded": logprobs(continued), "again": train(continued, 1)}
    client.load_state(state).result()
    told["in place"] = logprobs(client)
    return told | listings(service, client, state, sampler)


def listings(service: tinker.ServiceClient, client: Any, state: str, sampler: str) -> dict[str, Any]:
    """What the REST client lists of a run before and after one checkpoint is deleted."""
    rest, run = service.create_rest_client(), state.split("/")[2]
    before = [checkpoint.tinker_path for checkpoint in rest.list_checkpoints(run).result().checkpoints]
    rest.delete_checkpoint_from_tinker_path(sampler).result()
    left = [checkpoint.tinker_path for checkpoint in rest.list_checkpoints(run).result().checkpoints]
    return {
        "run": rest.get_training_run(run).result().base_model,
        "runs": run in [r.training_run_id for r in rest.list_training_runs(limit=100).result().training_runs],
        "state": state,
        "before": before,
        "left": left,
        "weights rank": rest.get_weights_info_by_tinker_path(state).result().lora_rank,
        "user": state in [c.tinker_path for c in rest.list_user_checkpoints(limit=1000).result().checkpoints],
    }


if __name__ == "__main__":
    json.dump(flow(sys.argv[1]), sys.stdout)
