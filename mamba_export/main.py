"""The command line: a group that imports its commands when they run, and turns errors into lines and exit codes."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any, NoReturn

import click

from mamba_export.commands import COMMANDS
from mamba_export.errors import MambaExportError
from mamba_export.version import __version__


class LazyGroup(click.Group):
    """A group whose help needs no command module."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"mamba_export.commands.{COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Start with:  mamba-export onnx --ckpt CHECKPOINT -o OUT",
)
@click.version_option(__version__, prog_name="mamba-export")
def cli() -> None:
    """Trained Mamba checkpoints to verified ONNX bundles and TensorRT engines."""


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 ok, 1 a bug, 2 usage, 3 checkpoint, 4 verification, 5 environment."""
    sys.exit(run(args))


def run(args: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        result: Any = cli.main(args, prog_name="mamba-export", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        hint = None
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f"{error.ctx.command_path} --help"
        return _fail(error.format_message(), hint, 2)
    except MambaExportError as error:
        return _fail(str(error), error.hint, error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", None, 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError:
        return _fail("out of memory", "close other programs, or use a smaller --dtype", 5)
    except Exception:  # a bug: show it all
        traceback.print_exc()
        return _fail("this is a bug in mamba-export", "please report it with the lines above", 1)


def _fail(message: str, hint: str | None, code: int) -> int:
    tail = f"\n\nhint: {hint}" if hint else ""
    print(f"error: {message}{tail}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
