"""The left singular vectors of a base's weights, computed once: in memory, and on the disk where a folder is given.

In: a backbone, a site, its weight. Out: U₀. A file is named by the backbone's fingerprint, the site and a digest of the
weight, so that no other weight's vectors are ever taken for it. Refuses to know what they are compared with.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lorica.core.storage import storage, write_file
from lorica.models.backbone import Backbone


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/lorica/bases`, or below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorica" / "bases"


class Bases:
    """Left singular vectors by weight: computed when they are asked for, and read again where they were kept.

    With a folder, each is kept as a file of out · min(out, in) values, as many as the base's own weights; with `keep`
    they stay in memory; with neither they are computed each time. `computed` counts the decompositions.
    """

    def __init__(self, folder: Path | None = None, *, keep: bool = False) -> None:
        self.folder = folder
        self.keep = keep
        self.computed = 0
        self._kept: dict[Path, Tensor] = {}

    def left(self, backbone: Backbone, site: str, weight_OI: Tensor) -> Tensor:
        """U₀ [O, M], M = min(out, in), of a site's flattened weight, in the dtype of what is given.

        A file that is damaged is computed anew. Raises StorageError where the folder cannot be written.
        """
        place = _place(backbone, site, weight_OI)
        found = self._kept.get(place)
        if found is None and self.folder is not None:
            found = _read(self.folder / place, weight_OI)
        if found is None:
            found = self._compute(place, weight_OI)
        if self.keep:
            self._kept[place] = found
        return found

    def _compute(self, place: Path, weight_OI: Tensor) -> Tensor:
        self.computed += 1
        U_OM: Tensor = torch.linalg.svd(weight_OI, full_matrices=False)[0]
        if self.folder is not None:
            path = self.folder / place
            with storage(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, save({"U": U_OM.cpu().contiguous()}))
        return U_OM


def _place(backbone: Backbone, site: str, weight_OI: Tensor) -> Path:
    raw = weight_OI.cpu().contiguous().view(torch.uint8).numpy()
    digest = hashlib.blake2b(raw.data, digest_size=8, person=str(weight_OI.dtype).encode()[-16:]).hexdigest()
    return Path(backbone.fingerprint()) / f"{site}.{digest}.safetensors"


def _read(path: Path, weight_OI: Tensor) -> Tensor | None:
    """What was kept, on the weight's device; None where there is nothing, or nothing that fits."""
    try:
        found: Tensor = load(path.read_bytes())["U"]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    fits = found.dtype == weight_OI.dtype and tuple(found.shape) == (weight_OI.shape[0], min(weight_OI.shape))
    return found.to(weight_OI.device) if fits else None
