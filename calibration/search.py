"""Search: quantize by one recipe after the other, and see what each costs and what it saves.

Every recipe becomes a bundle. Each bundle is measured in ONNX Runtime: size of its weights, what its predictions lose
against the checkpoint in torch, and its speed. A recipe is on the frontier when no other is at least as small, as
good and as fast, and better in one of the three.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from mamba_export.calibration.recipes import load_recipe, names
from numpy.typing import NDArray

from mamba_export.bench import run_bench
from mamba_export.bundle import WEIGHTS, Bundle
from mamba_export.data import Tokens
from mamba_export.errors import MambaExportError, UsageError
from mamba_export.export import export_onnx
from mamba_export.progress import Progress, silent
from mamba_export.quantization import quantize
from mamba_export.runtime.base import Ids, Logits, Runner, StateValues
from mamba_export.runtime.ort import OrtRunner
from mamba_export.verification.charts import Chart, Series
from mamba_export.verification.page import cards, figure, make_document, table
from mamba_export.verification.perplexity import measure, open_reference, rows_of

FLOAT = "float"
"""Name of the bundle that is not quantized."""
# Logits of the reference are kept in a temporary file up to this size; beyond it they are computed anew every time.
_KEPT_BYTES = 4 << 30


@dataclass(frozen=True)
class Point:
    """One recipe.

    Attributes:
        recipe: its name, or ``float``.
        description: its own.
        bundle: folder of its bundle.
        weight_bytes: size of its weights.
        perplexity: through the bundle.
        increase, increase_error: over the checkpoint's perplexity, as a share, and its standard error.
        kl: mean KL divergence from the checkpoint, nats.
        top1: share of positions where both find the same token likeliest.
        step_ms: median of a step.
        prefill_tokens_per_second: of a prefill of 256 tokens.
        frontier: no other recipe is as small, as good and as fast.
    """

    recipe: str
    description: str
    bundle: str
    weight_bytes: int
    perplexity: float
    increase: float
    increase_error: float
    kl: float
    top1: float
    step_ms: float
    prefill_tokens_per_second: float
    frontier: bool = False


@dataclass
class Frontier:
    """Result of :func:`search`.

    Attributes:
        checkpoint: as it was given.
        tokens: predicted by each bundle.
        reference: perplexity of the checkpoint.
        points: by size, the largest first.
        skipped: recipes that could not be tried, and why.
    """

    checkpoint: str
    tokens: int
    reference: float
    points: list[Point] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def search(
    ckpt: str | Path,
    out: str | Path,
    data: str | Path | Tokens,
    *,
    recipes: Sequence[str] = (),
    calibration: str | Path | None = None,
    state: str | None = None,
    target: str = "ort",
    dtype: str = "fp32",
    limit: int | None = 32,
    window: int = 1024,
    format: str | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = silent,
) -> Frontier:
    """Try recipes on a checkpoint.

    Args:
        ckpt: folder, file or hub id.
        out: folder that receives a bundle a recipe, and the float one.
        data: what quality is measured on; not what calibration has seen.
        recipes: names or YAML files; all that come along when empty.
        calibration: statistics file of :func:`mamba_export.calibrate`; without it recipes that need one are skipped.
        state: type of the scan's state, over the recipes'.
        target: of the bundles.
        dtype: of what stays float.
        limit: windows of data; all when None.
        window: tokens a window.
        format: of the checkpoint.
        device: of torch, for recipes that run the model.
        force: replace bundles.
        progress: gets told what is being done.

    Raises:
        UsageError: the data does not fit the model, or not a single recipe could be tried.
    """
    folder = Path(out)
    options: dict[str, Any] = {"target": target, "dtype": dtype, "force": force, "format": format, "logits": "all"}
    export_onnx(ckpt, folder / FLOAT, verify=False, progress=progress, **options)
    plain = Bundle(folder / FLOAT, check=False)
    rows = rows_of(plain, data, window, limit)
    frontier = Frontier(str(ckpt), rows.shape[0] * (rows.shape[1] - 1), 0.0)
    with open_reference(ckpt, plain) as (reference, threads), tempfile.TemporaryDirectory() as scratch:
        size = 4 * frontier.tokens * plain.spec.vocab_size
        kept = Recorded(reference, Path(scratch) / "logits", size // 4) if size <= _KEPT_BYTES else reference
        judge = _Judge(frontier, rows, kept, threads, progress)
        judge.add(FLOAT, "not quantized", plain)
        for name in recipes or names():
            try:
                recipe = load_recipe(name)
                if recipe.needs_calibration and calibration is None:
                    frontier.skipped[recipe.name] = f"needs calibration for {recipe.needs_calibration}"
                    continue
                more = {"recipe": recipe, "calibration": calibration, "state": state, "device": device}
                target_folder = folder / recipe.name
                quantize(ckpt, target_folder, verify=False, progress=progress, **options, **more)
                judge.add(recipe.name, recipe.description, Bundle(target_folder, check=False))
            except UsageError:
                raise
            except MambaExportError as error:  # a type this runtime can't run, say
                frontier.skipped[name] = str(error)
    frontier.points = mark_frontier(sorted(frontier.points, key=lambda p: -p.weight_bytes))
    if len(frontier.points) < 2:
        raise UsageError("no recipe could be tried", next(iter(frontier.skipped.values()), None))
    return frontier


@dataclass
class _Judge:
    """Measures bundles."""

    frontier: Frontier
    rows: Tokens
    reference: Runner
    threads: int | None
    progress: Progress

    def add(self, recipe: str, description: str, bundle: Bundle) -> None:
        runner = OrtRunner(bundle, threads=self.threads)
        report = measure(runner, self.rows, bundle.manifest.logits, self.reference, self.progress)
        if isinstance(self.reference, Recorded):
            self.reference.rewind()
        assert report.increase is not None and report.increase_error is not None and report.reference is not None
        assert report.kl is not None and report.top1 is not None
        self.frontier.reference = report.reference
        prefill, step = run_bench(OrtRunner(bundle), [256], [32], [1], repetitions=3, progress=self.progress)
        self.frontier.points.append(
            Point(
                recipe,
                description,
                str(bundle.path),
                bundle.file(WEIGHTS).stat().st_size,
                report.perplexity,
                report.increase,
                report.increase_error,
                report.kl,
                report.top1,
                step.latency_ms["p50"],
                prefill.tokens_per_second,
            )
        )


class Recorded:
    """A runner that writes the logits of its first pass to a file and reads them in every later one.

    Every pass must ask for the same pieces in the same order; :meth:`rewind` ends one.
    """

    def __init__(self, runner: Runner, path: Path, values: int) -> None:
        self.spec, self._runner = runner.spec, runner
        self._logits: NDArray[np.float32] = np.memmap(path, np.float32, "w+", shape=(values,))
        self._at, self._replays = 0, False

    def rewind(self) -> None:
        """The next call is the first of a pass that repeats the last one."""
        self._at, self._replays = 0, True

    def initial_state(self, batch: int) -> StateValues:
        return {} if self._replays else self._runner.initial_state(batch)

    def prefill(
        self, input_ids: Ids, state: StateValues, seq_lens: NDArray[np.int32] | None = None
    ) -> tuple[Logits, StateValues]:
        shape = (*input_ids.shape, self.spec.vocab_size)
        part = self._logits[self._at : self._at + int(np.prod(shape))].reshape(shape)
        self._at += part.size
        if not self._replays:
            part[:], state = self._runner.prefill(input_ids, state, seq_lens)
        return part, state

    def step(self, input_ids: Ids, state: StateValues) -> tuple[Logits, StateValues]:
        return self.prefill(input_ids, state)

    def state_to_numpy(self, state: StateValues) -> dict[str, NDArray[Any]]:
        return self._runner.state_to_numpy(state)

    def state_from_numpy(self, arrays: dict[str, NDArray[Any]]) -> StateValues:
        return self._runner.state_from_numpy(arrays)


def mark_frontier(points: Sequence[Point]) -> list[Point]:
    """The points, those on the frontier marked."""

    def costs(p: Point) -> tuple[float, float, float]:
        return (p.weight_bytes, p.kl, p.step_ms)

    def beaten(p: Point) -> bool:
        return any(
            costs(q) != costs(p) and all(a <= b for a, b in zip(costs(q), costs(p), strict=True)) for q in points
        )

    return [replace(p, frontier=not beaten(p)) for p in points]


COLUMNS = ("recipe", "", "MB", "perplexity", "increase", "KL, nats", "same top", "step ms", "prefill tokens/s")


def rows_for_people(frontier: Frontier) -> list[list[str]]:
    """A table of the points; the second column marks the frontier."""
    return [
        [
            *(p.recipe, "★" if p.frontier else "", f"{p.weight_bytes / 1e6:.1f}", f"{p.perplexity:.4f}"),
            *(f"{100 * p.increase:+.3f} ± {100 * p.increase_error:.3f} %", f"{p.kl:.2e}", f"{100 * p.top1:.2f} %"),
            *(f"{p.step_ms:.2f}", f"{p.prefill_tokens_per_second:.0f}"),
        ]
        for p in frontier.points
    ]


def frontier_page(frontier: Frontier) -> str:
    """A page with the points in two pictures and a table."""
    name = Path(frontier.checkpoint).name
    best = min((p for p in frontier.points if p.recipe != FLOAT), key=lambda p: p.kl)
    small = min(frontier.points, key=lambda p: p.weight_bytes)
    head = cards(
        [
            ("perplexity of the checkpoint", f"{frontier.reference:.4f}"),
            (f"the best: {best.recipe}", f"{100 * best.increase:+.3f} %"),
            (f"the smallest: {small.recipe}", f"{small.weight_bytes / 1e6:.1f} MB"),
            ("tokens predicted by each", f"{frontier.tokens:,}"),
        ]
    )
    pictures = [
        figure(_scatter(frontier, "size", "weights, MB", lambda p: p.weight_bytes / 1e6), "Left and low is good."),
        figure(_scatter(frontier, "speed", "one step, ms", lambda p: p.step_ms), "ONNX Runtime on this machine."),
    ]
    skipped = [[recipe, reason] for recipe, reason in frontier.skipped.items()]
    rest = "<h2>Not tried</h2>" + table(["recipe", "why"], skipped) if skipped else ""
    return make_document(
        f"{name}: recipes",
        f'<h1>{name}: what recipes cost</h1><p class="sub">★ marks the frontier: no other recipe is as small, as good '
        f'and as fast</p>{head}<h2>Frontier</h2><div class="charts">{"".join(pictures)}</div><h2>Recipes</h2>'
        f"{table(COLUMNS, rows_for_people(frontier))}{rest}",
    )


def _scatter(frontier: Frontier, what: str, label: str, value: Any) -> Chart:
    kinds: list[tuple[Literal["on the frontier", "beaten"], list[Point]]] = [
        ("on the frontier", [p for p in frontier.points if p.frontier]),
        ("beaten", [p for p in frontier.points if not p.frontier]),
    ]
    series = [
        Series(kind, [value(p) for p in points], [p.kl for p in points], [p.recipe for p in points], points=True)
        for kind, points in kinds
        if points
    ]
    return Chart(f"Quality against {what}", label, "KL divergence, nats", series, log_y=True, height=340)
