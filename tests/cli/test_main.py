"""The command as a whole: help that is light, versions, unknown commands, what stdout and stderr hold."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from lorica import __version__
from lorica.cli.main import COMMANDS, cli

from .conftest import ENV, Run

HEAVY = ("torch", "transformers", "pydantic", "numpy", "rich", "matplotlib", "jinja2")


@pytest.mark.parametrize("statement", ["import lorica", "import lorica.cli.main"])
def test_importing_loads_nothing_heavy(statement: str) -> None:
    code = f"import sys; {statement}; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], env=ENV, text=True).strip() == "[]"


def test_help_names_every_command_and_loads_none(run: Run) -> None:
    code = (
        "import sys; sys.argv = ['lorica', '--help']\n"
        "from lorica.cli.main import main, COMMANDS\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"assert not [m for m in {HEAVY!r} if m in sys.modules]\n"
        "assert not [c for c in COMMANDS if f'lorica.cli.{c}' in sys.modules]\n"
    )
    said = subprocess.check_output([sys.executable, "-c", code], env=ENV, text=True)
    assert all(f"  {name} " in said for name in COMMANDS)
    assert run("--help").stdout == said


def test_the_version_is_the_packages(run: Run) -> None:
    assert run("--version").stdout == f"lorica {__version__}\n"


def test_every_command_has_help_that_agrees_with_the_list(run: Run) -> None:
    for name, line in COMMANDS.items():
        result = run(name, "--help")
        assert result.exit_code == 0
        command = importlib.import_module(f"lorica.cli.{name}").command
        first = (command.help or "").strip().split("\n")[0]
        assert first == line, name


def test_every_option_says_what_it_does() -> None:
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        nested = list(command.commands.values()) if isinstance(command, click.Group) else [command]
        for part in nested:
            assert part is not None
            for option in part.params:
                if isinstance(option, click.Option):
                    assert option.help, f"{name} {option.opts}"


def test_every_command_that_returns_something_takes_json() -> None:
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        nested = list(command.commands.values()) if isinstance(command, click.Group) else [command]
        assert all(any("--json" in option.opts for option in part.params) for part in nested if part), name


def test_an_unknown_command_names_its_neighbour_and_exits_with_2(run: Run) -> None:
    result = run("trian")
    assert result.exit_code == 2
    assert "There is no command 'trian'. Did you mean 'train'?" in result.stderr
    assert result.stdout == ""


def test_wrong_usage_is_json_where_json_is_asked_for(run: Run) -> None:
    result = run("train", "--json", "--stepps", "3")
    assert result.exit_code == 2
    assert json.loads(result.stderr)["error"]["code"] == "usage"


def test_exceptions_that_are_bugs_are_not_swallowed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("lorica.methods.all_methods", broken)
    with pytest.raises(ZeroDivisionError):
        run("methods")


def test_without_a_terminal_nothing_is_coloured(run: Run, rows: Path) -> None:
    for args in (("methods",), ("models", "nano"), ("data", "show", rows, "--tokens"), ("methods", "lorra")):
        result = run(*args)
        assert "\x1b" not in result.stdout + result.stderr
