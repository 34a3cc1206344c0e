"""mamba-export completion"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command("completion", short_help="Print a shell completion script.")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print a script that completes commands, options and paths in SHELL.

    \b
    Examples:
      eval "$(mamba-export completion bash)"      (in ~/.bashrc)
      eval "$(mamba-export completion zsh)"       (in ~/.zshrc)
      mamba-export completion fish > ~/.config/fish/completions/mamba-export.fish
    """
    completer = get_completion_class(shell)
    assert completer is not None, shell  # click knows the shells of SHELLS
    click.echo(completer(ctx.find_root().command, {}, "mamba-export", "_MAMBA_EXPORT_COMPLETE").source())
