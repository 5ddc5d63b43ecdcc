"""Intrinsic dimension: DID and SAID, and the identities of its specification."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorica.core.errors import MethodError
from lorica.core.fastfood import fastfood
from lorica.engine.host import Host
from lorica.methods.intrinsic import Intrinsic
from lorica.models import wrap
from tests.methods.one import linear, matrix, same

X, DY = matrix(7, 5), matrix(7, 3, seed=1)
CPU = torch.device("cpu")


def network() -> nn.Module:
    parts = {
        "one": linear(matrix(8, 5, seed=2), matrix(8, seed=3)),
        "norm": nn.LayerNorm(8, dtype=torch.float64),
        "two": linear(matrix(3, 8, seed=4)),
    }
    return nn.Sequential(OrderedDict(parts))


def host_of(method: Intrinsic, theta: Tensor | None = None, **scales: float) -> Host:
    host = Host(wrap(network()))
    adapter = host.add("a", method, ["one", "norm", "two"], dtype=torch.float64)
    host.activate("a")
    if theta is not None:
        adapter.set("", "theta", theta)
    for site, value in scales.items():
        adapter.set(site, "scale_weight", torch.tensor([value], dtype=torch.float64))
    return host


def moved(theta: Tensor, site: str, name: str, shape: tuple[int, ...], key: int = 0) -> Tensor:
    size = torch.Size(shape).numel()
    return fastfood(f"{key}/{site}/{name}", size, theta.shape[0], CPU).project(theta, size).view(shape)


def test_every_weight_and_bias_moves_by_its_own_projection_of_one_vector() -> None:
    theta = 0.1 * matrix(20, seed=5)
    host = host_of(Intrinsic(dimension=20), theta)
    net = network()
    with torch.no_grad():
        for site, module in (("one", net.one), ("norm", net.norm), ("two", net.two)):
            module.weight += moved(theta, site, "weight", tuple(module.weight.shape))  # type: ignore[union-attr,operator]
            if module.bias is not None:  # type: ignore[union-attr]
                module.bias += moved(theta, site, "bias", tuple(module.bias.shape))  # type: ignore[union-attr,operator]
    same(host(X), net(X))
    assert host.adapter("a").layout.trainable_count() == 20


def test_biases_can_be_left_alone() -> None:
    host = host_of(Intrinsic(dimension=20, biases=False), matrix(20))
    for site in ("one", "norm"):
        assert host.adapter("a").update(site, host.backbone.weight(site)).bias_O is None  # type: ignore[union-attr]


def test_the_dimension_is_the_parameter_count_factors_included() -> None:
    for structured in (False, True):
        layout = host_of(Intrinsic(dimension=20, structured=structured)).adapter("a").layout
        assert layout.trainable_count() == 20
    assert layout.specs[""]["theta"].shape == (15,)  # three weights and two biases have a factor
    with pytest.raises(MethodError, match="5 factors of as many tensors are counted in it; at least 6"):
        host_of(Intrinsic(dimension=5, structured=True))
    assert host_of(Intrinsic(dimension=6, structured=True)).adapter("a").layout.trainable_count() == 6


def test_said_with_factors_of_one_is_did_of_the_remaining_dimension() -> None:
    theta = matrix(15, seed=6)
    same(host_of(Intrinsic(dimension=20, structured=True), theta)(X), host_of(Intrinsic(dimension=15), theta)(X))


def test_the_gradients_of_the_vector_and_of_each_factor() -> None:
    theta = 0.2 * matrix(15, seed=7)
    host = host_of(Intrinsic(dimension=20, structured=True), theta, one=0.5, two=-2.0)
    adapter = host.adapter("a")
    (host(X) * DY).sum().backward()
    net = network()
    weights = {}
    with torch.no_grad():
        for site, factor in (("one", 0.5), ("norm", 1.0), ("two", -2.0)):
            for name, tensor in getattr(net, site).named_parameters():
                step = moved(theta, site, name, tuple(tensor.shape))
                tensor += (factor if name == "weight" else 1.0) * step
                weights[site, name] = (tensor, step, factor if name == "weight" else 1.0)
    (net(X) * DY).sum().backward()
    expected = torch.zeros_like(theta)
    for (site, name), (tensor, step, factor) in weights.items():
        same(adapter.tensors(site)[f"scale_{name}"].grad, (tensor.grad * step).sum().view(1))
        columns = torch.stack([moved(e, site, name, tuple(tensor.shape)).flatten() for e in torch.eye(15).double()], 1)
        expected += factor * columns.T @ tensor.grad.flatten()
    same(adapter.tensors("")["theta"].grad, expected)


def test_the_published_gradient_weighs_each_tensor_by_one_over_its_padded_size() -> None:
    theta = 0.2 * matrix(20, seed=8)
    found = {}
    for site in ("one", "two"):
        for gradient in ("true", "published"):
            host = Host(wrap(network()))
            method = Intrinsic(dimension=20, biases=False, gradient=gradient)  # type: ignore[arg-type]
            host.add("a", method, site, dtype=torch.float64).set("", "theta", theta)
            host.activate("a")
            (host(X) * DY).sum().backward()
            found[site, gradient] = host.adapter("a").grad.clone()
    same(found["one", "published"], found["one", "true"] / 64)  # 8·5 = 40 values, padded to 64
    same(found["two", "published"], found["two", "true"] / 32)  # 3·8 = 24 values, padded to 32


def test_one_key_gives_one_subspace_and_another_another() -> None:
    theta = matrix(20, seed=9)
    y = host_of(Intrinsic(dimension=20, projection_key=3), theta)(X)
    assert torch.equal(host_of(Intrinsic(dimension=20, projection_key=3), theta)(X), y)
    assert not torch.allclose(host_of(Intrinsic(dimension=20, projection_key=4), theta)(X), y)


def test_nothing_but_the_vector_and_the_factors_is_saved_and_the_rest_comes_back_from_the_seed(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    host = host_of(Intrinsic(dimension=20, structured=True, projection_key=5), 0.1 * matrix(15, seed=10), two=0.3)
    y = host(X)
    folder = host.save(tmp_path / "one", "a")
    stored = load_file(folder / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == 20
    other = Host(wrap(network()))
    other.load(folder, "b")
    other.activate("b")
    assert torch.equal(other(X), y)
    other.merge()
    same(other(X), y)
    other.unmerge()
    assert torch.equal(other(X), y)


def test_a_target_inside_the_subspace_is_reached() -> None:
    """The loss is quadratic in the weight, so that the best point of the subspace is a least-squares solution."""
    aim = moved(matrix(12, seed=11), "one", "weight", (8, 5))
    layer = Host(wrap(nn.Sequential(OrderedDict(one=network().one))))  # type: ignore[arg-type]
    adapter = layer.add("a", Intrinsic(dimension=12, biases=False), "one", dtype=torch.float64)
    layer.activate("a")
    optimizer = torch.optim.LBFGS(adapter.parameters(), lr=1, max_iter=200, tolerance_grad=1e-14, tolerance_change=0)
    eye = torch.eye(5, dtype=torch.float64)
    wanted = (aim + layer.backbone.weight("one").matrix()).T + layer.backbone.bias("one")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (layer(eye) - wanted).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    assert float(closure().detach()) < 1e-18


def test_of_a_random_target_the_subspace_leaves_the_share_of_the_other_directions() -> None:
    size, dimension = 256, 64
    left = []
    for n in range(30):
        parts = fastfood(f"w{n}", size, dimension, CPU)
        P = torch.stack([parts.project(column, size) for column in torch.eye(dimension).double()], 1)
        target = matrix(size, seed=100 + n)
        fit = P @ torch.linalg.lstsq(P, target[:, None]).solution[:, 0]
        left.append(float((target - fit).square().sum() / target.square().sum()))
    assert sum(left) / len(left) == pytest.approx(1 - dimension / size, abs=0.02)
