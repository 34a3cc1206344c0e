"""Shell completion: the scripts load in their shells, and the command line answers them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from mamba_export.commands import COMMANDS
from mamba_export.commands.completion import SHELLS
from tests.conftest import Cli


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_one_the_shell_accepts(cli: Cli, shell: str, tmp_path: Path) -> None:
    done = cli("completion", shell)
    assert done.returncode == 0, done.stderr
    assert "_MAMBA_EXPORT_COMPLETE" in done.stdout
    if shutil.which(shell):
        script = tmp_path / "completion"
        script.write_text(done.stdout)
        subprocess.run([shell, "-n", str(script)], check=True)


def complete(cli: Cli, words: str) -> set[str]:
    env = {"_MAMBA_EXPORT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    done = cli(env=env)
    assert done.returncode == 0, done.stderr
    return {line.split(",")[1] for line in done.stdout.splitlines()}


def test_commands_options_and_choices_complete(cli: Cli) -> None:
    assert complete(cli, "mamba-export ") == set(COMMANDS)
    assert "--target" in complete(cli, "mamba-export onnx --t")
    assert complete(cli, "mamba-export onnx --target tensorrt") == {"tensorrt", "tensorrt-10.3"}


def test_an_unknown_shell_is_a_usage_error(cli: Cli) -> None:
    done = cli("completion", "tcsh")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
