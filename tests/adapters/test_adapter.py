"""An adapter is two flat rows: every tensor is a view of the values, every gradient a view of the gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from lorica.adapters.adapter import Adapter
from lorica.core.errors import FormatError
from lorica.engine.host import Host
from lorica.methods import make_method
from lorica.models import tiny

SITE = "model.layers.0.self_attn.q_proj"


def made(name: str = "lora", **fields: object) -> Adapter:
    return Host(tiny("llama")).add("a", make_method(name, rank=2, **fields), seed=5)


def test_leaves_are_views_of_the_flat_row_and_their_gradients_of_the_gradient_row() -> None:
    adapter = made()
    leaf = adapter.tensors(SITE)["A"]
    place = adapter.layout.places[SITE]["A"]
    adapter.flat[place.offset] = 7.0
    assert leaf.flatten()[0] == 7.0
    (leaf * 3).sum().backward()
    assert torch.equal(adapter.grad[place.offset : place.offset + place.size], torch.full((place.size,), 3.0))
    adapter.zero_grad()
    assert leaf.grad is not None and not leaf.grad.any()
    assert adapter.tensors(SITE)["A"] is leaf


def test_a_gradient_row_is_copied_only_where_it_is_not_zero_and_put_back_as_it_was() -> None:
    adapter = made()
    fresh = adapter.remember()
    assert fresh.grad is None
    (adapter.tensors(SITE)["A"] * 3).sum().backward()
    adapter.forwards += 1
    written = adapter.remember()
    assert written.grad is not None
    assert torch.equal(written.grad, adapter.grad)
    (adapter.tensors(SITE)["B"] * 2).sum().backward()
    adapter.restore(written)
    assert torch.equal(adapter.grad, written.grad)
    assert adapter.forwards == 1
    adapter.restore(fresh)
    assert not adapter.grad.any()
    assert adapter.forwards == 0
    assert adapter.remember().grad is None
    adapter.grad_written()
    assert adapter.remember().grad is not None


def test_setting_a_tensor_is_seen_by_leaves_that_exist() -> None:
    adapter = made("pissa")
    own = adapter.tensors(SITE)
    for param in ("A", "A0"):
        adapter.set(SITE, param, torch.full(own[param].shape, 4.0))
        assert (adapter.tensors(SITE)[param] == 4.0).all()


def test_a_wrong_shape_is_refused() -> None:
    with pytest.raises(FormatError, match=rf"Tensor 'A' of site '{SITE}' has shape \(3, 3\); \(2, 64\) is right"):
        made().set(SITE, "A", torch.zeros(3, 3))


def test_gradients_that_a_foreign_optimiser_put_elsewhere_are_collected() -> None:
    adapter = made()
    leaf = adapter.tensors(SITE)["B"]
    adapter.tensors(SITE)["A"].grad = None
    leaf.grad = torch.full_like(leaf, 2.0)
    place = adapter.layout.places[SITE]["B"]
    grad = adapter.collect_grad()
    assert (grad[place.offset : place.offset + place.size] == 2.0).all()
    assert grad.sum() == 2.0 * place.size
    assert leaf.grad.data_ptr() == grad[place.offset :].data_ptr()


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["lora", "pissa", "vera"])
def test_a_copy_has_equal_values_and_memory_of_its_own(copier: object, name: str) -> None:
    adapter = made(name)
    adapter.tensors(SITE)
    twin: Adapter = copier(adapter)  # type: ignore[operator]
    assert torch.equal(twin.flat, adapter.flat)
    for (_, _, one), (_, _, two) in zip(adapter.named_tensors(), twin.named_tensors(), strict=True):
        assert torch.equal(one, two)
    twin.flat.fill_(0.0)
    assert adapter.flat.any()
    assert not any(t.any() for t in twin.parameters())


def test_casting_casts_every_tensor_and_makes_leaves_anew() -> None:
    adapter = made("pissa")
    adapter.to(dtype=torch.float64)
    assert {t.dtype for _, _, t in adapter.named_tensors()} == {torch.float64}
    assert adapter.grad.dtype == torch.float64


def test_names_of_sites_and_parameters_are_listed_in_order_and_trained_ones_alone_on_request() -> None:
    adapter = made("pissa")
    everything = [(site, param) for site, param, _ in adapter.named_tensors()]
    assert everything[:4] == [(SITE, "A"), (SITE, "B"), (SITE, "A0"), (SITE, "B0")]
    assert [p for s, p, _ in adapter.named_tensors(trainable_only=True) if s == SITE] == ["A", "B"]


def test_frozen_global_tensors_are_freed_with_their_last_user() -> None:
    import gc
    import weakref

    host = Host(tiny("llama"))
    host.add("a", make_method("vera", rank=3, projection_key=77))
    host.add("b", make_method("vera", rank=3, projection_key=77), seed=9)
    projections = weakref.ref(host.adapter("a").tensors("")["A"].untyped_storage())
    assert host.adapter("a").tensors("")["A"].data_ptr() == host.adapter("b").tensors("")["A"].data_ptr()
    host.delete("a")
    host.delete("b")
    gc.collect()
    assert projections() is None


def test_another_seed_gives_other_values() -> None:
    host = Host(tiny("llama"))
    one, two = (host.add(str(seed), make_method("lora"), seed=seed) for seed in (0, 1))
    assert not torch.equal(one.flat, two.flat)
    sites = list(one.layout.sites)
    same_shape = [s for s in sites if s.endswith("q_proj")]
    first, second = (one.tensors(s)["A"] for s in same_shape[:2])
    assert not torch.equal(first, second), "sites of one seed have values of their own"


def test_adapters_that_were_cast_still_share_their_frozen_global_tensors_and_compute_what_they_did() -> None:
    host = Host(tiny("llama", dtype=torch.float64))
    ids = torch.tensor([[5, 9, 20], [7, 8, 30]])
    for seed, name in enumerate("ab"):
        host.add(name, make_method("vera", rank=3), seed=seed).flat.add_(0.1 * (seed + 1))
    with host.rows(["a", "b"]):
        before = host(input_ids=ids).logits
    for name in "ab":
        host.adapter(name).to(dtype=torch.float64)
    one, two = (host.adapter(name).tensors("") for name in "ab")
    assert one.keys() == two.keys() == {"A", "B"}
    assert {t.dtype for t in (*one.values(), *two.values())} == {torch.float64}
    assert all(one[param].data_ptr() == two[param].data_ptr() for param in one)
    with host.rows(["a", "b"]):
        torch.testing.assert_close(host(input_ids=ids).logits, before, rtol=0, atol=1e-6)
    host.adapter("a").to(dtype=torch.bfloat16)
    assert one["A"].data_ptr() != host.adapter("a").tensors("")["A"].data_ptr()
    assert host.adapter("b").tensors("")["A"].data_ptr() == two["A"].data_ptr(), "a cast of one is no cast of the other"
    half = host.add("c", make_method("vera", rank=3), dtype=torch.float64).to(dtype=torch.bfloat16)
    assert half.tensors("")["A"].data_ptr() == host.adapter("a").tensors("")["A"].data_ptr()
    with host.rows(["a", "c"]):
        assert host(input_ids=ids).logits.isfinite().all()
