"""lm-evaluation-harness, unmodified, against a real server; run where `lm_eval` is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lorica
from lorica.data.example import Example
from lorica.engine.engine import Engine, Item
from lorica.engine.host import Host

NANO = Path(lorica.__file__).parent / "models" / "nano"
ROWS = [
    {"question": "The sky is", "choices": ["blue", "a small cat", "was"], "answer": 0},
    {"question": "Once upon a time there was a little", "choices": ["girl", "of", "running away"], "answer": 0},
    {"question": "Snow is cold and", "choices": ["white", "hot", "☃ 😀"], "answer": 0},
]
CHOOSE = {
    "task": "tiny_choice",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}
WRITE = {
    "task": "tiny_write",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["\n", ".", "!", "?"], "max_gen_toks": 12, "temperature": 0.0, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture(scope="module")
def samples(server, tmp_path_factory):
    """What the harness logged of every row, by task."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed; pip install 'lm_eval[api]' and these tests run")
    folder = tmp_path_factory.mktemp("lm_eval")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for task in (CHOOSE, WRITE):
        task = {**task, "dataset_kwargs": {"data_files": {"test": str(rows)}}}
        (folder / f"{task['task']}.yaml").write_text(json.dumps(task))  # JSON is YAML
    arguments = f"model=nano,base_url={server.url}/v1/completions,tokenizer={NANO},tokenizer_backend=huggingface"
    words = ["--model", "local-completions", "--model_args", f"{arguments},num_concurrent=4,max_retries=1"]
    words += ["--tasks", "tiny_choice,tiny_write", "--include_path", str(folder), "--log_samples"]
    home = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *words, "--output_path", str(folder / "out")],
        env={**os.environ, **home, "OPENAI_API_KEY": server.key, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logged = {}
    for file in (folder / "out").rglob("samples_*.jsonl"):
        task = "tiny_choice" if "tiny_choice" in file.name else "tiny_write"
        logged[task] = [json.loads(line) for line in file.read_text().splitlines()]
    return logged


@pytest.mark.slow
def test_loglikelihoods_are_the_trainers(samples):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(NANO)
    engine = Engine(Host(lorica.load("nano")))
    assert len(samples["tiny_choice"]) == len(ROWS)
    for sample in samples["tiny_choice"]:
        question = sample["doc"]["question"]
        for choice, answered in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            asked, whole = tokenizer.encode(question), tokenizer.encode(f"{question} {choice}")
            (result,) = engine.forward([Item(Example.whole(whole), None)])
            assert float(answered[0]) == pytest.approx(float(sum(result.logprobs[len(asked) - 1 :])), abs=1e-3)


@pytest.mark.slow
def test_generated_text_ends_before_its_stop(samples):
    texts = [sample["filtered_resps"][0] for sample in samples["tiny_write"]]
    assert len(texts) == len(ROWS)
    assert all(text and not set(text) & set("\n.!?") for text in texts)
