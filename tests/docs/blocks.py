"""Command blocks of the documentation: find them, run them, compare what they print with what the page shows.

A ``console`` fence is a session: lines that begin with ``$ `` are commands, the others are output. Output is compared
line by line, in order, with every number masked, because times and sizes differ between machines; a line ``…`` stands
for any lines left out, and a command without output lines is only run. ``bash`` and ``python`` fences are scripts. The
blocks of a page run one after the other in one folder, like a reader would run them.

``<!-- not executed: reason -->`` on the line above a fence keeps it from being run; the reason shows in the summary.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

_FENCE = re.compile(
    r"^(?:<!-- not executed: (?P<reason>[^\n]+?) -->\n)?```(?P<kind>console|bash|sh|shell|python)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
_HASH = re.compile(r"\b[0-9a-f]{8,64}\b")
ELISION = "…"


@dataclass
class Block:
    """One fence.

    Attributes:
        page: the file it stands in.
        line: of its first line there.
        kind: ``console``, ``bash`` or ``python``.
        body: its text.
        reason: why it isn't run; None when it is.
    """

    page: Path
    line: int
    kind: str
    body: str
    reason: str | None


@dataclass
class Command:
    """A command of a session and the output the page shows for it."""

    text: str
    output: list[str] = field(default_factory=list)


def find_blocks(page: Path) -> list[Block]:
    """The command blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match["kind"], match["body"], match["reason"])
        for match in _FENCE.finditer(text)
    ]


def commands(block: Block) -> list[Command]:
    """What a block runs. A backslash at the end of a line continues a command."""
    if block.kind == "python":
        return [Command(f"python - <<'END_OF_BLOCK'\n{block.body}END_OF_BLOCK")]
    if block.kind != "console":
        return [Command(block.body)]
    found: list[Command] = []
    for line in block.body.splitlines():
        if line.startswith("$ "):
            found.append(Command(line[2:]))
        elif found and found[-1].text.endswith("\\") and not found[-1].output:
            found[-1].text += "\n" + line
        else:
            assert found, f"{block.page.name}:{block.line}: a console block begins with '$ '"
            found[-1].output.append(line)
    return found


def mask(line: str) -> str:
    """A line with what differs between machines and runs masked: numbers, hashes, trailing and repeated blanks."""
    return " ".join(_NUMBER.sub("#", _HASH.sub("#", line)).split())


def missing_lines(shown: list[str], printed: str) -> list[str]:
    """Lines of the page that the command did not print in this order; empty when the page is right."""
    lines = iter([mask(line) for line in printed.splitlines()])
    return [line for line in shown if line.strip() not in ("", ELISION) and mask(line) not in lines]
