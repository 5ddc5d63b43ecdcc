"""Every method's adapter survives its files: equal outputs under another seed and name, and equal bytes again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorica.core.errors import MismatchError
from lorica.engine.host import Host
from lorica.methods import all_methods
from tests.contract.cases import Case, attached, backbone, every_kind, every_variant, inputs, output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@every_variant
def test_a_loaded_adapter_is_the_saved_one_and_saves_to_the_same_bytes(case: Case, tmp_path: Path) -> None:
    if case.method not in all_methods():
        return  # files name registered methods alone
    host = attached(case, dtype=torch.float32)
    given = inputs(host)
    y = output(host, given)
    folder = host.save(tmp_path / "one")
    other = Host(backbone(case.family, torch.float32))
    torch.manual_seed(99)
    other.load(folder, "another name")
    other.activate("another name")
    assert torch.equal(output(other, given), y)
    assert contents(other.save(tmp_path / "two")) == contents(folder)


@every_kind
def test_a_file_that_lacks_bytes_or_holds_nan_is_refused(case: Case, tmp_path: Path) -> None:
    from lorica.core.errors import FormatError

    if case.method not in all_methods():
        return  # files name registered methods alone
    host = attached(case, dtype=torch.float32)
    folder = host.save(tmp_path / "good")
    (weights,) = folder.glob("*.safetensors")
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError):
        host.load(folder, "cut")
    host.adapter("a").flat[0] = float("nan")
    with pytest.raises(FormatError, match="finite|NaN|nan"):
        host.load(host.save(tmp_path / "sick"), "sick")
    assert list(host.adapters) == ["a"]


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    folder = attached(Case("llama", "lora"), dtype=torch.float32).save(tmp_path / "one")
    with pytest.raises(MismatchError):
        Host(backbone("gpt2", torch.float32)).load(folder)
