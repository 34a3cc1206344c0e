"""How a command refuses bad input: one line of error, one of hint, and an exit code."""

from __future__ import annotations

from collections.abc import Callable

USAGE, CHECKPOINT, ENVIRONMENT, INTERRUPTED = 2, 3, 5, 130

Refused = Callable[..., str]


def check_message(stderr: str, words: str) -> None:
    lines = stderr.strip().splitlines()
    assert "Traceback" not in stderr
    assert len(lines) == 3, stderr
    assert lines[0].startswith("error: ")
    assert lines[1] == ""
    assert lines[2].startswith("hint: ")
    assert len(lines[2]) > len("hint: ")
    for word in words.split("|"):
        assert word in stderr, stderr
    assert len(lines[0]) < 700
