"""docs/reference/losses.md: every loss, from the registry itself.

In: `LOSSES`. Out: Markdown. Refuses to know how a loss is computed.
"""

from __future__ import annotations

from lorica.training.losses import LOSSES, UNPUBLISHED
from scripts.docs.config_page import fields
from scripts.docs.markdown import GENERATED, code, first_sentence, table


def page() -> str:
    rows = [(code(name), code(loss.summary), "yes" if loss.several_targets else "no") for name, loss in LOSSES.items()]
    parts = [
        GENERATED,
        "# Losses",
        "A loss is a **sum** over targets, never a mean: scale it by the weights, the advantages or the learning rate. "
        "`lp` is the trained model's log-probability of a target, `q` the sampler's (`logprobs`), `A` the advantage, "
        "`r = exp(lp − q)`, `sg` stops the gradient. All arrays have the shape of `target_tokens`: `[T]`, or `[T, K]` "
        "for several targets a position where the loss takes them.",
        table(("name", "loss", "several targets"), rows),
    ]
    for name, loss in LOSSES.items():
        reads = [code("target_tokens"), *map(code, loss.inputs)]
        reads += [f"{code(key)} ({value:g} where it is missing)" for key, value in loss.optional.items()]
        parts += [f"## `{name}`", first_sentence(loss.__doc__), f"Reads {', '.join(reads)}."]
        parts += [fields(loss)] if loss.model_fields else ["It has no settings."]
    parts += [
        "## What is refused",
        "\n".join(f"- `{name}`: {said}." for name, said in UNPUBLISHED.items()),
        "An input that a loss does not read is an error, as is one that is not finite. A token whose weight or "
        "advantage is 0 adds nothing, even where it is impossible (`dro`'s penalty is over every token).",
    ]
    return "\n\n".join(parts) + "\n"
