"""Line and point charts as SVG text: no library, no script, light and dark by the viewer's own preference."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

# Colours of series are told apart by readers with any colour vision, on white and on near-black.
_LIGHT = ("#2a6fdb", "#d9541e", "#0f8f6b", "#a23fb5", "#9a7400", "#c2255c", "#3f7f93", "#6b5b4d")
_DARK = ("#6ea8ff", "#ff8f5e", "#3fd0a2", "#d58be6", "#e0b93f", "#ff7fa8", "#7cc3d8", "#c2b09f")
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 66, 16, 40, 46

_TINY = 1e-100  # below it everything is zero

Axis = tuple[float, float]


def palette_css(scope: str = ":root") -> str:
    """CSS variables that charts are drawn with, for both colour schemes."""

    def block(ink: str, soft: str, grid: str, paper: str, colours: Sequence[str]) -> str:
        series = "".join(f"--s{i}:{colour};" for i, colour in enumerate(colours))
        return f"{scope}{{--ink:{ink};--soft:{soft};--grid:{grid};--paper:{paper};{series}}}"

    light = block("#1c2024", "#5c6670", "#e3e7eb", "#ffffff", _LIGHT)
    dark = block("#e6eaee", "#9aa5b0", "#2d343b", "#14181c", _DARK)
    return f"{light}@media (prefers-color-scheme:dark){{{dark}}}"


@dataclass(frozen=True)
class Series:
    """One line, or one set of points.

    Attributes:
        name: for the legend; empty for none.
        x, y: of its points; points that are not finite are left out.
        labels: texts beside the points.
        points: draw the points alone, without a line.
        dashed: draw the line dashed.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    labels: Sequence[str] = ()
    points: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart of some series.

    Attributes:
        title: above it.
        xlabel, ylabel: of the axes, with units.
        series: what is drawn, in order of colours.
        log_x, log_y: logarithmic axes; values that are not positive are left out.
        from_zero: the y axis begins at 0 (of linear axes).
        integers: only whole numbers are marked on the x axis.
        height: in pixels.
    """

    title: str
    xlabel: str
    ylabel: str
    series: Sequence[Series] = field(default_factory=tuple)
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = True
    integers: bool = False
    height: int = 300

    def svg(self, standalone: bool = False) -> str:
        """The picture. ``standalone``: as a file of its own, which brings its colours along."""
        drawn = [(i, self._kept(series)) for i, series in enumerate(self.series)]
        xs = [x for _, points in drawn for x, _, _ in points]
        ys = [y for _, points in drawn for _, y, _ in points]
        if not xs:
            xs, ys = [1.0, 10.0], [1.0, 10.0]
        x_range = _range(xs, self.log_x, False, pad=any(s.points for s in self.series))
        y_range = _range(ys, self.log_y, self.from_zero, pad=True)
        parts = [self._open(standalone), self._grid(x_range, y_range), self._legend()]
        for i, points in drawn:
            parts.append(self._draw(i, self.series[i], points, x_range, y_range))
        return "".join(parts) + "</svg>"

    # -- parts -------------------------------------------------------------------------------------------------------

    def _open(self, standalone: bool) -> str:
        style = f"<style>{palette_css('svg')}</style>" if standalone else ""
        paper = f'<rect width="{_WIDTH}" height="{self.height}" fill="var(--paper)"/>' if standalone else ""
        name = html.escape(self.title, quote=True)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {self.height}" role="img" '
            f'aria-label="{name}" font-family="system-ui,sans-serif" font-size="12">{style}{paper}'
            f'<text x="{_LEFT}" y="16" fill="var(--ink)" font-weight="600" font-size="13">{name}</text>'
        )

    def _legend(self) -> str:
        parts, x = [], float(_LEFT)
        for i, series in enumerate(self.series):
            if not series.name:
                continue
            dash = ' stroke-dasharray="4 3"' if series.dashed else ""
            line = f'stroke="var(--s{i % 8})" stroke-width="3"{dash}'
            parts.append(
                f'<line x1="{x:.0f}" x2="{x + 16:.0f}" y1="28" y2="28" {line}/>'
                f'<text x="{x + 21:.0f}" y="32" fill="var(--soft)">{html.escape(series.name)}</text>'
            )
            x += 36 + 6.6 * len(series.name)
        return "".join(parts)

    def _grid(self, x_range: Axis, y_range: Axis) -> str:
        bottom, middle = self.height - _BOTTOM, (_TOP + self.height - _BOTTOM) / 2
        parts = []
        for value in _ticks(y_range, self.log_y, 5):
            y = self._y(value, y_range)
            parts.append(
                f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--grid)"/>'
                f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" fill="var(--soft)" text-anchor="end">{short(value)}</text>'
            )
        for value in _ticks(x_range, self.log_x, 8):
            if self.integers and value != int(value):
                continue
            x = self._x(value, x_range)
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}" stroke="var(--soft)"/>'
                f'<text x="{x:.1f}" y="{bottom + 17}" fill="var(--soft)" text-anchor="middle">{short(value)}</text>'
            )
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}" stroke="var(--soft)"/>'
            f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{self.height - 8}" fill="var(--soft)" text-anchor="middle">'
            f'{html.escape(self.xlabel)}</text><text transform="translate(14 {middle:.0f}) rotate(-90)" '
            f'fill="var(--soft)" text-anchor="middle">{html.escape(self.ylabel)}</text>'
        )
        return "".join(parts)

    def _draw(
        self, index: int, series: Series, points: list[tuple[float, float, str]], x_range: Axis, y_range: Axis
    ) -> str:
        colour = f"var(--s{index % 8})"
        places = [(self._x(x, x_range), self._y(y, y_range)) for x, y, _ in points]
        parts = []
        if not series.points and len(places) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            dash = ' stroke-dasharray="5 4"' if series.dashed else ""
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if len(places) <= 60:
            for (px, py), (x, y, label) in zip(places, points, strict=True):
                tip = html.escape(f"{series.name or label}: {short(x)}, {short(y)}")
                parts.append(
                    f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{5 if series.points else 3}" fill="{colour}">'
                    f"<title>{tip}</title></circle>"
                )
        for (px, py), (_, _, label) in zip(places, points, strict=True):
            if label:
                shift, anchor = (-9, "end") if px > 0.8 * _WIDTH else (9, "start")
                parts.append(
                    f'<text x="{px + shift:.1f}" y="{py - 7:.1f}" fill="var(--ink)" text-anchor="{anchor}">'
                    f"{html.escape(label)}</text>"
                )
        return "".join(parts)

    # -- geometry ----------------------------------------------------------------------------------------------------

    def _kept(self, series: Series) -> list[tuple[float, float, str]]:
        labels = [*series.labels, *([""] * (len(series.x) - len(series.labels)))]
        return [
            (float(x), float(y), label)
            for x, y, label in zip(series.x, series.y, labels, strict=True)
            if math.isfinite(x) and math.isfinite(y) and (x > _TINY or not self.log_x) and (y > _TINY or not self.log_y)
        ]

    def _x(self, value: float, axis: Axis) -> float:
        return _LEFT + _share(value, axis, self.log_x) * (_WIDTH - _RIGHT - _LEFT)

    def _y(self, value: float, axis: Axis) -> float:
        bottom = self.height - _BOTTOM
        return bottom - _share(value, axis, self.log_y) * (bottom - _TOP)


def _share(value: float, axis: Axis, log: bool) -> float:
    low, high = axis
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def _range(values: Sequence[float], log: bool, from_zero: bool, pad: bool) -> Axis:
    """What an axis shows: all values, with some air where ``pad``."""
    low, high = min(values), max(values)
    if log:
        if high <= low * (1 + 1e-9):
            return low / 2, high * 2
        air = 0.08 * (math.log(high) - math.log(low)) if pad else 0.0
        return low * math.exp(-air), high * math.exp(air)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), _TINY):
        half = max(0.1 * max(abs(low), abs(high)), _TINY)
        return low - half, high + half
    air = (high - low) * 0.08 if pad else 0.0
    return (low if from_zero and low == 0 else low - air), (high if from_zero and high == 0 else high + air)


def _ticks(axis: Axis, log: bool, wanted: int) -> list[float]:
    """Round numbers within an axis."""
    low, high = axis
    if not log:
        return _linear_ticks(low, high, wanted)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))  # of powers of ten
    if last - first > wanted:
        stride = -(-(last - first) // wanted)
        found = [10.0**e for e in range(first, last + 1) if e % stride == 0]
    else:
        steps = (1, 2, 5) if last - first <= 3 else (1,)
        found = [m * 10.0**e for e in range(first, last + 1) for m in steps]
    kept = [value for value in found if low <= value * (1 + 1e-9) and value <= high * (1 + 1e-9)]
    return kept if len(kept) > 1 else _linear_ticks(low, high, wanted)


def _linear_ticks(low: float, high: float, wanted: int) -> list[float]:
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def short(value: float) -> str:
    """A number in as few characters as it takes: 0.02, 1.5e-06, 32k, 2.4M."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for limit, divisor, unit in ((1e4, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M")):
        if size < limit:
            return f"{value / divisor:.4g}{unit}"
    return f"{value / 1e9:.4g}G"
