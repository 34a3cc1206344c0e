"""The pages agree with the code: links lead somewhere, the command page is what the commands say of themselves."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from mamba_export import errors
from mamba_export.commands import COMMANDS
from mamba_export.targets import TARGETS
from tests.conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
_LINK = re.compile(r"(?<!!)\[[^\]]+\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = _LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_command_page_is_what_the_commands_say() -> None:
    make = runpy.run_path(str(ROOT / "docs" / "make_commands.py"))["make_page"]
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page == make(), "the help has changed: run `make docs` and commit docs/commands.md"


def test_the_readme_names_every_command_target_and_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"`{name}" not in readme] == []
    assert [name for name in TARGETS if f"`{name}`" not in readme] == []
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in readme] == []


def test_the_error_page_names_every_error_and_exit_code() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    classes = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, errors.MambaExportError)]
    for cls in classes:
        assert re.search(rf"\| `{cls.__name__}` \| {cls.exit_code} \|", page), f"{cls.__name__} with {cls.exit_code}"
