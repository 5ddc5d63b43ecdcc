"""LoraHub: weights of eight skills, searched on five examples of a task that none of them knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field

from lorica.adapters.adapter import Adapter
from lorica.adapters.merging import make_merging
from lorica.adapters.merging.combine import combine
from lorica.data.example import Example
from lorica.papers.base import Figure, PaperCheck, Say, Verdict
from lorica.papers.kit.judging import above, together
from lorica.papers.kit.plot import Plot, Series
from lorica.papers.kit.skills import Skills, SkillSettings, t0_skills
from lorica.papers.kit.table import Row, Table
from lorica.papers.kit.text import exact_match, examples, split
from lorica.recipes.compose import ComposeConfig, compose, loss_on

SKILLS = (
    "glue_qqp_duplicate",
    "qasc_is_correct_1",
    "social_i_qa_I_was_wondering",
    "commonsense_qa_question_answering",
    "kilt_tasks_hotpotqa_straighforward_qa",
    "common_gen_Put_together",
    "common_gen_topics_from_the_sentence",
    "app_reviews_convert_to_rating",
)
TARGETS = ("navigate", "sports_understanding", "hyperbaton", "object_counting")
OURS, RIVALS = "lorahub", ("zero", "linear", "ties")
WAYS = ("zero", "uniform", "best single", "random search", "linear", "ties", OURS)
ALL = "mean of all"


class Settings(SkillSettings):
    """Skills, tasks that none of them was trained on, and the search."""

    skills: tuple[str, ...] = Field(SKILLS, description="templates of the T0 mixture, one adapter each")
    targets: tuple[str, ...] = Field(TARGETS, description="tasks of BIG-Bench Hard, which nothing was trained on")
    examples: int = Field(5, ge=1, description="examples of a target that weights and strengths are found by")
    exact: int = Field(8, ge=1, description="test rows of a target that are answered greedily")
    budget: int = Field(40, ge=1, description="evaluations of the search, and of random search")
    optimizer: str = Field("Cobyla", description="nevergrad's optimiser; what the authors' NGOpt takes here")
    linear: tuple[float, ...] = Field((0.125, 0.25, 0.5, 1.0), description="weights of every parent to choose from")
    ties: tuple[float, ...] = Field((0.5, 1.0, 2.0, 4.0), description="λ of TIES to choose from; its density is 0.2")


class LoraHubPaper(PaperCheck[Settings]):
    """Eight LoRA adapters of one model are each trained on one prompt template of the T0 mixture, from the same A. Of
    each of four tasks of BIG-Bench Hard, which neither they nor the model were trained on, five examples are drawn;
    LoraHub searches one weight for each adapter on their loss, 40 evaluations, L1 penalty 0.05 (`lorahub`). On the same
    five examples `linear` and `ties` choose their one strength, `best single` the adapter that is best alone, and
    `random search` draws as many weights from the same box; `uniform` weighs A and B by 1/8, and `zero` is the base.
    Measured is the loss of the answers on other rows of the task, and how many of their greedy answers are right. The
    claim shows when the mean loss of `lorahub` over the four tasks is below that of `zero`, of `linear` and of `ties`.
    """

    name = "lorahub"
    title = "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition"
    authors = "Huang et al."
    venue = "COLM 2024"
    year = 2024
    arxiv = "2307.13269"
    methods = ("lora",)
    claim = (
        "Adapters of other tasks, weighed by a gradient-free search on a handful of examples, solve an unseen task "
        "better than the model without them, at the cost of no longer prompt."
    )
    figures = (
        Figure("BIG-Bench Hard, zero-shot, Flan-T5-large", "27.0", "from memory"),
        Figure("BIG-Bench Hard, five examples in the prompt", "30.9", "from memory"),
        Figure("BIG-Bench Hard, LoraHub, mean of five seeds", "34.7", "from memory"),
    )
    limits = (
        "The base, `nano`, was pre-trained on text that has the adapters' templates, so they add little to it; it "
        "knows next to nothing, and its loss falls mostly because it learns how answers look. The paper has twenty "
        "adapters of a model a hundred times as large. Loss is what the search minimises; the paper counts right "
        "answers, which here are few: eight rows a task, and of the two tasks that ask for yes or no half are right by "
        "chance. The best adapter alone and random search are in the table, and no part of the claim. In a first "
        "trial the tasks were other templates of T0: `nano` knew their answers' form so well that no row's mean loss "
        "differed from the base's by more than 2 %, and tasks that it had not seen took their place; the criterion "
        "stayed. Training was then cut from 50 steps of 3 rows to 40 of 2, and after one seed the answered rows from "
        "16 to 8 a task, for time."
    )
    keys = ("target", "way")
    columns: ClassVar = {
        "few loss": "of the answers in the five examples, nats a token",
        "test loss": "of the answers in other rows of the target, nats a token",
        "exact match": "share of these rows' greedy answers that are right",
    }

    small = Settings()
    full = Settings(
        model="meta-llama/Llama-3.2-1B",
        dtype="bfloat16",
        device="auto",
        max_length=512,
        rank=16,
        lr=2e-4,
        steps=500,
        batch_size=16,
        held_out=100,
        exact=100,
    )
    reduced = Settings(
        targets=TARGETS[1::2], steps=30, held_out=12, exact=1, budget=25, linear=(0.125, 0.5), ties=(1.0,)
    )

    def run(self, settings: Settings, seed: int, say: Say) -> list[Row]:
        skills = t0_skills(settings, seed, say)
        rows: list[Row] = []
        with skills.tidy():
            rivals = merged(skills, settings)
            for target in settings.targets:
                counts = {"few": settings.examples, "test": settings.held_out}
                parts = split(examples(f"bbh/{target}", skills.renderer, settings.max_length), counts, seed, target)
                with skills.tidy():
                    found = ways(skills, settings, rivals, parts["few"], parts["test"], seed)
                rows += [{"target": target, "way": way, **cells} for way, cells in found.items()]
                losses = ", ".join(f"{way} {cells['test loss']:.2f}" for way, cells in found.items())
                say(f"seed {seed}: {target}, {losses}")
        for way in WAYS:
            own = [row for row in rows if row["way"] == way]
            rows.append(
                {"target": ALL, "way": way, **{c: sum(float(r[c]) for r in own) / len(own) for c in self.columns}}
            )
        return rows

    def judge(self, table: Table) -> Verdict:
        def loss(way: str) -> float:
            return table.mean("test loss", target=ALL, way=way)

        ours = table.cell("test loss", target=ALL, way=OURS)
        parts = [above(table.cell("test loss", target=ALL, way=rival) - ours) for rival in RIVALS]
        exact = table.mean("exact match", target=ALL, way=OURS)
        single = table.mean("exact match", target=ALL, way="best single")
        return Verdict(
            together(parts),
            f"The loss on unseen tasks is {loss(OURS):.3f} with LoraHub's weights, {loss('zero'):.3f} without an "
            f"adapter, {loss('linear'):.3f} by linear and {loss('ties'):.3f} by ties; it is {loss('best single'):.3f} "
            f"with the best adapter alone and {loss('random search'):.3f} after random search. Right are {exact:.1%} "
            f"of the answers, {single:.1%} with the best adapter alone.",
        )

    def plots(self, table: Table) -> tuple[Plot, ...]:
        panels = []
        for column, label in (
            ("test loss", "loss of answers, nats a token"),
            ("few loss", "loss of the five examples"),
        ):
            cells = [table.cell(column, target=ALL, way=way) for way in WAYS]
            bars = Series("", WAYS, tuple(c.mean for c in cells), tuple(c.spread for c in cells))
            panels.append(Plot(f"{column}, mean of the targets", "weights", label, (bars,)))
        return tuple(panels)


def merged(skills: Skills, settings: Settings) -> dict[str, list[Adapter]]:
    """All skills merged by the rules that search nothing, at every strength."""
    host, parents = skills.service.host, list(skills.adapters.values())
    found: dict[str, list[Adapter]] = {"linear": [], "ties": []}
    for weight in settings.linear:
        made, _ = combine(
            parents, host.backbone, make_merging("linear"), [weight] * len(parents), name=f"linear {weight}"
        )
        found["linear"].append(host.put(made))
    for scale in settings.ties:
        made, _ = combine(parents, host.backbone, make_merging("ties", scale=scale), name=f"ties {scale}")
        found["ties"].append(host.put(made))
    return found


def ways(
    skills: Skills,
    settings: Settings,
    rivals: Mapping[str, Sequence[Adapter]],
    few: Sequence[Example],
    test: Sequence[Example],
    seed: int,
) -> dict[str, dict[str, float]]:
    """Every way to weigh the skills, found on a few examples: their loss, the test loss, the share of right answers."""
    host, parents = skills.service.host, list(skills.adapters.values())
    objective, tested = loss_on(skills.service, few), loss_on(skills.service, test, "test rows")
    config = ComposeConfig(optimizer=settings.optimizer, budget=settings.budget, seed=seed)
    composition = compose(host, parents, objective, config)
    found: dict[str, Adapter] = {OURS: composition.adapter}
    for row in composition.rows[:-1]:
        assert row.weights is not None
        if row.name == "best single":
            found[row.name] = parents[row.weights.index(1.0)]
        else:
            made, _ = combine(parents, host.backbone, config.rule(), row.weights, name=row.name)
            found[row.name] = host.put(made)
    found |= {name: min(tried, key=objective) for name, tried in rivals.items()}
    rows = test[: settings.exact]
    return {
        way: {
            "few loss": objective(found[way]),
            "test loss": tested(found[way]),
            "exact match": exact_match(skills.service, skills.renderer, found[way], rows),
        }
        for way in WAYS
    }
