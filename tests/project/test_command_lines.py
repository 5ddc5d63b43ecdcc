"""Every `lorica …` line in the docs, in help texts and in the headers of shipped configs is one that is accepted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from lorica.cli.merge import _rule, _split
from lorica.cli.train import FLAGS, _config
from lorica.core.errors import ConfigError
from lorica.recipes.configs import find_config, shipped
from scripts.docs import cli_page

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINE = re.compile(r"^[ #]*(?:\S*/)?(lorica [a-z].*?)(?: {3,}.*)?$", re.MULTILINE)
"""A command line, behind a comment's sign or a path, without the explanation that three spaces set off."""
COMMANDS = {path: (command, context) for path, command, context in cli_page.commands()}


def shown():
    """Where command lines are shown to people → their words."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts = {p.relative_to(ROOT).as_posix(): "\n".join(BLOCK.findall(p.read_text(encoding="utf-8"))) for p in pages}
    texts |= {f"{path} --help": command.help or "" for path, (command, _) in COMMANDS.items()}
    texts |= {f"{name}.yaml": find_config(name).read_text(encoding="utf-8") for name in shipped()}
    found = {where: [shlex.split(line, comments=True) for line in LINE.findall(text)] for where, text in texts.items()}
    return {where: lines for where, lines in found.items() if lines}


@pytest.mark.parametrize("where", sorted(shown()))
def test_command_lines_that_are_shown_are_accepted(where):
    for words in shown()[where]:
        depth = 3 if " ".join(words[:3]) in COMMANDS else 2
        path, rest = " ".join(words[:depth]), words[depth:]
        assert path in COMMANDS, f"there is no command {path!r}"
        given = parse(path, rest)
        if path == "lorica train" and "$" not in " ".join(words):
            check_settings(given)
        if path == "lorica merge":
            check_rule(given)


def parse(path, words):
    """A command's parameters; raises click.UsageError for what it does not accept. Nothing is run."""
    command, context = COMMANDS[path]
    values, left, _ = command.make_parser(context).parse_args(list(words))
    assert left == []
    return values


def check_settings(given):
    """What `lorica train` would make of it: config names resolve, settings exist and fit."""
    given = {key: value for key, value in given.items() if isinstance(value, str | tuple)}  # the rest was not given
    settings = tuple(word for word in given.get("settings", ()) if not word.endswith(".yaml"))
    flags = {key: value for key, value in given.items() if key in FLAGS}
    if "resume" not in given:
        _config((*settings, "data.path=rows.jsonl"), given.get("method"), flags)


def check_rule(given):
    """What `lorica merge` would make of it: the rule exists and has these parameters."""
    options = {"weights": None, "rank": None, "form": None}
    options |= {key: value for key, value in given.items() if key in options and isinstance(value, str)}
    words, how = given.get("words"), given.get("how")
    _, parameters = _split(words if isinstance(words, tuple) else ())
    _rule(how if isinstance(how, str) else None, parameters, options)


def test_a_parameter_that_a_rule_lacks_would_be_found():
    given = parse("lorica merge", ["a", "--how", "ties", "--densty", "0.3"])
    with pytest.raises(ConfigError, match="Did you mean 'density'"):
        check_rule(given)


def test_the_docs_show_every_command():
    words = [words for where, lines in shown().items() for words in lines if where.endswith(".md")]
    assert set(COMMANDS) - {" ".join(w[:2]) for w in words} - {" ".join(w[:3]) for w in words} == set()


def test_a_flag_that_does_not_exist_would_be_found():
    with pytest.raises(click.NoSuchOption):
        parse("lorica train", ["--dryrun"])
