"""Sites whose tensors do not begin with one row of the batch: shared positions, channels, flattened axes, frames."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorica.core.errors import RouteError
from lorica.engine.host import Host, attach
from lorica.methods import make_method
from lorica.models import wrap
from tests.contract.cases import close, perturb
from tests.tiny import tiny

LORA = make_method("lora", rank=2)


def two(base: nn.Module | Host, targets: str | list[str]) -> Host:
    """A host with two moved adapters, `a` and `b`."""
    host = base if isinstance(base, Host) else Host(wrap(base))
    for seed, name in enumerate("ab"):
        perturb(host.add(name, LORA, targets, seed=seed, dtype=torch.float64), 0.3, seed)
    return host


@pytest.mark.parametrize(
    ("family", "site"), [("gpt2", "transformer.wpe"), ("bert", "bert.embeddings.position_embeddings")]
)
@pytest.mark.parametrize("rows", [["a", "b"], ["a", None, "b", "a", "b"], [None, "b", "a", "a"]], ids=str)
def test_positions_that_all_rows_share_are_adapted_row_by_row(family: str, site: str, rows: list[str | None]) -> None:
    host = two(Host(tiny(family, dtype=torch.float64)), site)
    for length in (len(rows), 2 * len(rows), 3):  # as many positions as rows must not be taken for rows
        ids = torch.randint(3, 120, (len(rows), length), generator=torch.Generator().manual_seed(1))
        with host.rows(rows):
            mixed = host(input_ids=ids).logits
        for row, name in enumerate(rows):
            host.activate(*([name] if name else []))
            close(mixed[row], host(input_ids=ids[row : row + 1]).logits[0], 1e-12)


def test_a_group_norm_is_by_channel_even_where_the_last_axis_is_as_long() -> None:
    norm = nn.GroupNorm(2, 6, dtype=torch.float64)
    host = attach(nn.Sequential(norm), make_method("norm"), dtype=torch.float64)
    perturb(host.adapter(), 0.3)
    x = torch.randn(4, 6, 6, dtype=torch.float64)
    shift = host.adapter().tensors("0")
    y = host(x)
    with host.disabled():
        base = host(x)
    normal = (base - norm.bias[:, None]) / norm.weight[:, None]
    close(y, normal * (norm.weight + shift["weight"])[:, None] + (norm.bias + shift["bias"])[:, None], 1e-12)


class Frames(nn.Module):
    """Folds frames into the batch, as video models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, dtype=torch.float64)
        self.head = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x.flatten(0, 1)).mean((-1, -2))
        return self.head(h).view(*x.shape[:2], -1)


def test_frames_folded_into_the_batch_belong_to_their_row() -> None:
    host = two(Frames(), "re:.*")
    x = torch.randn(3, 2, 3, 5, 5, dtype=torch.float64)
    with host.rows(["b", None, "a"]):
        mixed = host(x)
    for row, name in enumerate(("b", None, "a")):
        host.activate(*([name] if name else []))
        close(mixed[row], host(x[row : row + 1])[0], 1e-12)


class Once(nn.Module):
    """Runs a layer on something that is no batch, as models with relative positions do."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3, dtype=torch.float64)
        self.table = torch.ones(*shape, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.table).flatten(0, -2).mean(0)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((5,), "saw 5 positions, which 2 routed rows do not divide"),
        ((1, 6), "first axis does not hold the 2 routed rows"),
    ],
)
def test_positions_that_are_no_batch_are_refused_rather_than_taken_for_rows(shape: tuple[int, ...], words: str) -> None:
    host = two(Once(*shape), "fc")
    x = torch.zeros(2, 3, dtype=torch.float64)
    with host.rows(["a", "b"]), pytest.raises(RouteError, match=words):
        host(x)
    host.activate("a")
    assert host(x).shape == (2, 3)


@pytest.mark.parametrize("order", [("a", "c"), ("c", "a"), ("c", "a", "d")], ids="".join)
def test_input_scales_of_stacked_adapters_at_a_convolution_compose(order: tuple[str, ...]) -> None:
    conv = nn.Conv2d(4, 6, 3, groups=2, dtype=torch.float64)
    host = two(nn.Sequential(conv), "0")
    for seed, name in enumerate("cd"):
        perturb(host.add(name, make_method("ia3", feedforward="0"), "0", dtype=torch.float64), 0.5, seed)
    x, weight = torch.randn(2, 4, 5, 5, dtype=torch.float64), conv.weight.detach()
    host.activate(*order)
    y = host(x)
    for name in order:
        weight = host.adapter(name).update("0", host.backbone.weight("0")).effective(weight)  # type: ignore[union-attr]
    with host.disabled():
        close(y, conv._conv_forward(x, weight, conv.bias), 1e-12)


def test_a_module_without_rows_in_its_output_type_keeps_views_and_strides_usable() -> None:
    host = two(nn.Sequential(nn.Linear(4, 6, dtype=torch.float64)), "0")
    x = torch.randn(5, 3, 4, dtype=torch.float64).transpose(0, 1)
    with host.rows(["a", None, "b"]):
        y = host(x)
    assert y.shape == (3, 5, 6)
    host.activate("b")
    close(y[2], host(x[2:])[0], 1e-12)
    assert host(x[:0]).shape == (0, 5, 6)
