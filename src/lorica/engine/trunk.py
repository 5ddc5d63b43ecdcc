"""A backbone's trunk over packed rows: hidden states under the present route, with soft prompts and prefixes in place.

In: packed tokens, a route. Out: final hidden states of the real tokens, in their order. Refuses to know losses, logits
and sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lorica.core.errors import MethodError
from lorica.core.update import SoftPrompt
from lorica.data.packing import Packed, end_to_end
from lorica.engine.abilities import probe_packing
from lorica.engine.attention import without_mask
from lorica.engine.chain import Cut, last_block, packed_walk_of
from lorica.engine.fast import fast_modules
from lorica.engine.host import Host
from lorica.engine.modes import in_mode
from lorica.engine.route import Stack
from lorica.models.backbone import Backbone
from lorica.models.positions import forget_longest

KEPT = "packs"


class Trunk:
    """The trunk of a host's backbone, which must be a causal language model. Raises MethodError for any other."""

    def __init__(self, host: Host) -> None:
        backbone = host.backbone
        if not backbone.is_causal_lm:
            raise MethodError(f"{backbone.name!r} is not a causal language model, so it has no next-token loss.")
        if backbone.trunk is None:
            raise MethodError(
                f"{backbone.name!r} ({backbone.family}) makes its logits in a way of its own, which the engine cannot "
                "run.",
                hint="Its adapters still work when the model itself is called, as `host(input_ids=…)`.",
            )
        self.host = host
        self.hub = host.attention_hub()

    @property
    def backbone(self) -> Backbone:
        return self.host.backbone

    def packs(self) -> bool:
        """Whether rows may share a pass; asked once for the frozen weights. Raises MethodError for a backbone that
        cannot run packed passes at all.
        """
        self.backbone.refresh()
        kept = self.backbone.kept
        if KEPT not in kept:
            with self.modes(training=False):
                kept[KEPT] = probe_packing(self.backbone, self._packed, self.alone)
        return bool(kept[KEPT])

    def _packed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        with self.host.rows([None] * len(rows), lengths=[len(row) for row in rows]), fast_modules(self.host.executor):
            return self.hidden(end_to_end(rows))

    def alone(self, row: Sequence[int]) -> Tensor:
        """Hidden states [tokens, width] of one row of the base in the model's own pass."""
        assert self.backbone.trunk is not None
        with self.host.executor.replay(None):
            hidden_1TD: Tensor = self.backbone.trunk(input_ids=self.tensor([list(row)]), use_cache=False)[0]
        return hidden_1TD[0]

    @contextmanager
    def modes(self, *, training: bool) -> Iterator[None]:
        """Inside, every module is in this mode; afterwards each is in its own again."""
        with in_mode(self.backbone.tree.modules, training=training):
            yield

    def virtual(self, stacks: Sequence[Stack]) -> list[tuple[int, int]]:
        """How many soft-prompt tokens and prefix positions stand before each row."""
        with self.host.rows(stacks), torch.no_grad():
            soft = [sum(p.shape[0] for p in row) for row in self._prompts(len(stacks))]
            return list(zip(soft, self.hub.prefix_lengths(len(stacks)), strict=True)) if stacks else []

    def longer(self, rows: int) -> bool:
        """Whether soft prompts stand before some of the rows under the present route."""
        return any(self._prompts(rows))

    def tensor(self, values: Sequence[float] | object, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.as_tensor(values, dtype=dtype, device=self.host.backbone.device)

    def hidden(self, packed: Packed, cut: Cut | None = None) -> Tensor:
        """Final hidden states [N, width] of the packed tokens under the present route, or of a cut's alone."""
        return self.walked(self.tensor(packed.tokens), self.tensor(packed.positions), packed.lengths.tolist(), cut)

    def cut(self, lengths: Sequence[int]) -> Cut | None:
        """The last token of each of these rows, where the others may stop before the last feed-forward block: rows
        share passes under the present route, and the trunk is a chain.
        """
        executor, rows = self.host.executor, len(lengths)
        if not self.packs() or self.longer(rows) or not (last_block(executor) and packed_walk_of(executor)):
            return None
        return Cut(self.tensor(lengths).cumsum(0) - 1, lambda: self.host.relengthened([1] * rows))

    def walked(self, ids_N: Tensor, positions_N: Tensor, lengths: list[int], cut: Cut | None = None) -> Tensor:
        """The same of tokens that are on the device; of those alone that a cut names, where the trunk is a chain."""
        backbone = self.backbone
        assert backbone.trunk is not None
        self.host.begin()
        forget_longest(backbone.module)
        prompts, prefix_lengths = self._prompts(len(lengths)), self.hub.prefix_lengths(len(lengths))
        shifts = [p + sum(t.shape[0] for t in row) for p, row in zip(prefix_lengths, prompts, strict=True)]
        if any(shifts):
            positions_N = positions_N + torch.repeat_interleave(self.tensor(shifts), self.tensor(lengths))
        if any(prompts):
            return self._with_prompts(ids_N, positions_N, lengths, prompts)
        walk = packed_walk_of(self.host.executor, cut)
        with without_mask():
            if walk is not None:
                return walk(ids_N[None], positions_N[None])[0]
            output = backbone.trunk(input_ids=ids_N[None], position_ids=positions_N[None], use_cache=False)
        hidden_1ND: Tensor = output[0]
        return hidden_1ND[0]

    def _prompts(self, rows: int) -> list[list[Tensor]]:
        site = self.host.backbone.sites.get("input")
        prompts: list[list[Tensor]] = [[] for _ in range(rows)]
        for item in self.host.executor.work_for_rows(site, rows) if site is not None else []:
            prompts[item.start] = [u.embeddings_PD for u in item.updates if isinstance(u, SoftPrompt)]
        return prompts

    def _with_prompts(
        self, ids_N: Tensor, positions_N: Tensor, lengths: list[int], prompts: list[list[Tensor]]
    ) -> Tensor:
        """The trunk over sequences with their soft prompts before them; the prompts' own hidden states are dropped."""
        backbone = self.backbone
        assert backbone.trunk is not None
        embeds_ND = backbone.module_of("input")(ids_N)
        pieces, places, real, start = [], [], [], 0
        for length, row in zip(lengths, prompts, strict=True):
            front = torch.cat([p.to(embeds_ND.dtype) for p in row]) if row else embeds_ND[:0]
            extra = front.shape[0]
            pieces += [front, embeds_ND[start : start + length]]
            # positions of the prompt count up to the first real token's
            places += [
                positions_N[start] - extra + torch.arange(extra, device=ids_N.device),
                positions_N[start : start + length],
            ]
            real += [False] * extra + [True] * length
            start += length
        longer = [length + sum(p.shape[0] for p in row) for length, row in zip(lengths, prompts, strict=True)]
        with self.host.relengthened(longer), without_mask():
            hidden_1ND: Tensor = backbone.trunk(
                inputs_embeds=torch.cat(pieces)[None], position_ids=torch.cat(places)[None], use_cache=False
            )[0]
        return hidden_1ND[0, torch.tensor(real, device=ids_N.device)]
