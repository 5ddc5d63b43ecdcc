"""The generated reference is what the code says, and every flag, setting and error in it is explained."""

from __future__ import annotations

import shutil

import click
import pytest

from lorica.methods import all_methods
from scripts.docs import cli_page, config_page, errors_page, reference

FOLDER = reference.DOCS / "reference"


@pytest.mark.parametrize("page", sorted(reference.pages()), ids=reference.relative)
def test_a_generated_page_is_what_the_code_says_now(page):
    made = reference.pages()[page]()
    assert reference.read(page) == made, "stale; run `python -m scripts.docs.reference`"


def test_every_command_says_what_it_does_and_every_flag_has_a_help_text():
    silent = []
    for path, command, context in cli_page.commands():
        silent += [] if command.help else [path]
        silent += [
            f"{path} {option.opts[0]}"
            for option in command.get_params(context)
            if isinstance(option, click.Option) and not option.help
        ]
    assert silent == []


def test_every_flag_of_every_command_is_in_the_reference():
    text = reference.read(FOLDER / "cli.md")
    for path, command, _ in cli_page.commands():
        section = text.partition(f"## {path}\n")[2].partition("\n## ")[0]
        assert section, f"{path} has no section"
        for option in command.params:
            if isinstance(option, click.Option):
                assert all(f"`{word}`" in section for word in option.opts), f"{path} {option.opts}"


@pytest.mark.parametrize("cls", [*(cls for _, cls in config_page.SECTIONS), *all_methods().values()])
def test_every_setting_has_a_description_that_is_in_the_reference(cls):
    text = reference.read(FOLDER / "config.md")
    for name, info in cls.model_fields.items():
        assert info.description, f"{cls.__name__}.{name} has no description"
        assert f"| `{name}` |" in text
        assert " ".join(info.description.split()).replace("|", "\\|") in text


def test_every_error_class_is_explained_with_what_to_do():
    assert set(errors_page.ADVICE) == {cls.__name__ for cls in errors_page.classes()}
    text = reference.read(FOLDER / "errors.md")
    for cls in errors_page.classes():
        assert f"## {cls.__name__}\n" in text


def test_every_error_class_is_raised_somewhere():
    raised = errors_page.raisers()
    assert [cls.__name__ for cls in errors_page.classes() if not raised.get(cls.__name__)] == []


def test_the_check_exits_with_one_and_names_the_page_when_one_is_stale(tmp_path, monkeypatch, capsys):
    shutil.copytree(reference.DOCS, tmp_path / "docs")
    shutil.copy(reference.DOCS.parent / "README.md", tmp_path)
    monkeypatch.setattr(reference, "DOCS", tmp_path / "docs")
    monkeypatch.setattr("sys.argv", ["reference", "--check"])
    page = tmp_path / "docs" / "reference" / "cli.md"
    page.write_text(page.read_text(encoding="utf-8").replace("--dry-run", "--dry"), encoding="utf-8")
    assert reference.main() == 1
    assert "docs/reference/cli.md is stale" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["reference"])
    assert reference.main() == 0 and capsys.readouterr().out == "docs/reference/cli.md\n"
    assert reference.stale() == []
