"""Read the public text sets and turn them into documents with a train / validation split.

In: the folder ../shared/data (t0_templates, gsm8k, svamp, names, tinyshakespeare).
Out: `Document`s, chat conversations or plain text, each with its source and its split.
One underlying text appears in up to a dozen templates: rows of one number share a split, and training rows
that still share text with a validation row are dropped.
Refuses to know: tokens, the model, the training.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .exercises import Words, exercises

DATA_DIR = Path(__file__).resolve().parents[3] / "shared" / "data"
SOURCES = ("t0_templates", "gsm8k", "svamp", "names", "tinyshakespeare")
MADE = "exercises"
EXERCISE_COUNT = 14_000
SEED = 20
VALIDATION_SHARE = 0.02
CHAT_CHARS = 1500  # a conversation longer than this becomes plain text pieces
PIECE_CHARS = 1300
GROUP_CHARS = 3500  # of conversations about one underlying text
FAMILY_WORDS = {"adversarial": 3, "duorc": 2, "glue": 2, "wiki": 2}  # words of a file name that name the set
SYSTEM_SHARE = 0.1
SYSTEM_LINES = (
    "You are a helpful assistant.",
    "Answer the user.",
    "Do what the user asks.",
    "You are a careful assistant. Keep your answers short.",
)
COMMON_WORDS = frozenset(
    re.findall(
        r"\w+",
        "the a an and or of to in on at for with is are was were be been it he she they i you we this that "
        "not have has had as by from what which who how his her their my your but if will can do does ",
    )
)


@dataclass(frozen=True)
class Document:
    """One training document: `messages` for a conversation, `text` for plain text."""

    source: str
    split: str
    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Row:
    """One row of a template file: its underlying text, its split, its prompt and completion."""

    group: tuple[str, int]
    split: str
    pair: tuple[str, str]


def require_data(root: Path) -> None:
    """Stop with one clear sentence where the data is not there."""
    missing = [name for name in SOURCES if not (root / name).is_dir()]
    if missing:
        raise SystemExit(f"nano is trained on {root}, and these folders are missing there: {', '.join(missing)}.")


def split_of(key: str) -> str:
    """Assign a document key to train or validation, always the same way."""
    digest = hashlib.sha256(f"{SEED}:{key}".encode()).digest()
    return "validation" if int.from_bytes(digest[:4], "big") / 2**32 < VALIDATION_SHARE else "train"


def is_english(text: str) -> bool:
    """Cheap test: nearly all ASCII and, in longer texts, enough of the commonest English words."""
    if not text or sum(ch.isascii() for ch in text) < 0.97 * len(text):
        return False
    words = re.findall(r"[a-z']+", text.lower())
    return len(words) < 25 or sum(word in COMMON_WORDS for word in words) > 0.15 * len(words)


def tidy(text: str) -> str:
    """Normalise line ends and runs of blanks without touching the words."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ")
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def pieces(text: str, limit: int = PIECE_CHARS) -> Iterator[str]:
    """Cut a long text into pieces of at most about `limit` characters at line or sentence ends."""
    piece = ""
    for part in re.split(r"(?<=[.!?]) |(?<=\n)", text):
        if piece and len(piece) + len(part) + 1 > limit:
            yield piece.strip()
            piece = ""
        piece += part if not piece or piece.endswith("\n") else " " + part
    if piece.strip():
        yield piece.strip()[: 2 * limit]


def chat(source: str, split: str, prompt: str, answer: str, rng: random.Random) -> Document:
    """A conversation of one turn; a small share of them carries a system message."""
    turns = [("user", prompt), ("assistant", answer)]
    if rng.random() < SYSTEM_SHARE:
        turns.insert(0, ("system", rng.choice(SYSTEM_LINES)))
    return Document(source, split, messages=tuple(turns))


def shingles(text: str, width: int = 8) -> set[int]:
    """Hashes of all runs of `width` words."""
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[i : i + width])) for i in range(len(words) - width + 1)}


def drop_leaks(rows: list[Row], most: int = 60, share: float = 0.25) -> list[Row]:
    """Drop training rows that share over a quarter of their rare word runs with a validation row.

    A run that occurs in more than `most` rows belongs to a template, not to an underlying text.
    """
    runs = [shingles(" ".join(row.pair)) for row in rows]
    counts = Counter(run for found in runs for run in found)
    rare = [{run for run in found if counts[run] <= most} for found in runs]
    held = {run for row, found in zip(rows, rare, strict=True) if row.split == "validation" for run in found}
    return [
        row
        for row, found in zip(rows, rare, strict=True)
        if row.split == "validation" or len(found & held) <= share * len(found)
    ]


def t0_rows(folder: Path) -> list[Row]:
    """Rows of all templates.  Row i of every template of one set renders (nearly always) the same text i."""
    rows: list[Row] = []
    seen: set[tuple[str, str]] = set()
    for path in sorted(folder.glob("*.jsonl")):
        words = path.stem.split("_")
        family = "_".join(words[: FAMILY_WORDS.get(words[0], 1)])
        for index, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            row = json.loads(line)
            pair = (tidy(row["prompt"]), tidy(row["completion"].replace("<|endoftext|>", "")))
            if all(pair) and pair not in seen and is_english(" ".join(pair)):
                seen.add(pair)
                rows.append(Row((family, index), split_of(f"row:{index}"), pair))
    return drop_leaks(rows)


def t0_documents(folder: Path) -> Iterator[Document]:
    """Conversations from the short rows, capped per underlying text; plain pieces from the long ones."""
    rng = random.Random(SEED)
    groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in t0_rows(folder):
        groups[row.group].append(row)
    for group in groups.values():
        rng.shuffle(group)
        kept, budget = 0, GROUP_CHARS
        for row in group:
            size = sum(map(len, row.pair))
            if size <= min(CHAT_CHARS, budget):
                kept, budget = kept + 1, budget - size
                yield chat("t0_templates", row.split, *row.pair, rng)
        if not kept:
            longest = max(group, key=lambda row: sum(map(len, row.pair)))
            for piece in pieces("\n\n".join(longest.pair)):
                yield Document("t0_templates", longest.split, text=piece)


def gsm8k_documents(folder: Path) -> Iterator[Document]:
    """The training part only; calculator marks are removed, the last line stays `#### answer`."""
    rng = random.Random(SEED + 1)
    for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answer = re.sub(r"<<[^>]*>>", "", row["answer"])
        yield chat("gsm8k", split_of(row["question"]), tidy(row["question"]), tidy(answer), rng)


def svamp_documents(folder: Path) -> Iterator[Document]:
    """Body and question as the prompt; equation and result as the answer."""
    rng = random.Random(SEED + 2)
    for row in json.loads((folder / "SVAMP.json").read_text(encoding="utf-8")):
        body = row["Body"].strip()
        body += "" if body.endswith((".", "?", "!", ",")) else "."
        equation = re.sub(r"^\( (.*) \)$", r"\1", row["Equation"].replace(".0 ", " "))
        prompt = tidy(f"{body} {row['Question']}")
        yield chat("svamp", split_of(row["Body"]), prompt, f"{equation} = {row['Answer']:g}", rng)


def names_documents(folder: Path, length: int = 40) -> Iterator[Document]:
    """Lists of first names, one a line, with a capital letter."""
    names = [name.capitalize() for name in (folder / "names.txt").read_text(encoding="utf-8").split()]
    random.Random(SEED + 3).shuffle(names)
    for start in range(0, len(names), length):
        yield Document("names", split_of(f"names:{start}"), text="\n".join(names[start : start + length]))


def shakespeare_documents(folder: Path) -> Iterator[Document]:
    """Runs of speeches."""
    text = tidy((folder / "input.txt").read_text(encoding="utf-8"))
    piece = ""
    for number, speech in enumerate(text.split("\n\n")):
        piece = f"{piece}\n\n{speech}" if piece else speech
        if len(piece) > PIECE_CHARS - 300:
            yield Document("tinyshakespeare", split_of(f"plays:{number}"), text=piece)
            piece = ""
    if piece:
        yield Document("tinyshakespeare", "train", text=piece)


def exercise_documents(folder: Path, others: list[Document]) -> Iterator[Document]:
    """Copying exercises over first names and the sentences of the other sources' training documents."""
    names = [name.capitalize() for name in (folder / "names.txt").read_text(encoding="utf-8").split()]
    texts = [d.text or " ".join(content for _, content in d.messages) for d in others if d.split == "train"]
    sentences = [s for text in texts[::3] for s in re.split(r"[.!?\n]", text) if 20 < len(s) < 160]
    rng = random.Random(SEED + 4)
    for prompt, answer in exercises(Words(names, sentences), EXERCISE_COUNT, SEED + 5):
        yield chat(MADE, split_of(f"{MADE}:{prompt}"), prompt, answer, rng)


def read_documents(root: Path = DATA_DIR) -> list[Document]:
    """All documents of all sources, in a fixed order, and the exercises made of them."""
    require_data(root)
    documents = [
        *t0_documents(root / "t0_templates"),
        *gsm8k_documents(root / "gsm8k"),
        *svamp_documents(root / "svamp"),
        *names_documents(root / "names"),
        *shakespeare_documents(root / "tinyshakespeare"),
    ]
    return [*documents, *exercise_documents(root / "names", documents)]
