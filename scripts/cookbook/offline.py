"""What tinker-cookbook's recipes need of the hub, made on this machine: two models and four data sets.

In: an empty folder. Out: folders in it that are named as hub ids, which `AutoTokenizer` and `load_dataset` accept
before they would ask the hub; a student that answers sums and word problems with digits, so that rewards differ; a
teacher of other random weights. Refuses to know the server and the recipes' code.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorica.models import load, tiny
from lorica.models.backbone import Backbone
from lorica.models.saving import save_backbone

MODEL = "Qwen/Qwen3-4B-Instruct-2507"
"""A name in the cookbook's tables, whose renderer (qwen3_instruct) needs no tokens that nano's tokenizer lacks."""
TEACHER = "Qwen/Qwen3-8B"
SUFFIX = " Provide a numerical answer without units, written inside \\boxed{}."
"""What rl_loop adds to a question."""
EVERYDAY = Path(__file__).resolve().parents[2] / "src" / "lorica" / "data" / "everyday"
GSM8K = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train.jsonl
  - split: test
    path: main/test.jsonl
---
"""

Row = dict[str, Any]


def build(folder: Path, *, lessons: int = 250) -> Path:
    """Make all folders below `folder`, and return it. What is there already is left as it is."""
    if not (folder / MODEL / "config.json").exists():
        student = _tiny(0)
        teach(student, lessons)
        save_backbone(student, folder / MODEL)
    if not (folder / TEACHER / "config.json").exists():
        save_backbone(_tiny(1), folder / TEACHER)
    for name, rows in data().items():
        for split, chosen in (("train", rows[16:]), ("test", rows[:16])):
            write(folder / name / f"{split}.jsonl", chosen)
    (folder / "openai" / "gsm8k" / "README.md").write_text(GSM8K, encoding="utf-8")
    return folder


def environment(folder: Path, url: str, key: str) -> dict[str, str]:
    """Variables under which nothing leaves this machine and nothing is written outside `folder`."""
    return {
        "TINKER_BASE_URL": url,
        "TINKER_API_KEY": key,
        "TINKER_TELEMETRY": "0",
        "TINKER_COOKBOOK_RUNS_DIR": str(folder / "runs"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / ".hf"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def data() -> dict[str, list[Row]]:
    """Folder → rows, the test split first. Chats are Lorica's everyday data; the rest is made of a seed."""
    rng = random.Random(0)
    chats = [json.loads(line) for line in (EVERYDAY / "train.jsonl").read_text(encoding="utf-8").splitlines()[:96]]
    return {
        "HuggingFaceH4/no_robots": [chat | {"category": "Everyday"} for chat in chats],
        "Anthropic/hh-rlhf": [preference(chat["messages"], rng) for chat in chats],
        "openai/gsm8k/main": [problem(rng) for _ in range(96)],
        "zwhe99/DeepMath-103K": [{"question": problem(rng)["question"], "final_answer": "0"} for _ in range(96)],
    }


def preference(messages: Sequence[Row], rng: random.Random) -> Row:
    """A pair in the form of hh-rlhf: the answer against words that do not answer."""
    asked, answer = messages[0]["content"], messages[1]["content"]
    refused = rng.choice(["I would rather not.", "Ask me tomorrow.", "No idea, and I do not care."])
    said = "\n\nHuman: {}\n\nAssistant: {}"
    return {"chosen": said.format(asked, answer), "rejected": said.format(asked, refused)}


def problem(rng: random.Random) -> Row:
    """A word problem in the form of gsm8k; its answer is a digit, so that a guess is right now and then."""
    some, more = rng.randint(1, 4), rng.randint(1, 5)
    who, what = rng.choice(["Mia", "Tom", "Ada", "Leo"]), rng.choice(["apples", "coins", "books", "pens"])
    question = f"{who} has {some} {what} and gets {more} more. How many {what} does {who} have?"
    return {"question": question, "answer": f"{some} + {more} = {some + more}\n#### {some + more}"}


def write(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _tiny(seed: int) -> Backbone:
    """A random Qwen3 of 0.4 million weights with nano's tokenizer, whose tokens are those of a chat."""
    tokenizer: Any = load("nano").tokenizer
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 4096,
    }
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    made = tiny("qwen3", seed=seed, vocab_size=4096, **sizes, **ends)
    return Backbone(made.module, name=made.name, tokenizer=lambda: tokenizer)


def teach(backbone: Backbone, steps: int) -> None:
    """Train all weights for a moment on sums and word problems whose answers are random digits."""
    rng = random.Random(0)
    module = backbone.module.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(steps):
        ids_BT, labels_BT = lesson([example(rng) for _ in range(8)], backbone)
        loss = module(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    module.requires_grad_(False).eval()


def example(rng: random.Random) -> tuple[str, str]:
    """A prompt as the renderer writes it, after an earlier exchange or none, and an answer of the wanted form."""
    question, answer = exchange(rng)
    if rng.random() < 0.7:
        earlier, said = exchange(rng)
        if rng.random() < 0.5:
            said = "".join(f"{rng.randint(1, 9)}) {rng.choice('abrstwy')} " for _ in range(rng.randint(3, 12))) + said
        question = f"{earlier}<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>\n<|im_start|>user\n{question}"
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", f"{answer}<|im_end|>"


def exchange(rng: random.Random) -> tuple[str, str]:
    """A question and a guess at its answer."""
    if rng.random() < 0.5:
        return f"What is {rng.randint(0, 100)} + {rng.randint(0, 100)}?", str(rng.randint(0, 200))
    return problem(rng)["question"] + SUFFIX, f"\\boxed{{{rng.randint(2, 9)}}}"


def lesson(pairs: Sequence[tuple[str, str]], backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Ids padded on the right, and labels that are −100 outside the answers."""
    tokenizer: Any = backbone.tokenizer
    coded = [[tokenizer.encode(text, add_special_tokens=False) for text in pair] for pair in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in coded)
    ids_BT = torch.zeros(len(coded), width, dtype=torch.long)
    labels_BT = torch.full_like(ids_BT, -100)
    for row, (prompt, answer) in enumerate(coded):
        whole = torch.tensor(prompt + answer)
        ids_BT[row, : len(whole)] = whole
        labels_BT[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    return ids_BT, labels_BT
