"""tinker-cookbook's recipes, unmodified, from their own command lines, against `lorica serve`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from scripts.cookbook.offline import MODEL, TEACHER, environment
from scripts.cookbook.served import QUIET, Served

pytestmark = pytest.mark.slow

RECIPES = {
    "supervised loop": ("sl_loop", "batch_size=8 max_steps=4 save_every=2", "train_mean_nll"),
    "supervised": (
        "chat_sl.train",
        "batch_size=8 max_steps=4 max_length=256 save_every=2 eval_every=2 rolling_save_every=1",
        "train_mean_nll",
    ),
    "reinforcement loop": (
        "rl_loop",
        "batch_size=4 group_size=8 max_steps=3 save_every=2 max_tokens=12",
        "grad_norm:mean",
    ),
    "reinforcement": (
        "math_rl.train",
        "env=arithmetic loss_fn=importance_sampling groups_per_batch=4 group_size=8 max_tokens=3 max_steps=3 "
        "save_every=2 eval_every=0 compute_post_kl=True",
        "kl_pre_post_v1",
    ),
    "reinforcement off policy": (
        "math_rl.train",
        "env=gsm8k loss_fn=ppo groups_per_batch=4 group_size=8 max_tokens=12 max_steps=3 save_every=2 eval_every=0 "
        "num_substeps=2 max_steps_off_policy=1",
        "optim/entropy",
    ),
    "reinforcement streamed": (
        "math_rl.train",
        "env=arithmetic loss_fn=cispo groups_per_batch=4 group_size=8 max_tokens=3 max_steps=3 save_every=2 "
        "eval_every=0 stream_minibatch_config.groups_per_batch=4 stream_minibatch_config.num_minibatches=2",
        "optim/entropy",
    ),
    "preference": ("preference.dpo.train", "batch_size=8 max_steps=3 max_length=256", "dpo_loss"),
    "distillation": (
        "distillation.on_policy_distillation",
        f"teacher_model={TEACHER} loss_fn=importance_sampling groups_per_batch=4 group_size=2 max_tokens=12 "
        "max_steps=3 save_every=2 eval_every=0",
        "teacher_kl",
    ),
}
"""Name → module below `tinker_cookbook.recipes`, its arguments, and the metric that must be finite and move.

No reward: a mean of 32 coarse ones is often the same three times, whatever the policy learnt. Of sums, three tokens cut
about half of the answers short, so that each group has rewards that differ, and each step a gradient.
"""


def run(python: str, folder: Path, served: Served, module: str, arguments: str, logs: Path) -> None:
    """Run one recipe; fails with the end of what it said."""
    command = [python, "-m", f"tinker_cookbook.recipes.{module}", f"model_name={MODEL}", f"log_path={logs}"]
    variables = os.environ | QUIET | environment(folder, served.url, served.key)
    done = subprocess.run(
        [*command, *arguments.split()],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, f"{module} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}"


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def series(metrics: list[dict[str, Any]], name: str) -> list[float]:
    """All values of a metric in the order of steps."""
    return [float(row[name]) for row in metrics if name in row]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_unmodified(name: str, python: str, folder: Path, served: Served, tmp_path: Path) -> None:
    module, arguments, moving = RECIPES[name]
    logs = tmp_path / "logs"
    rank = "" if module == "preference.dpo.train" else "lora_rank=4"
    run(python, folder, served, module, f"{arguments} {rank} learning_rate=0.003", logs)
    metrics = lines(logs / "metrics.jsonl")
    numbers = {key: value for row in metrics for key, value in row.items() if isinstance(value, float)}
    assert {key: value for key, value in numbers.items() if not math.isfinite(value)} == {}
    values = series(metrics, moving)
    assert len(values) >= 2, f"{moving} is not often enough among {sorted(numbers)}"
    assert len(set(values)) > 1, f"{moving} stands still: {values}"
    if name != "preference":  # which logs no norm
        assert any(norm > 0 for norm in series(metrics, "grad_norm:mean")), "no step had a gradient"
    if name != "reinforcement off policy":
        # what the sampler said of its tokens is what the trainer says of them
        assert all(abs(kl) < 1e-4 for kl in series(metrics, "optim/kl_sample_train_v1"))
    saved = lines(logs / "checkpoints.jsonl")
    assert saved[-1]["name"] == "final"
    paths = {row[key] for row in saved for key in ("state_path", "sampler_path") if key in row}
    listed = paths & stored(served)
    # a rolling checkpoint, which a recipe deletes when it has a newer one, is saved at odd steps here
    assert paths - listed == {path for path in paths if path.endswith(("/weights/000001", "/weights/000003"))}


def stored(served: Served) -> set[str]:
    """Paths of all checkpoints that the key owns."""
    request = urllib.request.Request(f"{served.url}/api/v1/checkpoints?limit=1000", headers={"X-API-Key": served.key})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return {checkpoint["tinker_path"] for checkpoint in json.load(answer)["checkpoints"]}


def test_a_supervised_loop_continues_from_its_checkpoint(
    python: str, folder: Path, served: Served, tmp_path: Path
) -> None:
    logs, fixed = tmp_path / "logs", "batch_size=8 lora_rank=4 save_every=2 learning_rate=0.003"
    run(python, folder, served, "sl_loop", f"{fixed} max_steps=3", logs)
    checkpoints = logs / "checkpoints.jsonl"
    first, *_ = checkpoints.read_text(encoding="utf-8").splitlines(keepends=True)
    checkpoints.write_text(first, encoding="utf-8")  # as if it had been killed after that
    run(python, folder, served, "sl_loop", f"{fixed} max_steps=4", logs)
    metrics = lines(logs / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 2, 3]
    # forward, backward and, by the next step, the optimiser's moments: nothing differs from a run without the kill
    assert metrics[2]["train_mean_nll"] == metrics[3]["train_mean_nll"]
    assert metrics[2]["grad_norm:mean"] == metrics[3]["grad_norm:mean"]


def test_distillation_learns_from_a_teacher_adapter(python: str, folder: Path, served: Served, tmp_path: Path) -> None:
    """A teacher that is a checkpoint: sampled through `/samplers` and `model_path`."""
    first, logs = tmp_path / "teacher", tmp_path / "logs"
    run(python, folder, served, "sl_loop", "batch_size=8 max_steps=2 lora_rank=4 learning_rate=0.01", first)
    path = next(row["sampler_path"] for row in lines(first / "checkpoints.jsonl") if row.get("sampler_path"))
    module, arguments, metric = RECIPES["distillation"]
    same_base = arguments.replace(f"teacher_model={TEACHER}", f"teacher_model={MODEL}")
    run(python, folder, served, module, f"{same_base} teacher_checkpoint={path} lora_rank=4", logs)
    values = series(lines(logs / "metrics.jsonl"), metric)
    assert values and all(math.isfinite(value) for value in values)
