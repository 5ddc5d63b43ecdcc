"""Make the working directory of offline.py at the path given, and say how to run a recipe in it."""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.cookbook.offline import MODEL, TEACHER, build, environment


def main() -> None:
    """Build, and print the two commands."""
    parser = argparse.ArgumentParser(prog="python -m scripts.cookbook", description=__doc__)
    parser.add_argument("folder", type=Path, help="made if it is missing")
    folder = build(parser.parse_args().folder.resolve())
    said = " ".join(f"{key}={value}" for key, value in environment(folder, "http://127.0.0.1:PORT", "tml-KEY").items())
    print(f"cd {folder}\nlorica serve --model {MODEL} --model {TEACHER}")
    print(f"{said} python -m tinker_cookbook.recipes.sl_loop model_name={MODEL} batch_size=8 max_steps=4")


if __name__ == "__main__":
    main()
