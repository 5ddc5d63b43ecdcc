"""Make the token cache: documents to token ids, and token ids to packed rows.

In: the documents of `corpus` and a tokenizer (trained here if the folder has none).
Out: one .npz with all token ids, document ends, sources and splits; rows packed from whole documents.
Refuses to know: the model, the optimiser, the schedule.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .corpus import DATA_DIR, MADE, SOURCES, Document, read_documents
from .tokenizer import END_OF_TEXT, render_chat, save_tokenizer, train_tokenizer

MODEL_DIR = Path(__file__).resolve().parents[2] / "src" / "lorica" / "models" / "nano"
SCRATCH = Path(__file__).resolve().parents[3] / "nano-scratch"


def as_text(document: Document) -> str:
    """The exact text of a document; plain text ends with the end-of-text token, a conversation with its turn."""
    return render_chat(document.messages) if document.messages else document.text + END_OF_TEXT


def build_cache(data: Path, model_dir: Path, cache: Path) -> None:
    """Train the tokenizer if needed, encode every document, write the cache."""
    documents = read_documents(data)
    texts = [as_text(document) for document in documents]
    path = model_dir / "tokenizer.json"
    if not path.exists():
        chosen = (t for t, d in zip(texts, documents, strict=True) if d.split == "train")
        save_tokenizer(train_tokenizer(chosen), model_dir)
    tokenizer = Tokenizer.from_file(str(path))
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    cache.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        cache,
        ids=np.concatenate([np.asarray(ids, dtype=np.int32) for ids in encoded]),
        ends=np.cumsum([len(ids) for ids in encoded]),
        source=np.asarray([(*SOURCES, MADE).index(document.source) for document in documents]),
        held=np.asarray([document.split == "validation" for document in documents]),
        size=np.asarray([len(text.encode()) for text in texts]),
    )


@dataclass
class TokenCache:
    """Token ids of every document, and which documents are held out."""

    documents: list[np.ndarray]
    source: np.ndarray
    held: np.ndarray
    size: np.ndarray

    @classmethod
    def load(cls, path: Path) -> TokenCache:
        """Read what `build_cache` wrote."""
        if not path.exists():
            raise SystemExit(f"There is no token cache at {path}: run `python -m scripts.nano.prepare` first.")
        data = np.load(path)
        return cls(np.split(data["ids"], data["ends"][:-1]), data["source"], data["held"], data["size"])

    def indices(self, held: bool) -> list[int]:
        """Numbers of the training or the validation documents."""
        return [int(i) for i in np.flatnonzero(self.held == held)]


def pack(documents: list[np.ndarray], order: list[int], length: int, open_rows: int = 64) -> list[list[int]]:
    """Fill rows of `length` tokens with whole documents: best fit into the currently open rows.

    A document longer than a row is cut at the row's end when it is used.
    """
    done: list[list[int]] = []
    rows: list[list[int]] = []
    room: list[int] = []
    for number in order:
        need = min(len(documents[number]), length)
        best = min((i for i in range(len(rows)) if room[i] >= need), key=room.__getitem__, default=-1)
        if best < 0:
            if len(rows) == open_rows:
                full = min(range(len(rows)), key=room.__getitem__)
                done.append(rows.pop(full))
                room.pop(full)
            rows.append([])
            room.append(length)
            best = len(rows) - 1
        rows[best].append(number)
        room[best] -= need
    return done + rows


def epoch_rows(cache: TokenCache, length: int, seed: int, epoch: int) -> list[list[int]]:
    """The packed rows of one epoch; the same for the same seed and epoch."""
    rng = random.Random(seed * 100_003 + epoch)
    order = cache.indices(held=False)
    rng.shuffle(order)
    rows = pack(cache.documents, order, length)
    rng.shuffle(rows)
    return rows


def row_tensors(cache: TokenCache, rows: list[list[int]], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, document numbers within the row, and shifted labels (-100: nothing to predict)."""
    ids = np.zeros((len(rows), length), dtype=np.int64)
    documents = np.full((len(rows), length), -1, dtype=np.int64)
    labels = np.full((len(rows), length), -100, dtype=np.int64)
    for r, row in enumerate(rows):
        at = 0
        for place, number in enumerate(row):
            tokens = cache.documents[number][:length]
            end = at + len(tokens)
            ids[r, at:end], documents[r, at:end] = tokens, place
            labels[r, at : end - 1] = tokens[1:]
            at = end
    return torch.from_numpy(ids), torch.from_numpy(documents), torch.from_numpy(labels)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA_DIR)
    parser.add_argument("--model-dir", type=Path, default=MODEL_DIR)
    parser.add_argument("--cache", type=Path, default=SCRATCH / "tokens.npz")
    args = parser.parse_args()
    build_cache(args.data, args.model_dir, args.cache)
    cache = TokenCache.load(args.cache)
    for held in (False, True):
        numbers = cache.indices(held)
        for code, name in enumerate((*SOURCES, MADE)):
            tokens = [len(cache.documents[i]) for i in numbers if cache.source[i] == code]
            print(f"{'validation' if held else 'train':10} {name:16} {len(tokens):6} documents {sum(tokens):9} tokens")


if __name__ == "__main__":
    main()
