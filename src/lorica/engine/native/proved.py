"""Kernels in C that agree with torch on this machine: they are handed out only after a probe of every function.

In: a dtype. Out: kernels for decoding steps and for training passes, or None. Refuses to know who uses them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.engine.native import kernels as steps
from lorica.engine.native import walk
from lorica.engine.native.build import library
from lorica.engine.native.kernels import MACROS, Kernels, LowRank, RowFactors, RowMaps
from lorica.engine.native.passes import SOURCE, Pair, Passes
from lorica.engine.native.walk import Adapted, Layer, Layers, Memory, Norm, Sampler, Walks

Some = Callable[..., Tensor]
"""Random numbers of a shape, in the dtype of the kernels or another."""
Pairs = list[tuple[Tensor, Tensor]]
"""What a kernel gives, and what torch does."""
K = TypeVar("K")
log = logging.getLogger(__name__)


@functools.cache
def kernels_for(dtype: torch.dtype) -> Kernels | None:
    """The kernels for steps of a backbone of this dtype on this machine's CPU; None where there are none that agree."""
    code = library(steps.SOURCE, MACROS[dtype]) if dtype in MACROS else None
    found = None if code is None else Kernels(code, dtype)
    return found if found is not None and _agree(_steps, found, dtype) else None


@functools.cache
def passes_for(dtype: torch.dtype) -> Passes | None:
    """The kernels for training passes, likewise."""
    code = library(SOURCE, MACROS[dtype]) if dtype in MACROS else None
    found = None if code is None else Passes(code, dtype)
    return found if found is not None and _agree(_passes, found, dtype) else None


@functools.cache
def walks_here() -> Walks | None:
    """The kernels for whole steps, likewise."""
    code = library(walk.SOURCE)
    found = None if code is None else Walks(code)
    kernels = kernels_for(torch.float32)
    if found is None or kernels is None:
        return None
    return found if _agree(lambda own, some: _walks(own, kernels, some), found, torch.float32) else None


def _some(dtype: torch.dtype) -> Some:
    rng = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=dtype: torch.randn(shape, generator=rng).to(dtype)


def _agree(probe: Callable[[K, Some], Pairs], kernels: K, dtype: torch.dtype) -> bool:
    error = 8 * torch.finfo(dtype).eps  # of the largest number: where terms cancel, two orders of a sum differ by more
    # whatever the caller's modes are
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        pairs = probe(kernels, _some(dtype))
    if not all(_near(own, other, error) for own, other in pairs):
        log.warning("kernels compiled for %s differ from torch here, and are not used", dtype)
        return False
    return True


def _near(own: Tensor, other: Tensor, error: float) -> bool:
    """Whether two tensors are the same up to an error relative to the largest number; tokens must be equal."""
    if not other.is_floating_point():
        return torch.equal(own, other)
    return torch.allclose(own.float(), other.float(), rtol=0, atol=error * float(other.abs().max()))


def _steps(kernels: Kernels, some: Some) -> Pairs:
    x_RD, branch_RD, factor_D = some(3, 64), some(3, 64), some(64, dtype=torch.float32)
    both_RD, normed_RD = kernels.sum_norm(x_RD, branch_RD, factor_D, 1e-6)
    pairs = [(both_RD, x_RD.float() + branch_RD.float()), (normed_RD, _normed(both_RD, factor_D))]
    pairs.append((kernels.norm(x_RD, factor_D, 1e-6), _normed(x_RD, factor_D)))
    pairs.append((kernels.gate(x_RD), F.silu(x_RD.float()[:, :32]) * x_RD.float()[:, 32:]))
    logits_RV = some(3, 300)
    tokens_R, values_R = kernels.draw(logits_RV, [0.0, 1.0, 0.5], [0.0, 0.3, 0.9])
    logprobs_RV = logits_RV.float().log_softmax(-1)
    pairs.append((values_R, logprobs_RV.gather(1, tokens_R[:, None])[:, 0]))
    pairs.append((tokens_R[:1], logits_RV.argmax(-1)[:1]))
    return [*pairs, *_factors(kernels, some), *_attention(kernels, some)]


def _normed(x: Tensor, factor_D: Tensor) -> Tensor:
    return F.rms_norm(x.float(), factor_D.shape, factor_D, 1e-6)


def _factors(kernels: Kernels, some: Some) -> Pairs:
    """Three rows at two maps: with factors at both, at the second, at the first."""
    x_RI, y_RO, sizes = some(3, 64), some(3, 96), (64, 32)
    missing = {(1, 0), (2, 1)}
    rows = [
        [None if (n, m) in missing else RowFactors(some(5, 64), some(5, sizes[m])) for m in (0, 1)] for n in range(3)
    ]
    wanted_RO = y_RO.float()
    for row, own in enumerate(rows):
        for start, pair in zip((0, 64), own, strict=True):
            if pair is not None:
                a, b = pair.A_RI.float(), pair.B_RO.float()
                wanted_RO[row, start : start + b.shape[1]] += x_RI[row].float() @ a.T @ b
    LowRank(kernels, [RowMaps(row) for row in rows], sizes).add(x_RI, y_RO)
    B_OR = some(32, 5, dtype=torch.float32)
    turned_RO = kernels.transposed(B_OR, 2.0)
    assert turned_RO is not None
    return [(y_RO, wanted_RO), (turned_RO, 2 * B_OR.mT)]


def _attention(kernels: Kernels, some: Some) -> Pairs:
    """Four heads on two, a window of four of six slots; the first slot of the first row is a prefix."""
    x_RD, kept = some(2, 4 * 16 + 4 * 16), (some(4, 8, 16, dtype=torch.float32), some(4, 8, 16, dtype=torch.float32))
    cos_RK, sin_RK, factor_SK = (some(n, 16, dtype=torch.float32) for n in (2, 2, 6))
    heads_RSK = F.rms_norm(x_RD.float()[:, : 6 * 16].view(2, 6, 16), (16,), None, 1e-6) * factor_SK
    heads_RSK = heads_RSK * cos_RK[:, None] + heads_RSK.roll(8, -1) * sin_RK[:, None]
    q_RHK, k_RGK = kernels.turn(x_RD, factor_SK, cos_RK, sin_RK, (4, 2, 16), 1e-6)
    v_RGK, slot, window = x_RD.view(2, 8, 16)[:, 6:], 5, 4
    seen = torch.tensor([0, 1]), torch.tensor([1, 1])
    y_RHK = kernels.attend(q_RHK, k_RGK, v_RGK, kept, seen, slot, window, 0.3)
    keys_RGSK, values_RGSK = (part.view(2, 2, 8, 16)[:, :, : slot + 1].repeat_interleave(2, 1) for part in kept)
    visible_RS = torch.tensor([[1, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]).bool()
    scores_RHS = (q_RHK[:, :, None] @ keys_RGSK.mT)[:, :, 0] * 0.3
    weights_RHS = scores_RHS.masked_fill(~visible_RS[:, None], -torch.inf).softmax(-1)
    wanted_RHK = (weights_RHS[:, :, None] @ values_RGSK)[:, :, 0]
    newest = [part.view(2, 2, 8, 16)[:, :, slot] for part in kept]
    turned = [(q_RHK, heads_RSK[:, :4]), (k_RGK, heads_RSK[:, 4:])]
    return [*turned, (newest[0], k_RGK), (newest[1], v_RGK), (y_RHK, wanted_RHK)]


def _passes(passes: Passes, some: Some) -> Pairs:
    """Every function, forth as torch has it and back as its autograd does."""
    x_NHK, dy_NHK, factor_K = some(1, 6, 4, 32)[:, :, 1:3], some(1, 6, 2, 32), some(32, dtype=torch.float32)
    wide_NHK = x_NHK.float().requires_grad_()
    wanted_NHK = _normed(wide_NHK, factor_K)
    y_NHK, root = passes.norm_forth(x_NHK, factor_K, 1e-6, rounded=False)
    (dx_NHK,) = torch.autograd.grad(wanted_NHK, wide_NHK, dy_NHK.float())
    pairs = [(y_NHK, wanted_NHK.detach()), (passes.norm_back(dy_NHK, x_NHK, factor_K, root), dx_NHK)]
    gate_NF, up_NF = some(5, 64).split(32, dim=1)
    g_NF, u_NF, dy_NF = gate_NF.float().requires_grad_(), up_NF.float().requires_grad_(), some(5, 32)
    h_NF = F.silu(g_NF) * u_NF
    pairs.append((passes.gate_forth(gate_NF, up_NF), h_NF.detach()))
    wanted = torch.autograd.grad(h_NF, (g_NF, u_NF), dy_NF.float())
    pairs += zip(passes.gate_back(dy_NF, gate_NF, up_NF), wanted, strict=True)
    return [*pairs, *_turned(passes, some), *_few(passes, some), *_products(passes, some)]


def _turned(passes: Passes, some: Some) -> Pairs:
    """Two heads of three, rows apart; gradients whose heads lie before their rows."""
    float32, pairs = torch.float32, []
    rotations = some(5, 1, 32, dtype=float32), some(5, 1, 32, dtype=float32)
    x_ND, dy_NHK = some(5, 96)[:, 32:], some(2, 5, 32).transpose(0, 1)
    for factor_K in (None, some(32, dtype=float32)):
        wide_ND = x_ND.float().requires_grad_()
        heads_NHK = wide_ND.view(5, 2, 32)
        heads_NHK = heads_NHK if factor_K is None else _normed(heads_NHK, factor_K)
        wanted_NHK = heads_NHK * rotations[0] + heads_NHK.roll(16, -1) * rotations[1]
        y_NHK, root = passes.turn_forth(x_ND, factor_K, rotations, 1e-6)
        norm = None if factor_K is None or root is None else (x_ND, factor_K, root)
        wanted_ND = torch.autograd.grad(wanted_NHK, wide_ND, dy_NHK.float())[0]
        pairs += [(y_NHK, wanted_NHK.detach()), (passes.turn_back(dy_NHK, rotations, norm), wanted_ND)]
    return pairs


def _few(passes: Passes, some: Some) -> Pairs:
    float32, dx_NI = torch.float32, some(3, 32)
    pair = Pair(some(5, 32, dtype=float32), some(24, 5, dtype=float32), 8, 0.5)
    x_NI, y_NO, dy_NO = (some(3, n, dtype=float32) for n in (32, 40, 40))
    h_NR, own_NO = x_NI @ pair.A_RI.T, dy_NO[:, 8:32]
    wanted_NO, wanted_NI = y_NO.clone(), dx_NI.float() + 0.5 * own_NO @ pair.B_OR @ pair.A_RI
    wanted_NO[:, 8:32] += 0.5 * h_NR @ pair.B_OR.T
    got_NR = passes.factors_forth([pair], x_NI, y_NO)
    dh_NR, ((dA_RI, dB_OR),) = passes.factors_back([pair], x_NI, dy_NO, got_NR, [(True, True)])
    passes.factors_input([pair], dh_NR, dx_NI)
    assert dA_RI is not None
    assert dB_OR is not None
    grads = [(dA_RI, (0.5 * own_NO @ pair.B_OR).T @ x_NI), (dB_OR, 0.5 * own_NO.T @ h_NR)]
    return [(got_NR, h_NR), (y_NO, wanted_NO), *grads, (dx_NI, wanted_NI)]


def _products(passes: Passes, some: Some) -> Pairs:
    found: Pairs = []
    weights, bias_O = [some(8, 32), some(4, 32)], some(12)
    wide_OI = torch.cat(weights).float()
    for rows in range(1, 5):
        x_NI, dy_NO = some(rows, 32), some(rows, 12)
        found.append((passes.linear_forth(x_NI, weights, bias_O), F.linear(x_NI.float(), wide_OI, bias_O.float())))
        found.append((passes.linear_back(dy_NO, weights), dy_NO.float() @ wide_OI))
    return found


def _walks(walks: Walks, kernels: Kernels, some: Some) -> Pairs:
    """Products of up to a tile of rows and one more, then two layers by their parts; one row sees nothing."""
    pairs: Pairs = []
    weight_OI, bias_O = some(96, 32), some(96)
    laid = walks.panels([weight_OI[:64], weight_OI[64:]])
    assert laid is not None
    for rows in range(1, 14):
        x_NI = some(rows, 32)
        own = [
            [RowFactors(some(5, 32), some(5, n)) if (row, n) != (1, 64) else None for n in (64, 32)]
            for row in range(rows)
        ]
        low = LowRank(kernels, [RowMaps(row) for row in own], (64, 32))
        wanted_NO = F.linear(x_NI, weight_OI, bias_O)
        low.add(x_NI, wanted_NO)
        pairs.append((Adapted(walks, laid, bias_O, low)(x_NI), wanted_NO))
    return pairs + _layers(walks, kernels, some)


def _layers(walks: Walks, kernels: Kernels, some: Some) -> Pairs:
    heads, width, inner, rows, places, slot = (4, 2, 16), 64, 48, 3, torch.tensor([2, -1, 0]), 5

    def maps(inputs: int, outputs: int) -> Adapted:
        laid = walks.panels([some(outputs, inputs) * inputs**-0.5])
        assert laid is not None
        own = [RowMaps([RowFactors(some(4, inputs), 0.1 * some(4, outputs))]) for _ in range(rows)]
        return Adapted(walks, laid, None, LowRank(kernels, own, [outputs]))

    def norm(size: tuple[int, ...]) -> Norm:
        return Norm(1 + 0.1 * some(*size), 1e-6)

    def layer(turn: Norm | None, window: int) -> Layer:
        both = maps(width, 2 * inner), maps(inner, width)
        return Layer(norm((width,)), maps(width, 128), turn, maps(64, width), norm((width,)), *both, 0.3, window)

    chosen, last = [layer(norm((6, 16)), 0), layer(None, 4)], norm((width,))
    seen = torch.tensor([0, 2, 1]), torch.tensor([1, 2, 1])
    memory = [Memory(some(6, 8, 16), some(6, 8, 16), *seen) for _ in chosen]
    kept = [(own.keys.clone(), own.values.clone()) for own in memory]
    x_RD, turns = some(rows, width), (some(rows, 16), some(rows, 16))
    whole = Layers(walks, chosen, last, heads)
    whole.remember(memory)
    y_RD = whole(x_RD.clone(), turns, places, slot)
    for own, (keys, values) in zip(chosen, kept, strict=True):
        norm_, turn = kernels.norm(x_RD, own.norm.factor_D, own.norm.eps), own.turn
        qkv_RO = own.qkv(norm_)
        q, k = kernels.turn(qkv_RO, None if turn is None else turn.factor_D, *turns, heads, 1e-6)
        mixed_RHK = torch.zeros(rows, 4, 16)
        for row, place in enumerate(places.tolist()):
            if place >= 0:
                one, at = slice(row, row + 1), slice(2 * place, 2 * place + 2)
                newest = q[one], k[one], qkv_RO[one].view(1, 8, 16)[:, 6:]
                spans = seen[0][place : place + 1], seen[1][place : place + 1]
                mixed_RHK[one] = kernels.attend(*newest, (keys[at], values[at]), spans, slot, own.window, own.scale)
        x_RD, y = kernels.sum_norm(x_RD, own.out(mixed_RHK.flatten(1)), own.after.factor_D, own.after.eps)
        x_RD = x_RD + own.down(kernels.gate(own.both(y)))
    live_R = places >= 0
    pairs = [(y_RD[live_R], kernels.norm(x_RD, last.factor_D, last.eps)[live_R])]
    pairs += _sampled(Sampler(whole, some(96, width), maps(width, 96)), kernels, some, places)
    return pairs + [
        (new[:, : slot + 1], old[:, : slot + 1])
        for own, old_ in zip(memory, kept, strict=True)
        for new, old in zip((own.keys, own.values), old_, strict=True)
    ]


def _sampled(sampler: Sampler, kernels: Kernels, some: Some, places_R: Tensor) -> Pairs:
    """Two tokens in one call, then one by one: a row that is likeliest, one that sees nothing, one that is drawn."""
    ids_R, positions_R, turns = torch.tensor([5, 0, 7]), torch.tensor([3, 0, 1]), (some(8, 16), some(8, 16))
    heat_R, uniform_CR, slot, live_R = torch.tensor([0.0, 0.0, 1.0]), some(2, 3).abs() % 1, 6, places_R >= 0
    together = sampler(ids_R, positions_R, places_R, turns, heat_R, uniform_CR, slot)
    pairs: Pairs = []
    for step, (tokens_R, logprobs_R) in enumerate(zip(*together, strict=True)):
        x_RD = sampler.embedding.index_select(0, ids_R)
        own = tuple(table.index_select(0, positions_R + step) for table in turns)
        logits_RV = sampler.head(sampler.layers(x_RD, (own[0], own[1]), places_R, slot + step))
        drawn = kernels.draw(logits_RV, heat_R.tolist(), uniform_CR[step].tolist())
        pairs += [(new[live_R], old[live_R]) for new, old in zip((tokens_R, logprobs_R), drawn, strict=True)]
        ids_R = tokens_R
    return pairs
