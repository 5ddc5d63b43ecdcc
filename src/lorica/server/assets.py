"""The dashboard's files: its own, which ship in the package, and uPlot, which is installed from the npm registry.

In: a file's name. Out: where it lies. `python -m lorica.server.assets` installs uPlot: the pinned version, verified by
its digest, with npm, or from a tarball that npm made elsewhere. Without it the page shows sentences instead of charts.
Refuses to fetch anything by itself while serving.
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from lorica.core.errors import FormatError, LoricaError, MissingError
from lorica.core.storage import replacing_folder, storage

STATIC = Path(__file__).parent / "static"
PACKAGE, VERSION = "uplot", "1.6.32"
INTEGRITY = "sha512-KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw=="
"""As npm's lock files write it: SHA-512 of the tarball, in base64."""
FILES = {
    "package/dist/uPlot.esm.js": "uPlot.esm.js",
    "package/dist/uPlot.min.css": "uPlot.min.css",
    "package/LICENSE": "LICENSE",
}
KINDS = (".html", ".js", ".css", ".svg", "LICENSE")
MOST = 4 * 2**20
SECONDS = 120


def homes() -> list[Path]:
    """Where uPlot may be: in the Python environment, or else in the user's data folder."""
    user = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return [Path(sys.prefix) / "share" / "lorica" / f"uplot-{VERSION}", user / "lorica" / f"uplot-{VERSION}"]


def charts() -> Path | None:
    """The folder that holds uPlot; None where it is not installed."""
    return next((home for home in homes() if all((home / name).is_file() for name in FILES.values())), None)


def find(name: str) -> Path | None:
    """A file of the page by its name, `uplot/…` for the library's; None for anything else."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts) or not name.endswith(KINDS):
        return None
    if parts[0] == "uplot":
        folder = charts()
        path = folder / parts[1] if folder is not None and len(parts) == 2 and parts[1] in FILES.values() else None
    else:
        path = STATIC.joinpath(*parts)
    return path if path is not None and path.is_file() else None


def install(tarball: Path | None = None) -> Path:
    """Put uPlot where `charts` finds it. Raises MissingError without npm or registry, FormatError for other bytes."""
    found = charts()
    if found is not None and tarball is None:
        return found
    with tempfile.TemporaryDirectory() as folder:
        content = _packed(Path(folder)) if tarball is None else tarball
        with storage(content):
            data = content.read_bytes()
        _verify(data)
        failure: LoricaError | None = None
        for home in homes():
            try:
                _unpack(content, home)
            except LoricaError as error:  # an environment that belongs to the system
                failure = error
                continue
            return home
    assert failure is not None
    raise failure


def _packed(folder: Path) -> Path:
    """The tarball, fetched by npm, which knows the user's registry and proxies."""
    hint = f"On another machine run `npm pack {PACKAGE}@{VERSION}` and give the tarball to this command."
    words = ["npm", "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts", "--silent", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False, cwd=folder)
    except FileNotFoundError:
        raise MissingError("npm is not installed, so uPlot cannot be fetched.", hint=hint) from None
    except subprocess.TimeoutExpired:
        raise MissingError(f"npm did not fetch uPlot within {SECONDS} s.", hint=hint) from None
    found = next(folder.glob("*.tgz"), None)
    if done.returncode or found is None:
        last = (done.stderr.strip().splitlines() or ["npm said nothing"])[-1]
        raise MissingError(f"npm could not fetch uPlot: {last}", hint=hint)
    return found


def _verify(data: bytes) -> None:
    algorithm, _, digest = INTEGRITY.partition("-")
    if base64.b64encode(hashlib.new(algorithm, data).digest()).decode() != digest:
        raise FormatError(f"The tarball is not {PACKAGE} {VERSION}: its digest is not the one that Lorica pins.")


def _unpack(tarball: Path, home: Path) -> None:
    with storage(home), tarfile.open(tarball) as archive, replacing_folder(home) as made:
        for member, name in FILES.items():
            file = archive.extractfile(member)
            if file is None:
                raise FormatError(f"The tarball holds no file {member}.")
            (made / name).write_bytes(file.read(MOST))


def main(words: list[str]) -> int:
    """Install, and say where."""
    try:
        home = install(Path(words[0]) if words else None)
    except LoricaError as error:
        sys.stderr.write(f"error: {error.message}" + (f" {error.hint}" if error.hint else "") + "\n")
        return 1
    sys.stderr.write(f"uPlot {VERSION} is in {home}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
