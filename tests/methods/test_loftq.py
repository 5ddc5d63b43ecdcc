"""LoftQ: identities of its specification, shared and private bases, and what must be refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import lorica
from lorica.adapters.alternation import alternate
from lorica.adapters.lineage import Base
from lorica.adapters.parents import lineage_of, lineage_of_weights
from lorica.adapters.private_base import META, private_base
from lorica.adapters.targets import Targets
from lorica.core.errors import FormatError, MethodError, MismatchError, MissingError
from lorica.engine.host import Host
from lorica.methods.loftq import LoftQ
from lorica.models.factory import make_tiny
from lorica.models.quantize.apply import quantize_backbone
from lorica.models.quantize.config import Quantization
from lorica.models.quantize.functions import format_of, quantize
from lorica.models.saving import save_backbone

KINDS = ("nf4", "nf3", "nf2", "uniform4", "uniform3", "uniform2")
NF4 = Quantization(kind="nf4", double=False)
PLACE = "model.layers.0.self_attn.q_proj"


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def gaussian(rows: int, cols: int, seed: int = 0, scale: float = 1 / 16) -> Tensor:
    return scale * torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def packed(kind: str = "nf4", **options: object) -> lorica.models.Backbone:
    """A tiny Llama, packed, whose full weights can be had again."""
    return lorica.load("tiny-llama", dtype="float32", quantize={"kind": kind, "double": False, **options})


def full() -> lorica.models.Backbone:
    return lorica.load("tiny-llama", dtype="float32")


# -- the alternation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)], ids=str)
def test_one_iteration_leaves_exactly_the_tail_of_the_residuals_spectrum(kind: str, shape: tuple[int, int]) -> None:
    W, form = gaussian(*shape), format_of(kind, double=False)
    tail = torch.linalg.svdvals(W - form.unpack(form.pack(W), shape, torch.float64))[5:]
    found = alternate(W, form, 5, 1, rng())
    assert math.isclose(found.errors[1] ** 2, float(tail.square().sum()), rel_tol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_rank_0_is_the_plain_quantised_error_and_full_rank_none(kind: str) -> None:
    W, form = gaussian(24, 40), format_of(kind, double=False)
    plain = float((W - quantize(W, kind).dense().double()).norm())
    none, whole = alternate(W, form, 0, 1, rng()), alternate(W, form, 24, 1, rng())
    assert math.isclose(none.errors[0], plain, rel_tol=1e-12) and math.isclose(none.errors[1], plain, rel_tol=1e-12)
    assert whole.errors[1] < 1e-12 * float(W.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_each_decomposition_lowers_the_error_of_its_own_codes(kind: str) -> None:
    W, form = gaussian(48, 40), format_of(kind, double=False)
    for T in range(1, 6):
        found = alternate(W, form, 6, T, rng())
        U, S, V = found.triplets
        without = float((W - found.packed.dense(torch.float64)).norm())
        error = float((W - found.packed.dense(torch.float64) - (U * S) @ V).norm())
        assert error <= without
        assert math.isclose(error, min(found.errors[1:]), rel_tol=1e-12)  # what is returned is the best iterate
        assert found.errors[1] <= found.errors[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rank", "published"),
    [
        ("nf4", 32, (1.469, 1.161, 1.062, 1.026, 1.006, 0.995)),
        ("nf4", 64, (1.469, 0.904, 0.828, 0.814, 0.812, 0.814)),
        ("nf2", 64, (9.02, 5.41, 5.14, 5.23, 5.39, 5.57)),
    ],
    ids=["nf4-32", "nf4-64", "nf2-64"],
)
def test_the_reference_run_is_met_within_3_percent_and_as_little_monotone(
    kind: str, rank: int, published: tuple[float, ...]
) -> None:
    found = alternate(gaussian(256, 256), format_of(kind, double=False), rank, 5, rng())
    assert found.errors == pytest.approx(published, rel=0.03)
    if kind == "nf2":
        assert found.chosen == 2 and found.errors[5] > found.errors[2]


def test_the_best_iterate_is_returned_where_the_last_is_worse() -> None:
    W, form = gaussian(64, 64), format_of("nf2", double=False)
    found = alternate(W, form, 16, 8, rng())
    assert found.chosen < 8 and found.errors[8] > min(found.errors)
    short = alternate(W, form, 16, found.chosen, rng())
    assert torch.equal(found.packed.parts["codes"], short.packed.parts["codes"])
    assert torch.equal(found.triplets[0], short.triplets[0])


def test_iterated_decompositions_come_close_to_exact_ones() -> None:
    W, form = gaussian(96, 64), format_of("nf4", double=False)
    exact, near = alternate(W, form, 8, 3, rng()), alternate(W, form, 8, 3, rng(), niter=4)
    assert near.errors == pytest.approx(exact.errors, rel=1e-2)
    again = alternate(W, form, 8, 3, rng(), niter=4)
    assert again.errors == near.errors


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(FormatError, match="NaN"):
        alternate(gaussian(8, 8) * math.nan, format_of("nf4"), 2, 1, rng())


# -- QPiSSA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_qpissa_quantises_what_the_principal_directions_leave_and_ends_with_codes(rounds: int) -> None:
    W, form = gaussian(40, 32), format_of("nf4", double=False)
    found = alternate(W, form, 6, rounds, rng(), start="principal")
    Q, errors = torch.zeros_like(W), []
    for _ in range(rounds):
        U, S, V = torch.linalg.svd(W - Q, full_matrices=False)
        L = (U[:, :6] * S[:6]) @ V[:6]
        Q = quantize(W - L, "nf4").dense(torch.float64)
        errors.append(float((W - Q - L).norm()))
    assert found.errors[1:] == pytest.approx(errors, rel=1e-9)
    assert found.errors[0] == pytest.approx(float((W - quantize(W, "nf4").dense(torch.float64)).norm()))
    if rounds == 1:  # the factors are PiSSA's, and the codes those of its residual base
        U, S, V = found.triplets
        torch.testing.assert_close((U * S) @ V, L)
        assert torch.equal(found.packed.dense(torch.float64), Q)


def test_qpissa_loses_less_than_plain_codes_where_few_directions_dominate() -> None:
    tall = gaussian(64, 4, seed=1, scale=2.0) @ gaussian(4, 64, seed=2, scale=1.0) + gaussian(64, 64)
    for kind in ("nf4", "nf2"):
        found = alternate(tall, format_of(kind, double=False), 4, 5, rng(), start="principal")
        assert min(found.errors[1:]) < 0.5 * found.errors[0]


@pytest.mark.parametrize("alpha", [2.0, 8.0, 64.0])
def test_qpissa_starts_near_the_full_model_for_every_scaling_and_its_base_alone_is_far(alpha: float) -> None:
    own = private_base(full(), NF4, LoftQ(rank=8, alpha=alpha, iterations=5, start="principal"))
    host = Host(own.backbone)
    host.put(own.adapter)
    for site, errors in own.errors.items():
        weight, W = own.backbone.weight(site), full().weight(site).matrix()
        left = W - own.adapter.update(site, weight).effective(weight.matrix())  # type: ignore[union-attr]
        assert math.isclose(float(left.detach().norm()), min(errors[1:]), rel_tol=1e-3)
        assert float((W - weight.matrix()).norm()) > 2 * errors[0], "the principal part is the adapter's"


def test_qpissa_beside_a_base_that_others_share_is_refused() -> None:
    host = Host(packed())
    with pytest.raises(MethodError, match="LoftQ with start: principal chooses the codes of site"):
        host.add("a", LoftQ(rank=4, start="principal"))


# -- a shared base -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_shared_base_the_adapter_restores_the_full_weight(kind: str) -> None:
    host = Host(packed(kind))
    adapter, whole = host.add("a", LoftQ(rank=8)), full()
    for site in adapter.layout.sites:
        W = whole.weight(site).matrix()
        update = adapter.update(site, host.backbone.weight(site))
        base = host.backbone.weight(site).matrix()
        error, plain = (W - update.effective(base)).detach().norm(), (W - base).norm()  # type: ignore[union-attr]
        tail = torch.linalg.svdvals(W - base)[8:]
        assert math.isclose(float(error), float(tail.square().sum().sqrt()), rel_tol=1e-4) and error < plain


def test_one_iteration_leaves_the_plain_codes_so_that_all_can_share_them() -> None:
    plain = packed()
    before = {name: part.clone() for name, part in plain.weight(PLACE).packed.packed.parts.items()}  # type: ignore[union-attr]
    host = Host(plain)
    host.add("a", LoftQ(rank=4))
    own = private_base(full(), NF4, LoftQ(rank=4, iterations=1))
    for backbone in (plain, own.backbone):
        module = backbone.weight(PLACE).packed
        assert module is not None
        assert all(torch.equal(module.packed.parts[name], part) for name, part in before.items())
    assert own.backbone.fingerprint() == plain.fingerprint() == own.adapter.base
    assert torch.allclose(own.adapter.flat, host.adapter("a").flat, atol=1e-6)


@pytest.mark.parametrize("fields", [{"alpha": 1.0}, {"alpha": 64.0}, {"rslora": True}], ids=str)
def test_the_initial_function_does_not_depend_on_the_scaling(fields: dict[str, float]) -> None:
    """Without the division by √s the start would be Q + s·BA: s times what was taken, not what was taken."""
    host = Host(packed())
    host.add("a", LoftQ(rank=8, alpha=8.0))
    host.add("b", LoftQ(rank=8, **fields))  # type: ignore[arg-type]
    ids = torch.arange(2, 14)[None]
    with host.rows(["a"]):
        one = host(input_ids=ids).logits
    with host.rows(["b"]):
        other = host(input_ids=ids).logits
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with host.rows([None]):
        assert not torch.allclose(one, host(input_ids=ids).logits, atol=1e-4)


def test_at_full_rank_the_quantised_model_is_the_full_one() -> None:
    host, base = Host(packed("nf2")), full()
    every = [site for site in host.backbone.sites.values() if host.backbone.weight(site.name).packed]
    host.add("a", LoftQ(rank=2, alpha=2), {"rank_pattern": {s.role: min(s.shape) for s in every}})
    ids = torch.arange(2, 14)[None]
    with host.rows(["a"]):
        torch.testing.assert_close(host(input_ids=ids).logits, base.module(input_ids=ids).logits, rtol=1e-3, atol=1e-4)


def test_a_weight_that_is_there_in_full_has_nothing_to_restore_and_starts_as_lora() -> None:
    host = Host(packed(skip=["q_proj"]))
    values = host.add("a", LoftQ(rank=4)).values(PLACE)
    assert not values["B"].any() and values["A"].any()
    assert host.adapter("a").values(PLACE.replace("q_proj", "k_proj"))["B"].any()


def test_a_weight_on_the_grid_loses_nothing_and_its_directions_can_still_learn() -> None:
    found = LoftQ(rank=2).factors((torch.eye(4, 2), torch.zeros(2), torch.eye(2, 3)))
    assert not found["B"].any() and (found["A"].norm(dim=1) > 0.1).all()


def test_the_full_weights_are_loaded_once_for_all_sites_and_freed_after() -> None:
    made = []

    def make() -> lorica.models.Backbone:
        made.append(1)
        return full()

    host = Host(packed().packed_from(make))
    host.add("a", LoftQ(rank=2))
    assert len(made) == 1 and host.backbone.original()._loaded is None
    host.add("b", lorica.methods.get_method("lora")(rank=2))
    assert len(made) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nano_is_read_again_from_where_it_was_loaded(dtype: str) -> None:
    backbone = lorica.load("nano", dtype=dtype, quantize="nf3")
    site = next(name for name in backbone.sites if name.endswith("q_proj"))
    adapter = Host(backbone).add("a", LoftQ(rank=16), targets=[site])
    W, weight = lorica.load("nano", dtype=dtype).weight(site).matrix(), backbone.weight(site)
    left = W - adapter.update(site, weight).effective(weight.matrix().float())  # type: ignore[union-attr]
    assert left.norm() < 0.9 * (W.float() - weight.matrix().float()).norm()
    assert adapter.flat.dtype == torch.float32


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_without_the_full_weights_it_is_refused_in_a_sentence() -> None:
    host = Host(quantize_backbone(make_tiny("llama"), NF4))
    with pytest.raises(MissingError, match="full weights that 'tiny-llama' was packed from are not at hand"):
        host.add("a", LoftQ(rank=4))
    host.backbone.packed_from(make_tiny("llama"))
    assert host.add("a", LoftQ(rank=4)).values(PLACE)["B"].any()


def test_other_weights_are_not_taken_for_the_full_ones() -> None:
    host = Host(packed().packed_from(make_tiny("llama", seed=1)))
    with pytest.raises(MismatchError, match="not the network any more"):
        host.add("a", LoftQ(rank=4))
    host.backbone.origin = ""  # as after reading a packed directory: nobody knows
    host.backbone.packed_from(make_tiny("llama", seed=1))
    with pytest.raises(MismatchError, match="is not what packing the full weight gives"):
        host.add("a", LoftQ(rank=4))


def test_more_iterations_would_change_a_shared_base_and_are_refused() -> None:
    host = Host(packed())
    with pytest.raises(MethodError, match="LoftQ with 5 iterations chooses the codes of site"):
        host.add("a", LoftQ(rank=4, iterations=5))
    assert not host.adapters


def test_one_iteration_beside_somebodys_private_codes_is_refused() -> None:
    own = private_base(full(), Quantization(kind="nf2", double=False), LoftQ(rank=8, iterations=4))
    host = Host(own.backbone.packed_from(full()))
    with pytest.raises(MismatchError, match="is not what packing the full weight gives"):
        host.add("a", LoftQ(rank=8))


def test_it_is_never_merged_into_the_full_weights_which_still_have_what_it_restores(tmp_path: object) -> None:
    host = Host(packed())
    host.add("a", LoftQ(rank=4))
    path = host.save(f"{tmp_path}/a", "a")
    assert torch.equal(Host(packed()).load(path).flat, host.adapter("a").flat)
    for flag in (False, True):
        with pytest.raises(MismatchError):
            Host(full()).load(path, from_quantized=flag)


def test_dropout_and_decay_do_not_exist() -> None:
    assert "dropout" not in LoftQ.model_fields
    host = Host(packed())
    layout = host.add("a", LoftQ(rank=4)).layout
    assert {group.name: group.decay for group in layout.groups} == {"A": False, "B": False}


# -- a private base ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "nf2", "uniform2"])
def test_a_private_base_is_nearer_to_the_full_one_than_the_shared_one(kind: str) -> None:
    config, whole = Quantization(kind=kind, double=False), full()
    one = private_base(full(), config, LoftQ(rank=8))
    five = private_base(full(), config, LoftQ(rank=8, iterations=5))
    for site, errors in five.errors.items():
        assert errors[:2] == pytest.approx(one.errors[site], rel=1e-6) and len(errors) == 6
        said = five.adapter.meta[META][site]
        assert said["errors"][said["chosen"] - 1] == min(errors[1:]) and said["plain"] == errors[0]
        weight = five.backbone.weight(site)
        update = five.adapter.update(site, weight)
        left = whole.weight(site).matrix() - update.effective(weight.matrix())  # type: ignore[union-attr]
        assert math.isclose(float(left.detach().norm()), min(errors[1:]), rel_tol=1e-3)
    if kind != "nf4":
        assert sum(min(e[1:]) for e in five.errors.values()) < sum(e[1] for e in one.errors.values())


def test_a_private_base_is_saved_and_read_with_its_codes_and_its_adapter(tmp_path: object) -> None:
    own = private_base(
        lorica.load("nano", dtype="float32"),
        Quantization(kind="nf2"),
        LoftQ(rank=4, iterations=3),
        Targets(include=("q_proj", "v_proj")),
    )
    host = Host(own.backbone)
    host.put(own.adapter)
    ids = torch.arange(5, 20)[None]
    with host.rows(["default"]):
        y = host(input_ids=ids).logits
    host.save(f"{tmp_path}/adapter", "default")
    again = Host(lorica.load(str(save_backbone(own.backbone, f"{tmp_path}/base")), dtype="float32"))
    again.load(f"{tmp_path}/adapter")
    with again.rows(["default"]):
        assert torch.equal(again(input_ids=ids).logits, y)
    with pytest.raises(MismatchError):
        Host(lorica.load("nano", dtype="float32", quantize="nf2")).load(f"{tmp_path}/adapter")


def test_a_private_base_needs_a_site_that_is_packed() -> None:
    with pytest.raises(MethodError, match="nothing to choose together"):
        private_base(full(), NF4, LoftQ(rank=4, iterations=2), Targets(include=("lm_head",)))


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"iterations": 2}, {"start": "principal"}], ids=str)
def test_lorica_train_makes_base_and_adapter_and_resumes_them(tmp_path: object, fields: dict[str, object]) -> None:
    from lorica.recipes import sft
    from lorica.recipes.config import SFTConfig

    config = SFTConfig.parse(
        {
            "model": "nano",
            "quantize": "nf2",
            "method": {"name": "loftq", "rank": 4, **fields},
            "targets": {"include": ["q_proj"]},
            "data": {"path": "everyday:train"},
            "steps": 4,
            "batch_size": 2,
            "save_every": 2,
            "keep": 5,
            "out": f"{tmp_path}/run",
        }
    )
    done = sft.run(config)
    host = Host(lorica.load(f"{tmp_path}/run/base"))
    adapter = host.load(f"{tmp_path}/run/adapter")
    first, known, packed = adapter.flat.clone(), lineage_of(adapter), lineage_of_weights(host.backbone)
    assert known.base == Base(f"{tmp_path}/run/base", host.backbone.fingerprint())
    assert packed.base == Base("nano", lorica.load("nano").fingerprint())
    assert (packed.how, packed.settings["quantize"]) == ("pack with loftq", "nf2")
    (done.path / "checkpoints" / "step-000004.pt").unlink()
    assert done.adapter is not None
    sft.resume(done.path)
    assert torch.equal(Host(lorica.load(f"{tmp_path}/run/base")).load(done.adapter).flat, first)
