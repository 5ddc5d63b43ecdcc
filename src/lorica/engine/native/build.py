"""A C file as a library of this machine: compiled once by the machine's own compiler, then loaded from a cache.

In: a source file, macros. Out: the loaded library, None where there is no compiler or it does not compile. The cache is
`$XDG_CACHE_HOME/lorica`, of this user alone; what is in it is named by all that its code depends on. Refuses to know
tensors and what the functions compute.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC")
TUNED = (("-march=native",), ("-mcpu=native",), ())
"""For this very processor, in the ways that compilers spell it, or else for any of its kind."""
TIMEOUT = 120.0
log = logging.getLogger(__name__)


def library(source: Path, macros: Sequence[str] = ()) -> ctypes.CDLL | None:
    """The functions of a C file. Without a compiler, or where it fails, there are none, and the log says why."""
    compiler = _compiler()
    if compiler is None:
        log.info("no C compiler (set CC, or install one): %s runs as torch operations", source.name)
        return None
    try:
        path = _cache() / f"{source.stem}-{_fingerprint(source, macros, compiler)}.so"
        if not path.exists():
            _compile(source, macros, compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        log.warning(
            "%s could not be compiled and loaded (%s) and runs as torch operations: %s", source.name, compiler, said
        )
        return None


def _compiler() -> str | None:
    if os.name != "posix":
        return None
    named = os.environ.get("CC")
    names = [named] if named else ["cc", "gcc", "clang"]
    return next((found for found in map(shutil.which, names) if found), None)


def _compile(source: Path, macros: Sequence[str], compiler: str, path: Path) -> None:
    """Compile into a file of its own first: another process may be doing the same."""
    error: subprocess.CalledProcessError | None = None
    for tuned in TUNED:
        handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
        os.close(handle)
        command = [compiler, *FLAGS, *tuned, *(f"-D{macro}" for macro in macros), "-o", name, str(source), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT)
            Path(name).replace(path)
            return
        except subprocess.CalledProcessError as failed:
            error = failed
        finally:
            Path(name).unlink(missing_ok=True)
    assert error is not None
    raise error


def _cache() -> Path:
    """A folder that nobody else can write to: what is in it is run."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "lorica" / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        owner = folder.stat()
        if owner.st_uid == os.getuid() and not owner.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="lorica-native-"))


def _fingerprint(source: Path, macros: Sequence[str], compiler: str) -> str:
    """Another one for another source, compiler or processor."""
    resolved = Path(compiler).resolve()
    # what it includes is among these
    texts = [source.name, *(other.read_text() for other in sorted(source.parent.glob("*.[ch]")))]
    about = [*texts, *FLAGS, *macros, str(resolved), str(resolved.stat().st_mtime_ns), _processor()]
    return hashlib.sha256("\0".join(about).encode()).hexdigest()[:20]


def _processor() -> str:
    """What the processor can do, as far as the system tells: a home folder may be shared by several machines."""
    told = [platform.system(), platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return " ".join(told)
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join([*told, *dict.fromkeys(line for line in lines if line.startswith(wanted))])
