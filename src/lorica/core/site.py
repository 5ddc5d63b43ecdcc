"""A site: a named place in a backbone where a method can act.

In: nothing. Out: plain frozen records; `models/` lists them, methods read their shapes, the executor acts on them.
Shapes are normalised here once: a linear weight is always `[out, in]`, whatever the module stores.
Refuses to know tensors, modules and methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SiteKind = Literal["linear", "embedding", "conv", "norm", "attention", "input", "expert"]
SITE_KINDS: tuple[SiteKind, ...] = ("linear", "embedding", "conv", "norm", "attention", "input", "expert")


@dataclass(frozen=True, slots=True)
class Site:
    """One place where an update can act.

    Attributes:
        name: dotted path of the module in the backbone, e.g. `model.layers.0.self_attn.q_proj`. An expert's site
            is `<experts module>.<expert index>.<parameter>`; the input site is called `input`.
        kind: what acts there; see `SITE_KINDS`.
        shape: the normalised weight shape. linear, expert: (out, in); embedding: (dim, tokens),
            an embedding being a linear map of one-hot tokens; conv: (out, in / groups, *kernel); norm: (features,);
            attention: (kv heads, head dim); input: (dim,).
        bias: whether the module has a bias that an update's bias can be folded into.
        layer: index of the block that holds it, from the first number in the path; None outside blocks.
        transposed: the module stores the weight as [in, out] (GPT-2's Conv1D, every embedding table).
        tied: the weight is shared with another site (tied embeddings), so it cannot be merged alone.
        scale: constant by which the module multiplies its output (Gemma's embedding); 1 elsewhere.
        head: the site is the output embedding (language-model head or classifier), left out of `all-linear`.
        router: the site chooses experts for tokens, left out of `all-linear`.
        expert: index of the expert inside a fused tensor, or None.
        query_heads: attention only; the number of query heads.
        parts: of a weight that holds several maps of one input below each other, each map's name and outputs in order:
            `(("q", 768), ("k", 768), ("v", 768))`; empty elsewhere.
    """

    name: str
    kind: SiteKind
    shape: tuple[int, ...]
    bias: bool = False
    layer: int | None = None
    transposed: bool = False
    tied: bool = False
    scale: float = 1.0
    head: bool = False
    router: bool = False
    expert: int | None = None
    query_heads: int = 0
    parts: tuple[tuple[str, int], ...] = ()

    @property
    def role(self) -> str:
        """The last part of the name: `q_proj`."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[-1] if self.kind != "conv" else self.shape[1]
