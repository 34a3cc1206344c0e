"""Commands that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mamba_export.main import run
from tests.cli.refusal import Refused, check_message


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """``refused(code, words, *args)``: the command ends so, in one line of error and one of hint; returns stderr."""

    def check(code: int, words: str, *args: str | Path) -> str:
        capsys.readouterr()
        found = run([str(arg) for arg in args])
        captured = capsys.readouterr()
        check_message(captured.err, words)
        assert found == code, captured.err
        assert captured.out == ""
        return captured.err

    return check
