"""Writes docs/commands.md from the help of the command line (`make docs`); a test keeps the page up to date."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
from click.testing import CliRunner

from mamba_export.main import cli

WIDTH = 100


def make_page() -> str:
    """The page as it should be."""
    parts = ["# Commands\n", "Made by `make docs` from `mamba-export COMMAND --help`.\n"]
    for path in walk(cli, ()):
        title = " ".join(("mamba-export", *path))
        parts.append(f"## {title}\n" if path else "")
        parts.append(f"```text\n{help_of(path)}```\n")
    return "\n".join(part for part in parts if part)


def walk(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The command itself, then everything below it."""
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None, name
            yield from walk(child, (*path, name))


def help_of(path: tuple[str, ...]) -> str:
    result = CliRunner().invoke(cli, [*path, "--help"], prog_name="mamba-export", terminal_width=WIDTH)
    assert result.exit_code == 0, result.output
    return result.output


if __name__ == "__main__":
    Path(__file__).with_name("commands.md").write_text(make_page(), encoding="utf-8")
