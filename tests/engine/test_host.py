"""A host: what it refuses, what it remembers, and that nothing costs more with many residents."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorica.core.errors import MergeError, MethodError, RouteError, TargetError
from lorica.engine.host import Host, attach
from lorica.methods import make_method
from tests.contract.cases import perturb
from tests.tiny import tiny

LORA = make_method("lora", rank=2)
IDS = torch.tensor([[5, 9, 20], [7, 8, 30]])


@pytest.fixture
def host() -> Host:
    made = Host(tiny("llama", dtype=torch.float64))
    for seed, name in enumerate(("alpha", "beta")):
        perturb(made.add(name, LORA, "q_proj", seed=seed, dtype=torch.float64))
    return made


def test_attach_freezes_adds_and_activates() -> None:
    model = tiny("llama").module.requires_grad_(True).train()
    made = attach(model, LORA, ["q_proj", "v_proj"], name="mine", seed=3)
    assert made.active == ("mine",)
    assert made.model is model
    assert not any(p.requires_grad for p in model.parameters())
    assert len(made.adapter("mine").layout.sites) == 4
    assert len(made.parameters()) == 8


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda h: h.activate("alhpa"), "no adapter 'alhpa'. Did you mean 'alpha'"),
        (lambda h: h.activate("alpha", "alpha"), "names an adapter twice"),
        (lambda h: h.add("alpha", LORA), "an adapter 'alpha' already"),
        (lambda h: h.delete("gamma"), "no adapter 'gamma'"),
        (lambda h: h.adapter(), "Name an adapter: 0 are active"),
        (lambda h: h.rows(["alpha", "gamma"]).__enter__(), "no adapter 'gamma'"),
        (lambda h: h.rows(["alpha"], lengths=[1, 2]).__enter__(), "2 packed rows and 1 rows"),
    ],
)
def test_names_that_are_wrong_are_refused(host: Host, act: Any, words: str) -> None:
    with pytest.raises(RouteError, match=words):
        act(host)
    assert host.active == ()


def test_merging_nothing_and_unmerging_nothing_are_refused(host: Host) -> None:
    with pytest.raises(MergeError, match="No adapter is active"):
        host.merge()
    with pytest.raises(MergeError, match="Nothing is merged"):
        host.unmerge()


def test_a_second_host_on_one_model_is_refused_until_the_first_detaches(host: Host) -> None:
    with pytest.raises(MethodError, match="attached already"):
        Host(host.backbone)
    base = host.detach()
    again = Host(base)
    again.add("alpha", LORA, "q_proj")
    assert list(again.adapters) == ["alpha"]


def test_rows_nest_and_restore_what_was_active(host: Host) -> None:
    host.activate("alpha")
    y = host(input_ids=IDS).logits
    with host.rows(["beta", None]):
        assert host.active == ()
        with host.rows([None, "alpha"]):
            inner = host(input_ids=IDS).logits
        outer = host(input_ids=IDS).logits
    assert host.active == ("alpha",)
    assert torch.equal(host(input_ids=IDS).logits, y)
    torch.testing.assert_close(inner[1], y[1])
    assert not torch.allclose(outer[0], inner[0])


def test_an_exception_inside_rows_restores_what_was_active(host: Host) -> None:
    host.activate("beta")
    with pytest.raises(RuntimeError, match="stop"), host.rows(["alpha", "alpha"]):
        raise RuntimeError("stop")
    assert host.active == ("beta",)


def test_a_forward_that_fails_leaves_the_next_one_right(host: Host) -> None:
    host.activate("alpha")
    y = host(input_ids=IDS).logits
    with pytest.raises(IndexError):
        host(input_ids=torch.tensor([[500]]))
    assert torch.equal(host(input_ids=IDS).logits, y)


def test_deleting_an_adapter_that_rows_name_leaves_those_rows_to_the_base(host: Host) -> None:
    with host.disabled():
        base = host(input_ids=IDS).logits
    with host.rows(["alpha", "beta"]):
        both = host(input_ids=IDS).logits
        host.delete("alpha")
        left = host(input_ids=IDS).logits
    torch.testing.assert_close(left[0], base[0])
    torch.testing.assert_close(left[1], both[1])


@pytest.mark.parametrize("inside", ["disabled", "rows"])
def test_an_adapter_deleted_inside_a_context_does_not_come_back_when_it_ends(host: Host, inside: str) -> None:
    host.activate("beta")
    left = host(input_ids=IDS).logits
    host.activate("alpha", "beta")
    with host.disabled() if inside == "disabled" else host.rows(["alpha", None]):
        host.delete("alpha")
    assert host.active == ("beta",)
    assert torch.equal(host(input_ids=IDS).logits, left)


def test_adapters_of_equal_method_and_targets_share_one_layout(host: Host) -> None:
    assert host.adapter("alpha").layout is host.adapter("beta").layout
    assert host.layout(LORA, "v_proj") is not host.layout(LORA, "q_proj")


def test_a_deleted_name_can_be_used_again(host: Host) -> None:
    host.delete("alpha")
    assert host.add("alpha", make_method("ia3")).method.name == "ia3"


def test_a_target_that_matches_nothing_leaves_no_adapter_behind(host: Host) -> None:
    with pytest.raises(TargetError, match="'q_porj' matches no site.*Did you mean 'q_proj'"):
        host.add("gamma", LORA, "q_porj")
    assert "gamma" not in host.adapters


def test_a_hundred_residents_do_not_change_a_forward_pass(host: Host) -> None:
    host.activate("alpha")
    y = host(input_ids=IDS).logits
    for i in range(100):
        host.add(f"more {i}", LORA, "q_proj", seed=i)
    assert torch.equal(host(input_ids=IDS).logits, y)
    assert len(host._hooks.forwards) == 2, "a site is covered once, however many adapters act there"


def test_train_turns_the_model_to_training_and_eval_back(host: Host) -> None:
    assert host.train().model.training
    assert not host.eval().model.training
