"""Of a prompt whose tokens nobody asks about, only the last one goes through the last feed-forward block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorica.core.errors import RouteError
from lorica.data.packing import end_to_end
from lorica.engine.fast import fast_modules
from lorica.engine.host import Host
from lorica.engine.prompts import Prompt, read
from lorica.engine.trunk import Trunk
from lorica.methods.ia3 import IA3
from lorica.methods.lora import LoRA
from lorica.methods.norm import Norm
from lorica.methods.prefix import Prefix
from lorica.methods.prompt import Prompt as Soft
from tests.tiny import tiny

METHODS = {"lora": LoRA(rank=4), "ia3": IA3(), "norm": Norm(), "prefix": Prefix(tokens=3), "soft": Soft(tokens=2)}
ROWS = [[3, 4, 5], [6], [7, 8, 9, 10], [11, 12], [13, 14]]
LENGTHS = [len(row) for row in ROWS]


def host_of(family: str) -> Host:
    host = Host(tiny(family))
    for seed, (name, method) in enumerate(METHODS.items()):
        adapter = host.add(name, method, seed=seed)
        adapter.flat.add_(0.1 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(seed)))
    host.model.eval()
    return host


def watched(block: nn.Module) -> tuple[list[int], nn.Module]:
    """How many positions a block's first linear map is handed from now on."""
    seen: list[int] = []
    part = next(module for module in block.modules() if isinstance(module, nn.Linear))
    own = part.forward
    part.__dict__["forward"] = lambda x: (seen.append(x.numel() // x.shape[-1]), own(x))[1]
    return seen, part


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3-moe"])
@pytest.mark.parametrize(
    "names", [[None] * 5, ["lora", None, "ia3", "lora", "norm"], ["prefix", "lora", None, "norm", "lora"]]
)
def test_the_ends_of_rows_are_those_of_the_whole_pass(family: str, names: list[str | None]) -> None:
    host = host_of(family)
    trunk, packed = Trunk(host), end_to_end(ROWS)
    with host.rows(names, lengths=LENGTHS), fast_modules(host.executor):
        cut = trunk.cut(LENGTHS)
        assert cut is not None
        whole_ND, ends_RD = trunk.hidden(packed), trunk.hidden(packed, cut)
    last = torch.tensor(LENGTHS).cumsum(0) - 1
    torch.testing.assert_close(ends_RD, whole_ND[last], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_row_with_a_soft_prompt_has_every_position_computed() -> None:
    host = host_of("qwen3")
    with host.rows(["soft", "lora", None, None, None], lengths=LENGTHS), fast_modules(host.executor):
        assert Trunk(host).cut(LENGTHS) is None
    stacks = host.stacks(["soft", "lora", None, None, None])
    prompts = [Prompt(row, stack) for row, stack in zip(ROWS, stacks, strict=True)]
    together = read(Trunk(host), prompts, keep=False)
    for prompt, own in zip(prompts, together, strict=True):
        (alone,) = read(Trunk(host), [prompt], keep=False)
        torch.testing.assert_close(own.hidden_D, alone.hidden_D, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("scores", [False, True])
def test_only_last_tokens_reach_the_last_block_unless_all_are_asked_about(scores: bool) -> None:
    host = host_of("qwen3")
    trunk = Trunk(host)
    assert trunk.packs()
    seen, part = watched(host.model.model.layers[-1].mlp)
    prompts = [Prompt(row, (), scores=scores and index == 0) for index, row in enumerate(ROWS)]
    found = read(trunk, prompts, keep=True)
    assert seen == [sum(map(len, ROWS)) if scores else len(ROWS)]
    assert [read_.kept.total for read_ in found if read_.kept is not None] == [len(row) for row in ROWS]
    part.__dict__.pop("forward")


@torch.no_grad()
def test_who_listens_to_the_last_block_hears_every_token() -> None:
    host = host_of("qwen3")
    trunk, heard = Trunk(host), []

    def listen(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        heard.append(out.numel() // out.shape[-1])

    plain = read(trunk, [Prompt(row, ()) for row in ROWS], keep=False)
    handle = host.model.model.layers[-1].mlp.down_proj.register_forward_hook(listen)
    listened = read(trunk, [Prompt(row, ()) for row in ROWS], keep=False)
    handle.remove()
    assert sum(heard) == sum(map(len, ROWS))
    for one, other in zip(plain, listened, strict=True):
        torch.testing.assert_close(one.hidden_D, other.hidden_D, rtol=1e-4, atol=1e-5)


def test_another_number_of_rows_is_refused_as_ever() -> None:
    host = host_of("qwen3")
    trunk = Trunk(host)
    with host.rows([None] * 2, lengths=[3, 1]), pytest.raises(RouteError, match="rows"):
        trunk.hidden(end_to_end(ROWS), trunk.cut(LENGTHS))
