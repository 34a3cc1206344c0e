from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.models.traced import traced_once


@pytest.fixture(scope="module", autouse=True)
def _traced_once() -> Iterator[None]:
    with traced_once():
        yield
