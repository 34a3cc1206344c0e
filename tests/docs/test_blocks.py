"""Every command block of the README and the documentation is run, and prints what the page shows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.docs.blocks import Block, commands, find_blocks, missing_lines

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
BLOCKS = {page: find_blocks(page) for page in PAGES}
WITH_BLOCKS = [page for page in PAGES if BLOCKS[page]]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder to run a page in: the example checkpoint is there, and mamba-export, python and polygraphy run there."""
    (tmp_path / "bin").mkdir()
    programs = {"mamba-export": f' "{ROOT / "cli.py"}"', "python": ""}
    programs["polygraphy"] = ' -c "from polygraphy.tools import main; main()"'
    for program, arguments in programs.items():
        script = tmp_path / "bin" / program
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
        script.chmod(0o755)
    desk = tmp_path / "desk"
    desk.mkdir()
    shutil.copytree(ROOT / "examples", desk / "examples")
    return desk


def run(block: Block, desk: Path) -> None:
    env = {
        **os.environ,
        "PATH": f"{desk.parent / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "NO_COLOR": "1",
        "COLUMNS": "120",
    }
    for command in commands(block):
        where = f"{name(block.page)}:{block.line}: {command.text}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command.text],
            cwd=desk,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, f"{where}\n{done.stdout}"
        absent = missing_lines(command.output, done.stdout)
        assert not absent, f"{where}\nthe page shows\n  " + "\n  ".join(absent) + f"\nit printed\n{done.stdout}"


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=name)
def test_the_blocks_of_a_page_run(page: Path, desk: Path) -> None:
    for block in BLOCKS[page]:
        if block.reason is None:
            run(block, desk)


LEFT_OUT = [block for blocks in BLOCKS.values() for block in blocks if block.reason is not None]

if LEFT_OUT:

    @pytest.mark.parametrize("block", LEFT_OUT, ids=lambda block: f"{name(block.page)}:{block.line}")
    def test_a_block_left_out_says_why(block: Block) -> None:
        assert block.reason is not None
        assert len(block.reason.split()) >= 3, "the reason is a sentence, not a word"
        pytest.skip(f"NOT EXECUTED: {name(block.page)}: {block.reason}")


def test_more_blocks_run_than_are_left_out() -> None:
    every = sum(len(blocks) for blocks in BLOCKS.values())
    assert every > 2 * len(LEFT_OUT), f"{len(LEFT_OUT)} of {every} blocks are not executed"


def test_a_page_that_shows_too_much_is_caught() -> None:
    printed = "wrote out (9.7 MB, 4 s)\nnext: this\n"
    assert missing_lines(["wrote out (1.2 MB, 30 s)", "…", "next: this"], printed) == []
    assert missing_lines(["wrote elsewhere (9.7 MB, 4 s)"], printed) == ["wrote elsewhere (9.7 MB, 4 s)"]
    assert missing_lines(["next: this", "wrote out (9.7 MB, 4 s)"], printed) == ["wrote out (9.7 MB, 4 s)"]
