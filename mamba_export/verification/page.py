"""The quality report as one HTML file: pictures inline, nothing loaded from elsewhere, light and dark."""

from __future__ import annotations

import html
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mamba_export.errors import UsageError
from mamba_export.verification.charts import Chart, Series, palette_css, short
from mamba_export.verification.drift import DriftReport
from mamba_export.verification.layers import LayerReport
from mamba_export.verification.quality import QualityReport

_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1500px;margin:0 auto;padding:28px 24px 60px}
h1{font-size:22px;margin:0}h2{font-size:17px;margin:36px 0 10px}
.sub,figcaption,th{color:var(--soft)}.sub{margin:4px 0 22px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px}
.card{border:1px solid var(--grid);border-radius:8px;padding:12px 14px}
.card b{display:block;font-size:21px;font-weight:600;font-variant-numeric:tabular-nums;line-height:1.3}
.card span{color:var(--soft);font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(560px,100%),1fr));gap:22px}
figure{margin:0;border:1px solid var(--grid);border-radius:8px;padding:14px}
figcaption{font-size:13px;margin-top:6px}svg{width:100%;height:auto;display:block}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:4px 14px 4px 0;text-align:right;font-weight:400;border-bottom:1px solid var(--grid);white-space:nowrap}
th:first-child,td:first-child{text-align:left}
details{border:1px solid var(--grid);border-radius:8px;padding:8px 14px;margin:8px 0}summary{cursor:pointer}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:14px}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:13px;margin:6px 0}pre i{color:var(--soft);font-style:normal}
mark{background:none;color:var(--s1)}
"""


def make_document(title: str, body: str) -> str:
    """A whole page around ``body``."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{html.escape(title)}</title><style>{palette_css()}{_STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>\n"
    )


def write_document(path: str | Path, text: str) -> None:
    """Write a file in one step.

    Raises:
        UsageError: it can't be written there.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False, encoding="utf-8") as file:
            file.write(text)
        Path(file.name).chmod(0o644)
        os.replace(file.name, target)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror or error}") from error


def cards(facts: Sequence[tuple[str, str]]) -> str:
    """Large figures, each with what it is."""
    inner = "".join(
        f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>' for name, value in facts
    )
    return f'<div class="cards">{inner}</div>'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column holds names."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def figure(chart: Chart, caption: str) -> str:
    """A chart with a sentence below it."""
    return f"<figure>{chart.svg()}<figcaption>{html.escape(caption)}</figcaption></figure>"


def quality_page(report: QualityReport) -> str:
    """The page of a quality report."""
    name = Path(str(report.bundle["path"])).name
    recipe = f" · recipe {report.bundle['recipe']}" if "recipe" in report.bundle else ""
    p = report.perplexity
    facts = (
        f"{report.bundle['model']} · {report.bundle['family']} · target {report.bundle['target']} · "
        f"{report.bundle['dtype']}{recipe} · {report.bundle['bytes'] / 1e6:.1f} MB · {p.tokens:,} tokens of "
        f"{Path(report.data).name}"
    )
    parts = [f"<h1>{html.escape(name)}</h1>", f'<p class="sub">{html.escape(facts)}</p>', cards(_figures(report))]
    charts = []
    if p.kl_values is not None:
        charts.append(_distribution(p.kl_values))
    if report.layers is not None:
        charts += _layer_charts(report.layers)
    if report.drift is not None:
        charts += _drift_charts(report.drift)
    parts.append(f'<h2>Where it differs</h2><div class="charts">{"".join(charts)}</div>')
    if report.layers is not None:
        parts.append("<h2>Layers</h2>" + _layer_table(report.layers))
    if report.greedy is not None and report.texts is not None:
        parts.append("<h2>Greedy text</h2>" + _texts(report.texts, report.greedy.first_difference))
    return make_document(f"{name}: quality", "".join(parts))


def _figures(report: QualityReport) -> list[tuple[str, str]]:
    p = report.perplexity
    found = [("perplexity", f"{p.perplexity:.4f} ± {p.error:.4f}")]
    if p.reference is not None:
        found.append(("perplexity of the checkpoint", f"{p.reference:.4f}"))
    if p.increase is not None and p.increase_error is not None:
        found.append(("increase", f"{100 * p.increase:+.3f} ± {100 * p.increase_error:.3f} %"))
    for title, value in (
        ("mean KL divergence, nats", p.kl),
        ("99 % of the positions below", p.kl_p99),
        ("largest", p.kl_max),
    ):
        if value is not None:
            found.append((title, f"{value:.2e}"))
    if p.top1 is not None:
        found.append(("same top token", f"{100 * p.top1:.2f} %"))
    if report.greedy is not None:
        g = report.greedy
        found.append(("of greedy text before the first difference", f"{100 * g.agreement:.1f} %"))
        found.append((f"of {g.prompts} greedy texts of {g.length} tokens equal", f"{100 * g.same_texts:.0f} %"))
    return found


def _distribution(values: NDArray[np.float32]) -> str:
    """Share of positions above a divergence: what a histogram shows, with a tail that can be read."""
    ordered = np.sort(values[values > 0])[::-1]
    if ordered.size == 0:
        ordered = np.array([1e-12], np.float32)
    index = np.unique(np.geomspace(1, ordered.size, 160).astype(int)) - 1
    share = 100 * (index + 1) / values.size
    chart = Chart(
        "KL divergence of single positions",
        "KL divergence, nats",
        "% of positions above",
        [Series("", ordered[index].astype(float).tolist(), share.tolist())],
        log_x=True,
        log_y=True,
    )
    return figure(chart, "A steep fall is good: few positions pay much. The right end is the worst position.")


def _layer_charts(layers: LayerReport) -> list[str]:
    number = [float(error.layer) for error in layers.errors]

    def line(name: str, field: str) -> Series:
        values = [getattr(error, field) for error in layers.errors]
        return Series(name, number, [math.nan if value is None else value for value in values])

    lines = [
        line("hidden state after the layer", "hidden"),
        line("the layer's own part", "block"),
        line("ssm state", "ssm_state"),
        line("conv state", "conv_state"),
    ]
    errors = Chart(
        "Error layer by layer",
        "layer",
        "relative error",
        [series for series in lines if not all(map(math.isnan, series.y))],
        log_y=True,
        integers=True,
    )
    projections = list(dict.fromkeys(outlier.projection for outlier in layers.outliers))
    outliers = Chart(
        "Activation outliers",
        "layer",
        "largest / root mean square",
        [
            Series(
                name,
                [float(o.layer) for o in layers.outliers if o.projection == name],
                [o.peak / max(o.rms, 1e-30) for o in layers.outliers if o.projection == name],
            )
            for name in projections
        ],
        log_y=True,
        integers=True,
    )
    return [
        figure(errors, f"Norm of the difference over norm of the checkpoint's values, over {layers.tokens} tokens."),
        figure(outliers, "Inputs of the projections in the checkpoint: the higher, the more a per-tensor scale loses."),
    ]


def _drift_charts(drift: DriftReport) -> list[str]:
    position = [float(p) for p in drift.position]
    divergence = Chart(
        f"Drift over {drift.position[-1]:,} tokens: predictions",
        "tokens read",
        "nats a token",
        [Series("KL divergence", position, drift.kl), Series("increase of the loss", position, drift.nll, dashed=True)],
    )
    lines = [("ssm states", drift.ssm_state), ("conv states", drift.conv_state)]
    states = Chart(
        f"Drift over {drift.position[-1]:,} tokens: states",
        "tokens read",
        "relative error",
        [Series(name, position, values) for name, values in lines if values],
    )
    return [
        figure(divergence, "One sequence, the state carried all the way: a line that rises says errors pile up in it."),
        figure(states, "All layers together, after each 128 tokens."),
    ]


def _layer_table(layers: LayerReport) -> str:
    def cell(value: float | None) -> str:
        return "–" if value is None else short(value)

    projections = list(dict.fromkeys(outlier.projection for outlier in layers.outliers))
    by_place = {(o.layer, o.projection): o for o in layers.outliers}
    columns = ["layer", "hidden", "own part", "ssm state", "conv state"]
    columns += [f"{name}: 99.9 % · largest" for name in projections]
    rows = []
    for e in layers.errors:
        row = [str(e.layer), *map(cell, (e.hidden, e.block, e.ssm_state, e.conv_state))]
        places = (by_place.get((e.layer, name)) for name in projections)
        row += ["–" if o is None else f"{short(o.p999)} · {short(o.peak)}" for o in places]
        rows.append(row)
    return table(columns, rows)


def _texts(texts: list[tuple[str, str, str]], first: list[int]) -> str:
    parts = []
    for number, ((prompt, found, wanted), tokens) in enumerate(zip(texts, first, strict=True), 1):
        same = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), len(found))
        verdict = "equal" if found == wanted else f"differs after {tokens} tokens"
        shown = f"<i>{html.escape(prompt[-160:])}</i>"
        columns = "".join(
            f"<div>{name}<pre>{shown}{html.escape(text[:same])}<mark>{html.escape(text[same:])}</mark></pre></div>"
            for name, text in (("bundle", found), ("checkpoint", wanted))
        )
        parts.append(f'<details><summary>{number}: {verdict}</summary><div class="pair">{columns}</div></details>')
    return "".join(parts)
