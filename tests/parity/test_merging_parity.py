"""Rules of merging against PEFT's `add_weighted_adapter`, on factors and on ΔW, and its functions of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from lorica.adapters.merging import change_of, make_merging
from lorica.adapters.merging.combine import combine
from lorica.adapters.merging.dare import dare
from lorica.adapters.merging.magnitude_prune import magnitude_prune
from lorica.adapters.merging.ties import ties
from lorica.engine.host import Host
from lorica.methods.lora import LoRA
from tests.methods.one import matrix, same
from tests.parity.both import CONV1D, OLD_CHECKPOINTING, close, of_family, perturb, run

pytestmark = [OLD_CHECKPOINTING, CONV1D]
RULES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("linear", {}, {}),
    ("cat", {}, {}),
    ("svd", {}, {"svd_rank": 4}),
    ("ties", {"density": 0.5, "on": "factors"}, {"density": 0.5}),
    ("ties", {"density": 0.5, "on": "factors", "elect": "frequency"}, {"majority_sign_method": "frequency"}),
    ("ties_svd", {"density": 0.5}, {"svd_rank": 4}),
    ("ties_svd", {"density": 0.3, "elect": "frequency"}, {"majority_sign_method": "frequency", "density": 0.3}),
    ("magnitude_prune", {"density": 0.5, "on": "factors"}, {}),
    ("magnitude_prune_svd", {"density": 0.5}, {"svd_rank": 2}),
]
"""PEFT's name, our parameters, and those of its arguments that are not plain."""


def two(family: str, folder: Path) -> tuple[Host, Any]:
    """A host and a PEFT model with the same two adapters, of values that float32 has; α/r is 2 and 1/2.

    PEFT keeps weights and their roots in float32, so those of the tests are powers of two.
    """
    make = of_family(family, dtype=torch.float64)
    host = Host(make())
    for name, alpha in (("a", 6.0), ("b", 1.5)):
        adapter = host.add(name, LoRA(rank=3, alpha=alpha), seed=ord(name), dtype=torch.float64)
        perturb([adapter.flat], seed=ord(name))
        adapter.flat.copy_(adapter.flat.float())
        host.save(folder / name, name)
    theirs: Any = peft.PeftModel.from_pretrained(make().module, str(folder / "a"), adapter_name="a")
    theirs.load_adapter(str(folder / "b"), adapter_name="b")
    return host, theirs.double().eval()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("kind", "parameters", "options"), RULES, ids=lambda value: str(value))
def test_a_rule_gives_the_logits_of_pefts_weighted_adapter(
    kind: str, parameters: dict[str, Any], options: dict[str, Any], family: str, tmp_path: Path
) -> None:
    host, theirs = two(family, tmp_path)
    weights = [0.5, -0.5] if kind in ("linear", "cat", "svd") else [0.5, 2.0]
    theirs.add_weighted_adapter(["a", "b"], weights, "m", combination_type=kind, **{"density": 0.5, **options})
    theirs.set_adapter("m")
    rank = options.get("svd_rank", 3) if kind.endswith("svd") else None
    name = kind.removesuffix("_svd")
    own = {"rank": rank} if name == "svd" else {}
    rank = None if name == "svd" else rank
    made, _ = combine(
        list(host.adapters.values()), host.backbone, make_merging(name, **parameters, **own), weights, rank=rank
    )
    host.put(made)
    host.activate(made.name)
    with torch.no_grad():
        close(run(host, host.backbone), run(theirs.double(), host.backbone), 1e-9)


def test_an_adapter_merged_alone_has_its_scale_once_here_and_in_peft(tmp_path: Path) -> None:
    """A development state of PEFT multiplied by α/r twice in its SVD family."""
    host, theirs = two("llama", tmp_path)
    parent = host.adapter("a")
    theirs.add_weighted_adapter(["a"], [1.0], "m", combination_type="svd")
    made, _ = combine([parent], host.backbone, make_merging("svd"))
    for site in made.layout.sites:
        found, wanted = change_of(made, host.backbone, site), change_of(parent, host.backbone, site)
        assert found is not None and wanted is not None
        same(found.matrix(), wanted.matrix(), 1e-9)
        layer = theirs.base_model.model.get_submodule(site)
        same(layer.get_delta_weight("m"), wanted.matrix(), 1e-6)  # PEFT keeps the new factors in float32


@pytest.mark.parametrize("elect", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_functions_of_tensors_are_pefts(density: float, elect: Any) -> None:
    taus, weights = [matrix(7, 11, seed=s) for s in (1, 2, 3)], [0.5, 1.0, -2.0]
    given = (taus, torch.tensor(weights, dtype=torch.float64), density)

    def drawn(theirs: Any, *more: Any) -> Tensor:
        torch.manual_seed(4)
        found: Tensor = theirs(*given, *more)
        return found

    same(ties(taus, weights, density, elect=elect), merge_utils.ties(*given, elect))
    same(magnitude_prune(taus, weights, density), merge_utils.magnitude_prune(*given))
    rng = torch.Generator().manual_seed(4)
    same(dare(taus, weights, density, rng), drawn(merge_utils.dare_linear))
    rng = torch.Generator().manual_seed(4)
    same(dare(taus, weights, density, rng, then="ties", elect=elect), drawn(merge_utils.dare_ties, elect))
