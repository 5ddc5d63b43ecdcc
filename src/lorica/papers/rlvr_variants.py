"""The study of PEFT for RLVR: do SVD starts collapse, do structural variants win? Asked of supervised fine-tuning.

In equal settings: the same weights for all, and a learning rate for each. Checked on digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from lorica.methods import make_method
from lorica.papers.base import Figure, Say, Verdict
from lorica.papers.kit.arena import COLUMNS, Arena, Entry, race, rates
from lorica.papers.kit.contest import Contest, Contestant
from lorica.papers.kit.digits import HIDDEN
from lorica.papers.kit.judging import above, average, quality, together
from lorica.papers.kit.plot import Plot
from lorica.papers.kit.spectrum import Principal, changes, mean
from lorica.papers.kit.table import Row, Table
from lorica.papers.kit.task import DIGITS, FULL_GSM8K, TaskSettings, open_arena

STRUCTURAL, SVD = ("dora", "adalora", "miss"), ("pissa", "milora")
COLLAPSE = 0.1
"""How far behind LoRA is a collapse: accuracy, or a share of LoRA's loss."""


class Settings(TaskSettings):
    """A task, and what competes."""

    rank: int = Field(8, ge=1, description="rank of LoRA and its like, alpha = 2 rank; MiSS has twice that rank")
    vera_rank: int = Field(128, ge=1, description="rank of VeRA")
    directions: int = Field(8, ge=1, description="leading singular directions of each weight that count as principal")
    lrs: tuple[float, ...] = Field(description="learning rates to choose from, the same for all")


class RLVRVariantsPaper(Contest[Settings]):
    """All the study's methods learn the same task in the same batches, on the same weights (norm tuning: on the norms,
    which the base of digits has for this), each with its learning rate chosen by the validation loss from one wide
    grid; the left panel also has the results at the rate that suits LoRA, as the study had one rate for nearly all.
    `touching` is the share of the change ΔW since the start, squared, that reads from or writes to the leading singular
    directions of the weight, after one step, half-way and in the end; `inside` both reads and writes there. The claim
    shows when DoRA, AdaLoRA and MiSS beat LoRA on their mean, and PiSSA and MiLoRA fall behind it by more than 0.1.
    """

    name = "rlvr_variants"
    title = "Evaluating Parameter Efficient Methods for RLVR"
    authors = "Yin et al."
    venue = "preprint"
    year = 2025
    arxiv = "2512.23165"
    methods = ("lora", "dora", "adalora", "miss", "lora_fa", "vera", "ia3", "norm", "pissa", "milora", "delta")
    claim = (
        "Trained by reinforcement learning with verifiable rewards, structural variants (DoRA, AdaLoRA, MiSS) beat "
        "LoRA, methods that start from singular directions (PiSSA, MiLoRA) collapse, and very small ones are too weak."
    )
    figures = (
        Figure("1.5B, mean of six maths benchmarks: DoRA / full", "46.6 / 44.9", "the authors' README"),
        Figure("the same: AdaLoRA / MiSS / LoRA", "44.2 / 43.4 / 42.5", "second-hand: summaries"),
        Figure("the same: VeRA / IA³ / MiLoRA / PiSSA", "40.7 / 22.3 / 18.0 / 0.2", "second-hand: summaries"),
        Figure("7B: DoRA and LoRA+ / LoRA", "55.0 / 54.8", "second-hand: summaries"),
    )
    limits = (
        "This is supervised; reinforcement learning comes with another issue, and whether methods collapse there is "
        "not answered here. In the study's code the methods had different target weights and one learning rate for "
        "nearly all, and AdaLoRA neither its allocator nor its penalty: its ordering mixes methods with settings. A "
        "first run, on new classes of digits, did not show the claim either; turned digits came after that."
    )
    keys = ("method", "lr")
    columns: ClassVar = {
        **COLUMNS,
        "touching, step 1": "share of ‖ΔW‖² in the rows or columns of W₀'s leading singular subspace after one step",
        "touching, half": "the same half-way",
        "touching": "the same in the end",
        "inside": "share in both its rows and columns, in the end",
        "chance": "what touches of a change without direction",
    }

    small = Settings(
        task="turned-digits",
        width=128,
        depth=3,
        steps=100,
        train_rows=400,
        lrs=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    )
    full = Settings(
        **FULL_GSM8K,
        model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        steps=1000,
        batch_size=16,
        exact=500,
        rank=32,
        vera_rank=256,
        directions=32,
        lrs=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    )
    reduced = Settings(
        task="turned-digits", width=64, depth=2, steps=40, train_rows=300, vera_rank=64, lrs=(1e-2, 3e-2, 1e-1)
    )

    def contestants(self, settings: Settings) -> Sequence[Contestant]:
        r, steps = settings.rank, settings.steps
        low = {"rank": r, "alpha": 2.0 * r}
        first = round(1.5 * r)
        pruned = {"rank": first, "keep": r / first, "alpha": 2.0 * first, "warmup": steps // 10, "final": steps // 4}
        variants = {
            "full": make_method("delta"),
            "lora": make_method("lora", **low),
            "lora rank 1": make_method("lora", rank=1, alpha=2.0),
            "rslora": make_method("lora", **low, rslora=True),
            "lora+": make_method("lora", **low, lr_ratio=16.0),
            "lora_fa": make_method("lora_fa", **low),
            "dora": make_method("dora", **low),
            "adalora": make_method("adalora", **pruned, orthogonality=0.1),
            "miss": make_method("miss", rank=2 * r),
            "vera": make_method("vera", rank=settings.vera_rank),
            "ia3": make_method("ia3"),
            "norm": make_method("norm"),
            "pissa": make_method("pissa", **low),
            "milora": make_method("milora", **low),
            "milora++": make_method("milora", **low, start="subspace"),
        }
        return [Contestant({"method": label}, method, settings.lrs) for label, method in variants.items()]

    def run(self, settings: Settings, seed: int, say: Say) -> list[Row]:
        arena = open_arena(settings, seed, norms=True)
        linear = HIDDEN if settings.task in DIGITS else "all-linear"
        entries = [
            Entry(e.key, e.method, e.optimizer, "all-norm" if e.method.name == "norm" else linear)
            for own in self.contestants(settings)
            for e in rates(own.key, own.method, own.lrs, own.optimizer)
        ]
        principal = Principal(settings.directions)
        early: list[Row] = [{} for _ in entries]
        moments = {1: "touching, step 1", settings.steps // 2: "touching, half"}

        def watch(step: int, losses: Sequence[float]) -> None:
            if step in moments:
                for own, found in zip(early, spectra(arena, principal), strict=True):
                    own.update({moments[step]: found["touching"]} if found else {})

        rows = race(arena, entries, steps=settings.steps, seed=seed, say=say, watch=watch)
        late = spectra(arena, principal)
        return [{**row, **before, **after} for row, before, after in zip(rows, early, late, strict=True)]

    def judge(self, table: Table) -> Verdict:
        best, measure = self.listed(table), quality(table)
        lora = {"method": "lora"}
        scale = 1.0 if measure.largest else best.mean(measure.column, **lora)
        shared = table.where(lr=best.line(**lora).key["lr"])

        def over(found: Table, names: Sequence[str]) -> tuple[bool | None, str]:
            gain = average([measure.gain(found, {"method": name}, lora) for name in names])
            shows = above(gain) if names is STRUCTURAL else above(gain, -COLLAPSE * scale)
            return shows, f"{gain.mean:+.3f} ± {gain.error:.3f}"

        (wins, structural), (stands, svd) = over(best, STRUCTURAL), over(best, SVD)
        said = f"Each at its best rate, DoRA, AdaLoRA and MiSS gain {structural} (standard error) of {measure.column} "
        said += f"over LoRA on their mean, PiSSA and MiLoRA {svd}. At the rate that is LoRA's best they gain "
        said += f"{over(shared, STRUCTURAL)[1]} and {over(shared, SVD)[1]}."
        start, end = ([best.mean(c, method=m) for m in ("lora", *SVD)] for c in ("touching, step 1", "touching"))
        said += " Of the changes' squares, LoRA's, PiSSA's and MiLoRA's touch the leading directions with "
        said += f"{start[0]:.0%}, {start[1]:.0%} and {start[2]:.0%} after one step and {end[0]:.0%}, {end[1]:.0%} and "
        said += f"{end[2]:.0%} in the end (chance {best.mean('chance', **lora):.0%})."
        return Verdict(together([wins, None if stands is None else not stands]), said)

    def plots(self, table: Table) -> tuple[Plot, ...]:
        best, measure = self.listed(table), quality(table)
        shared = table.where(lr=best.line(method="lora").key["lr"])
        rated = {"at its own best rate": best, "at LoRA's best rate": shared}
        bars = tuple(found.series(label, "method", measure.column) for label, found in rated.items())
        when = {"after one step": "touching, step 1", "half-way": "touching, half", "in the end": "touching"}
        shares = tuple(best.series(label, "method", column) for label, column in {**when, "chance": "chance"}.items())
        return (
            Plot("quality", "", measure.column, bars),
            Plot("the principal directions", "", "share of ‖ΔW‖² that touches them", shares),
        )


def spectra(arena: Arena, principal: Principal) -> list[Row]:
    """`inside`, `touching` and `chance` of each adapter, means over its linear sites; nothing where it has none."""
    found: list[Row] = []
    for adapter in arena.adapters:
        shares = [principal.shares(change) for change in changes(arena.host, adapter)]
        columns = zip(("inside", "touching", "chance"), zip(*shares, strict=True), strict=False)
        found.append({name: mean(list(values)) for name, values in columns})
    return found
