"""docs/reference/cli.md: every command, argument and flag, from the click tree itself.

In: the command group. Out: Markdown. Refuses to know what commands do.
"""

from __future__ import annotations

from collections.abc import Iterator

import click

from lorica.cli.main import COMMANDS, cli
from scripts.docs.markdown import GENERATED, code, table

CODES = (
    ("0", "done"),
    ("1", "a Lorica error: one sentence on stderr, see [errors](errors.md)"),
    ("2", "wrong usage"),
    ("130", "interrupted; a run leaves a checkpoint and the command that resumes it"),
)


def page() -> str:
    parts = [
        GENERATED,
        "# Command line",
        "Results go to stdout, everything else to stderr. `--json` prints one JSON document instead of text. Colour is "
        "used on a terminal only, and never where `NO_COLOR` is set.",
        table(("exit code", "meaning"), CODES),
        table(("command", "what"), [(f"[`lorica {name}`](#{anchor(name)})", said) for name, said in COMMANDS.items()]),
    ]
    for path, command, context in commands():
        parts.append(section(path, command, context))
    return "\n\n".join(parts) + "\n"


def commands() -> Iterator[tuple[str, click.Command, click.Context]]:
    """(path, command, context) for every command that can be run, depth first, in the order of `--help`."""
    yield from _below("lorica", cli, click.Context(cli, info_name="lorica"))


def anchor(name: str) -> str:
    """Where a command is explained; a group's first command stands for it."""
    prefix = f"lorica {name}"
    return next(path for path, _, _ in commands() if path == prefix or path.startswith(prefix + " ")).replace(" ", "-")


def _below(
    path: str, command: click.Command, context: click.Context
) -> Iterator[tuple[str, click.Command, click.Context]]:
    if not isinstance(command, click.Group):
        yield path, command, context
        return
    for name in command.list_commands(context):
        inner = command.get_command(context, name)
        assert inner is not None
        own = click.Context(inner, info_name=name, parent=context, **inner.context_settings)
        yield from _below(f"{path} {name}", inner, own)


def section(path: str, command: click.Command, context: click.Context) -> str:
    """One command: usage, help, options."""
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    parts = [f"## {path}", f"```text\n{usage}\n```", *paragraphs(command.help or "")]
    rows = [
        (", ".join(code(word) for word in (*option.opts, *option.secondary_opts)), *_option(option, context))
        for option in command.params
        if isinstance(option, click.Option) and not option.hidden
    ]
    return "\n\n".join([*parts, table(("option", "value", "default", "meaning"), rows)] if rows else parts)


def paragraphs(text: str) -> list[str]:
    """A help text as Markdown; a paragraph behind click's no-rewrap mark is a block of commands."""
    import inspect

    found = []
    for part in inspect.cleandoc(text.partition("\f")[0]).split("\n\n"):
        if part.startswith("\b"):
            found.append("```sh\n" + part.removeprefix("\b").strip("\n") + "\n```")
        elif part:
            found.append(" ".join(part.split()))
    return found


def _option(option: click.Option, context: click.Context) -> tuple[str, str, str]:
    value = "" if option.is_flag or option.count else code(option.make_metavar(context))
    default = option.to_info_dict()["default"]
    shown = "" if default is None or option.is_flag or option.multiple else code(str(default))
    repeated = " May be given several times." if option.multiple and "several times" not in (option.help or "") else ""
    return value, shown, f"{option.help or ''}{repeated}"
