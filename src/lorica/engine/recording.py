"""What goes through a host's passes: means of the blocks' outputs over the tokens that count, and the scalars of a
rank-1 adapter, token by token.

In: rows of tokens, each with the tokens that count and the adapters that act on it; or a user's own padded pass. Out:
running means by layer; scalars aligned with the tokens. Inside interventions the changed states are seen. Refuses to
know text, classes and files. B rows, T tokens, N tokens of all rows, D width, K sites.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorica.adapters.adapter import Adapter
from lorica.adapters.analysis.directions import RunningMean
from lorica.adapters.analysis.directions_rank1 import RankOne, rank_ones
from lorica.adapters.targets import Targets
from lorica.core.errors import DataError, MethodError
from lorica.data.packing import end_to_end
from lorica.engine.checks import check_positions, check_tokens
from lorica.engine.fast import fast_modules
from lorica.engine.host import Host, RowSpec, TargetSpec
from lorica.engine.interventions import hidden_of
from lorica.engine.trunk import Trunk
from lorica.models.positions import uniform_positions

TOKEN_BUDGET = 4096
"""Most tokens of one pass; a longer row runs alone."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A row to read: its tokens, which of them count, and the adapter (or stack, or None for the base)."""

    tokens: Sequence[int]
    counts: Sequence[bool]
    adapter: RowSpec = None


class MeanRecorder:
    """Token-weighted running means of block outputs.

    Args:
        host: the model with its adapters.
        layers: blocks to record; None is all.

    Attributes: `means` are the sums so far, by layer. Raises MethodError for a model without a list of blocks, or a
    layer that it lacks.
    """

    def __init__(self, host: Host, layers: Collection[int] | None = None) -> None:
        self.host = host
        blocks = host.backbone.blocks
        self.layers = tuple(blocks) if layers is None else tuple(sorted(layers))
        absent = [layer for layer in self.layers if layer not in blocks]
        if absent or not self.layers:
            said = f"layer {absent[0]} is not one" if absent else "none was named"
            raise MethodError(f"The layers of {host.backbone.name!r} are 0 to {len(blocks) - 1}, and {said}.")
        self._blocks = {layer: blocks[layer] for layer in self.layers}
        width = host.backbone.sites["input"].shape[0]
        self.means: dict[int, RunningMean] = {layer: RunningMean(width) for layer in self.layers}

    def read(self, rows: Sequence[Seen]) -> MeanRecorder:
        """Read these rows in packed passes, without padding, and add what counts.

        Raises DataError for a row that is empty, too long or has ids outside the vocabulary, RouteError for unknown
        adapters. After an error the means are as before.
        """
        fresh = {layer: RunningMean(len(mean.total_D)) for layer, mean in self.means.items()}
        for chunk in passes(self.host, rows):
            own = [rows[index] for index in chunk]
            with self._tapped(fresh, [torch.tensor(row.counts, dtype=torch.bool) for row in own]):
                run_packed(self.host, own)
        self.means = {layer: self.means[layer] + fresh[layer] for layer in self.layers}
        return self

    @contextmanager
    def watching(self, mask_BT: Tensor) -> Iterator[None]:
        """Inside, one pass of the user's own over padded rows is recorded: `mask_BT` says which tokens count, and no
        padding may. Virtual tokens before the real ones never count.

        Raises MethodError when it ends, where other than one pass was made, or one of another shape.
        """
        fresh = {layer: RunningMean(len(mean.total_D)) for layer, mean in self.means.items()}
        with self._tapped(fresh, list(mask_BT.bool())):
            yield
        self.means = {layer: self.means[layer] + fresh[layer] for layer in self.layers}

    @contextmanager
    def _tapped(self, means: Mapping[int, RunningMean], masks: Sequence[Tensor]) -> Iterator[None]:
        passes = dict.fromkeys(self.layers, 0)

        def see(layer: int, h: Tensor) -> None:
            passes[layer] += 1
            for own_TD, mask_T in zip(rows_of(self.host, h, [len(m) for m in masks]), masks, strict=True):
                means[layer].add(own_TD, mask_T)

        with ExitStack() as inside:
            for layer, block in self._blocks.items():
                inside.enter_context(_tap(block, _outputs(layer, see)))
            yield
        wrong = next((layer for layer, count in passes.items() if count != 1), None)
        if wrong is not None:
            raise MethodError(f"Layer {wrong} ran {passes[wrong]} times where one pass was to be recorded.")


def record_means(host: Host, rows: Sequence[Seen], layers: Collection[int] | None = None) -> dict[int, RunningMean]:
    """Means of block outputs over the tokens that count, of all these rows. See `MeanRecorder`."""
    return MeanRecorder(host, layers).read(rows).means


def record_scalars(
    host: Host, rows: Sequence[Seen], adapter: str | Adapter, *, targets: TargetSpec = None
) -> tuple[tuple[str, ...], list[Tensor]]:
    """The sites of a rank-1 adapter, and for each row `c_t = s (A·h_t) ‖B‖` of all its tokens, [T, K] in float64.

    Row i runs under `rows[i].adapter`; all tokens are recorded, whichever count. Raises MethodError where the adapter
    is not of rank 1, and what `MeanRecorder.read` raises. Paper: arXiv 2506.11618.
    """
    own = host.stacks([adapter])[0][0]
    ones = rank_ones(own, host.backbone, None if targets is None else Targets.of(targets))
    found = [torch.empty(len(row.tokens), len(ones), dtype=torch.float64) for row in rows]
    for chunk in passes(host, rows):
        lengths = [len(rows[index].tokens) for index in chunk]

        def see(x: Tensor, column: int, one: RankOne, chunk: list[int] = chunk, lengths: list[int] = lengths) -> None:
            for index, own_TI in zip(chunk, rows_of(host, x, lengths), strict=True):
                found[index][:, column] = one.scalars(own_TI).cpu()

        with ExitStack() as inside:
            for column, (name, one) in enumerate(ones.items()):
                inside.enter_context(_tap(host.backbone.module_of(name), _inputs(see, column, one)))
            run_packed(host, [rows[index] for index in chunk])
    return tuple(ones), found


# -- passes ------------------------------------------------------------------------------------------------------------


def passes(host: Host, rows: Sequence[Seen]) -> list[list[int]]:
    """Indices of rows in groups that share a packed pass. Raises DataError for rows that cannot be computed."""
    names = [f"Row {i}" for i in range(len(rows))]
    for name, row in zip(names, rows, strict=True):
        if len(row.tokens) != len(row.counts) or not len(row.tokens):
            raise DataError(f"{name} has {len(row.tokens)} tokens and {len(row.counts)} marks of which count.")
    trunk = Trunk(host)
    check_tokens(host.backbone, [row.tokens for row in rows], names)
    virtual = trunk.virtual(host.stacks([row.adapter for row in rows]))
    totals = [len(row.tokens) + soft + prefix for row, (soft, prefix) in zip(rows, virtual, strict=True)]
    check_positions(host.backbone, totals, names)
    alone, limit = not trunk.packs(), uniform_positions(host.model)
    chunks: list[list[int]] = []
    room = 0
    for index, total in enumerate(totals):
        single = alone or (limit is not None and total > limit)
        if not chunks or single or total > room:
            chunks.append([])
            room = TOKEN_BUDGET
        chunks[-1].append(index)
        room = 0 if single else room - total
    return chunks


@torch.no_grad()
def run_packed(host: Host, rows: Sequence[Seen]) -> None:
    """One packed pass of the trunk over rows, dropout off."""
    trunk = Trunk(host)
    packed = end_to_end([row.tokens for row in rows])
    with (
        trunk.modes(training=False),
        host.rows([row.adapter for row in rows], lengths=packed.lengths.tolist()),
        fast_modules(host.executor),
    ):
        trunk.hidden(packed)


def rows_of(host: Host, h: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """What each row's real tokens have in a tensor [rows, tokens, D] or [1, all rows' tokens, D] of the present pass:
    the last ones, behind virtual ones. Raises MethodError for a pass of other rows.
    """
    route = host.executor.live_route()
    if route is not None and route.lengths is not None:
        spans = route.lengths if h.numel() // h.shape[-1] == sum(route.lengths) else ()
        parts = list(h.reshape(-1, h.shape[-1]).split(list(spans))) if spans else []
    else:
        parts = list(h) if h.ndim == 3 else []
    if len(parts) != len(lengths) or any(p.shape[0] < n for p, n in zip(parts, lengths, strict=True)):
        raise MethodError(
            f"A pass with states of shape {tuple(h.shape)} was made where {len(lengths)} rows of {max(lengths)} tokens "
            "were to be recorded."
        )
    return [part[part.shape[0] - n :] for part, n in zip(parts, lengths, strict=True)]


def _outputs(layer: int, see: Callable[[int, Tensor], None]) -> Callable[..., None]:
    return lambda module, args, output: see(layer, hidden_of(output))


def _inputs(see: Callable[..., None], column: int, one: RankOne) -> Callable[..., None]:
    return lambda module, args, output: see(args[0], column, one)


@contextmanager
def _tap(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    """Inside, the module's calls are seen; nothing is changed."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
