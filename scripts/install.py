"""Make `.venv` and install this checkout into it: with the CPU build of torch where there is no GPU.

In: the names of extras. Out: `.venv`, and a stamp, so that a second call with nothing changed returns at once.
Needs Python's standard library only. Refuses to know what is run afterwards.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PIP = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def stop(sentence: str) -> None:
    """End with one clear sentence."""
    sys.exit(f"error: {sentence}")


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(f"» {text}", file=sys.stderr, flush=True)


def stamp_for(extras: list[str]) -> str:
    """A digest of what the environment follows from."""
    parts = [ROOT / "pyproject.toml", ROOT / "constraints.txt", Path(__file__)]
    return hashlib.sha256(b"".join(p.read_bytes() for p in parts) + ",".join(extras).encode()).hexdigest()


def make_venv() -> None:
    """Create `.venv` unless it is there and works."""
    if (VENV / "bin" / "python").exists() and subprocess.run(
        [*PIP, "--version"], capture_output=True, check=False
    ).returncode == 0:
        return
    say("creating .venv")
    if subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=False).returncode:
        stop("Python's venv module could not make .venv; on Debian and Ubuntu install the package python3-venv.")


def has_gpu() -> bool:
    """Whether NVIDIA's driver answers."""
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0


def install_torch() -> None:
    """Install torch at the tested version: a CPU build where there is no GPU."""
    probe = [str(VENV / "bin" / "python"), "-c", "import importlib.metadata as m; m.version('torch')"]
    if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
        return
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = next(line for line in lines if line.startswith("torch=="))
    if platform.system() != "Linux" or platform.machine() != "x86_64" or has_gpu():
        attempts = [[pinned]]
    else:
        # the CPU build carries a local version, so a configured index that has it is asked first
        attempts = [
            [f"{pinned}+cpu"],
            [f"{pinned}+cpu", "--index-url", CPU_INDEX, "--retries", "1", "--timeout", "20"],
            [pinned],
        ]
    for number, attempt in enumerate(attempts):
        last = number == len(attempts) - 1
        say(f"installing {attempt[0]}" + (" (PyPI's build, which is larger)" if last and number else ""))
        if (
            subprocess.run(
                [*PIP, "install", "-qq", *attempt], stderr=None if last else subprocess.DEVNULL, check=False
            ).returncode
            == 0
        ):
            return
    stop(f"pip could not install {pinned}; look at pip's message above, and check that PyPI can be reached.")


def main() -> None:
    """Install with the extras named on the command line."""
    extras = sorted(sys.argv[1:])
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs before anything checks it
        stop(
            f"Lorica needs Python 3.11 or later, and this is {platform.python_version()}; "
            "try `make PYTHON=python3.12 …`."
        )
    stamp = VENV / f".lorica-{'-'.join(extras) or 'plain'}"
    wanted = stamp_for(extras)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    make_venv()
    install_torch()
    target = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    say("installing lorica" + (f" with {', '.join(extras)}" if extras else ""))
    if subprocess.run(
        [*PIP, "install", "-qq", "-c", str(ROOT / "constraints.txt"), "-e", target], check=False
    ).returncode:
        stop("pip could not install lorica's dependencies; look at pip's message above.")
    if {"dev", "serve"} & set(extras):
        # the dashboard works without its charts, so nothing stops for them
        subprocess.run([*PIP[:1], "-m", "lorica.server.assets"], stdout=subprocess.DEVNULL, check=False)
    stamp.write_text(wanted)


if __name__ == "__main__":
    main()
