"""Writes the generated splits of the everyday data, or checks what is on disk.

In: the rows of the generator. Out: train.jsonl and test.jsonl in src/lorica/data/everyday; with `--check`, exit code 1
and a sentence for each file that differs, and for each handwritten row that is not in the canonical form.
Run from the repository: `python -m scripts.everyday [--check]`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from scripts.everyday.rows import Row, faults, splits

FOLDER = Path(__file__).resolve().parents[2] / "src" / "lorica" / "data" / "everyday"


def content(rows: Iterable[Row]) -> bytes:
    """The file of a split."""
    return "".join(json.dumps(row.record(), ensure_ascii=False) + "\n" for row in rows).encode()


def read(path: Path) -> list[Row]:
    """The rows of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Row(*(turn["content"] for turn in json.loads(line)["messages"])) for line in lines]


def stale(folder: Path = FOLDER) -> list[str]:
    """A sentence for each thing on disk that is not as it should be."""
    made = splits()
    files = {name: folder / f"{name}.jsonl" for name in (*made, "handwritten")}
    found = [f"{path.name} is missing" for path in files.values() if not path.is_file()]
    if found:
        return found
    for name, rows in made.items():
        if files[name].read_bytes() != content(rows):
            found.append(f"{name}.jsonl differs from what the generator makes; run `python -m scripts.everyday`")
    keys = {row.key for rows in made.values() for row in rows}
    for number, row in enumerate(read(files["handwritten"]), start=1):
        found += [f"handwritten.jsonl:{number}: {fault}" for fault in faults(row.request, row.answer)]
        if row.key in keys:
            found.append(f"handwritten.jsonl:{number}: the request is there already")
        keys.add(row.key)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a file is wrong")
    if parser.parse_args().check:
        found = stale()
        for sentence in found:
            print(f"{sentence}.", file=sys.stderr)
        return 1 if found else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, rows in splits().items():
        (FOLDER / f"{name}.jsonl").write_bytes(content(rows))
        print(f"{FOLDER / name}.jsonl: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
