"""Charts: well-formed pictures with the right marks, whatever the values."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_export.verification.charts import Chart, Series, short

_SVG = "{http://www.w3.org/2000/svg}"


def parse(chart: Chart, standalone: bool = True) -> ElementTree.Element:
    return ElementTree.fromstring(chart.svg(standalone))


@given(
    st.lists(
        st.tuples(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30)) | st.tuples(st.just(math.nan), st.just(1.0)),
        max_size=20,
    ),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_any_values_make_a_picture_inside_its_frame(
    values: list[tuple[float, float]], log_x: bool, log_y: bool, points: bool
) -> None:
    series = Series("a <name>", [x for x, _ in values], [y for _, y in values], points=points)
    root = parse(Chart("title & more", "x", "y", [series], log_x=log_x, log_y=log_y))
    for circle in root.iter(f"{_SVG}circle"):
        assert 0 <= float(circle.attrib["cx"]) <= 720 and 0 <= float(circle.attrib["cy"]) <= 300


def test_points_that_cannot_be_shown_are_left_out() -> None:
    series = Series("s", [1, 2, 3, 4], [1.0, math.nan, -1.0, 8.0])
    assert len(list(parse(Chart("t", "x", "y", [series], log_y=True)).iter(f"{_SVG}circle"))) == 2
    assert len(list(parse(Chart("t", "x", "y", [series])).iter(f"{_SVG}circle"))) == 3


def test_labels_stand_beside_their_points() -> None:
    series = Series("", [1.0, 2.0], [3.0, 4.0], labels=["w8a8", "w4a16"], points=True)
    texts = [text.text for text in parse(Chart("t", "x", "y", [series])).iter(f"{_SVG}text")]
    assert {"w8a8", "w4a16"} <= set(texts)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(0, "0"), (0.02, "0.02"), (1.5e-6, "1.5e-6"), (32000, "32k"), (2.4e6, "2.4M"), (1024, "1024"), (-5e-5, "-5e-5")],
)
def test_numbers_are_short(value: float, wanted: str) -> None:
    assert short(value) == wanted
