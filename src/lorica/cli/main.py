"""The `lorica` command: names and one line of help for each subcommand, and what errors look like.

In: argv. Out: exit code 0 (done), 1 (a Lorica error), 2 (wrong usage), 130 (Ctrl-C). A command's module is imported
when it is called, so `lorica --help` loads neither torch nor pydantic. Refuses to know what a command does; bugs are
not swallowed.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import click

from lorica import __version__
from lorica.cli.output import report_error
from lorica.core.errors import LoricaError, did_you_mean

COMMANDS: dict[str, str] = {
    "quickstart": "Fine-tune the built-in model on the built-in data, and see what changed.",
    "train": "Fine-tune an adapter on a data file.",
    "compare": "Train several methods in the same batches, and show what each gains and costs.",
    "search": "Search GLoRA's configurations, or for an intrinsic dimension.",
    "sample": "Continue prompts, with or without an adapter.",
    "chat": "Talk to a model, with or without an adapter.",
    "merge": "Make one adapter out of several by a rule, or fold adapters into the weights of a model.",
    "compose": "Compose adapters for a new task from a few examples.",
    "export": "Write an adapter as a plain LoRA folder, whatever its method.",
    "inspect": "Show what an adapter folder holds, and what it does to the weights.",
    "lineage": "Show where adapters and merged models come from: a tree, a graph or a picture.",
    "forgetting": "Measure what adapters gained on their tasks and lost on others.",
    "directions": "Directions of a behaviour: extract, compare, steer, ablate; scalars of rank-1 adapters.",
    "data": "Look at training data as the trainer sees it.",
    "methods": "List the methods, or explain one.",
    "papers": "Published results: list them, read one, run the experiment that checks it.",
    "models": "List the built-in models, or the sites of one model.",
    "serve": "Serve backbones: fine-tuning and sampling over HTTP, for many tenants at once.",
    "keys": "Make, list and revoke API keys, and set what a tenant may use.",
    "store": "Look after a server's records and artifacts.",
}
"""Every subcommand `x` is the attribute `command` of `lorica.cli.x`."""


class LazyGroup(click.Group):
    """A group that knows its commands by name, and turns Lorica's errors into sentences and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"lorica.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"There is no command {args[0]!r}.{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except LoricaError as error:
            report_error(error.code, error.message, error.hint, as_json=as_json)
            ctx.exit(1)
        except click.UsageError as error:
            if not as_json:
                raise
            report_error("usage", error.format_message(), None, as_json=True)
            ctx.exit(2)
        except (KeyboardInterrupt, click.Abort):
            report_error("interrupted", "Interrupted.", None, as_json=as_json)
            ctx.exit(130)


ENVIRONMENT = {
    # spinning threads are many times slower where cores are shared
    "OMP_WAIT_POLICY": "PASSIVE",
    # kernels kept for each number of tokens: the default of 1024 held 0.7 GB more (nano, ragged rows) and saved no time
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}
"""What torch reads from the environment when it is imported, where the user has not set it."""


@click.group(
    "lorica", cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, "--version", message="%(prog)s %(version)s", prog_name="lorica")
def cli() -> None:
    """One frozen base model, many adapters: train, sample, merge and export PEFT methods.

    Results go to stdout, everything else to stderr. Every command that returns something takes --json.
    """


def main() -> None:
    """The entry point of the installed command."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    cli(prog_name="lorica")


if __name__ == "__main__":
    main()
