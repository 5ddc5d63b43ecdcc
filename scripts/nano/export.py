"""Turn a checkpoint into the folder that ships: bfloat16 weights, configuration, tokenizer.

In: a checkpoint of `pretrain` (or none: fresh weights) and the tokenizer already in the folder.
Out: config.json, generation_config.json, model.safetensors beside the tokenizer files; at most 12 MB in all.
Refuses to know: the training data and how the weights were made.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3ForCausalLM

from .model import fresh_model, nano_config
from .prepare import MODEL_DIR, SCRATCH
from .pretrain import END_OF_TEXT_ID, TURN_END_ID
from .tokenizer import CONTEXT, END_OF_TEXT, TURN_END, VOCAB_SIZE

MOST_BYTES = 12_000_000
ROUND_TRIP = ('{"name": "Zoë", "n": 1234, "ok": true}', "naïve 日本語 🙂\t\n  don't", " leading and  double  blanks ")


def read_model(checkpoint: Path | None) -> Qwen3ForCausalLM:
    """The model of a checkpoint, or fresh weights."""
    model = fresh_model(nano_config(VOCAB_SIZE, CONTEXT, TURN_END_ID, END_OF_TEXT_ID), seed=7)
    if checkpoint is not None:
        if not checkpoint.exists():
            raise SystemExit(f"There is no checkpoint at {checkpoint}: run `python -m scripts.nano.pretrain` first.")
        model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    return model


def write_model(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Write weights and configurations."""
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=128,
        eos_token_id=[TURN_END_ID, END_OF_TEXT_ID],
        pad_token_id=END_OF_TEXT_ID,
    )
    model.save_pretrained(folder)


def check(folder: Path) -> None:
    """Load the folder as anyone would and look at what must hold."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size <= MOST_BYTES, f"{folder} holds {size} bytes, more than {MOST_BYTES}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ROUND_TRIP:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text, text
    assert len(tokenizer("2026")["input_ids"]) == 4
    assert (tokenizer.eos_token, tokenizer.pad_token) == (TURN_END, END_OF_TEXT)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    messages = [{"role": "user", "content": "What is 3 plus 4?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = model.generate(**ids)[0, ids["input_ids"].shape[1] :]
    count = sum(p.numel() for p in model.parameters())
    print(f"{size} bytes, {count} parameters, {type(model).__name__}, {type(tokenizer).__name__}")
    print("greedy reply:", repr(tokenizer.decode(reply)))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=SCRATCH / "checkpoint.pt")
    parser.add_argument("--fresh", action="store_true", help="export random weights")
    parser.add_argument("--model-dir", type=Path, default=MODEL_DIR)
    args = parser.parse_args()
    write_model(read_model(None if args.fresh else args.checkpoint), args.model_dir)
    check(args.model_dir)


if __name__ == "__main__":
    main()
