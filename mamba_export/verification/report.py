"""What a verification found, output by output."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba_export.errors import VerificationError


@dataclass(frozen=True)
class Tolerance:
    """Bounds on one output.

    Attributes:
        relative: of ``norm(difference) / norm(reference)``.
        peak: of ``max|difference| / max|reference|``.
    """

    relative: float
    peak: float


# float32 graphs differ from torch by the order of sums alone. float16 graphs round every activation (2^-11 each), and
# a deep model adds these up. bfloat16 graphs are verified in float32 arithmetic on bfloat16 weights.
TOLERANCES = {
    "fp32": Tolerance(relative=5e-5, peak=5e-4),
    "fp16": Tolerance(relative=3e-2, peak=1e-1),
    "bf16": Tolerance(relative=5e-5, peak=5e-4),
    # Engines round activations to integers where the torch model does not, or the other way a hair's breadth from .5.
    "quantized": Tolerance(relative=5e-2, peak=2e-1),
}


@dataclass(frozen=True)
class OutputError:
    """How far one output is from the reference.

    Attributes:
        scenario: what was run.
        output: name of the output.
        max_abs: largest absolute difference.
        relative: norm of the difference over norm of the reference.
        ok: within tolerance.
    """

    scenario: str
    output: str
    max_abs: float
    relative: float
    ok: bool

    @classmethod
    def of(
        cls, scenario: str, output: str, found: NDArray[Any], wanted: NDArray[Any], tolerance: Tolerance
    ) -> OutputError:
        """Compare two arrays of the same shape; NaN or another shape is never ok."""
        if found.shape != wanted.shape:
            return cls(scenario, output, float("inf"), float("inf"), False)
        found, wanted = found.astype(np.float64), wanted.astype(np.float64)
        difference = found - wanted
        worst = float(np.abs(difference).max(initial=0.0))
        norm, peak = float(np.linalg.norm(wanted)), float(np.abs(wanted).max(initial=0.0))
        relative = float(np.linalg.norm(difference)) / max(norm, 1e-30)
        ok = relative <= tolerance.relative and worst <= tolerance.peak * max(peak, 1e-30)
        return cls(scenario, output, worst, relative, ok or worst == 0.0)


@dataclass
class VerificationReport:
    """All comparisons of one verification.

    Attributes:
        runtime: what ran the bundle, for people.
        tolerance: within which every output has to be.
        errors: one entry an output and scenario.
    """

    runtime: str
    tolerance: Tolerance
    errors: list[OutputError] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(error.ok for error in self.errors)

    def worst(self, prefix: str = "") -> OutputError:
        """The entry with the largest relative error among those whose output starts with ``prefix``."""
        return max(
            (e for e in self.errors if e.output.startswith(prefix)), key=lambda e: (not e.ok, e.relative, e.max_abs)
        )

    def raise_if_failed(self) -> None:
        """Raise :class:`VerificationError` naming the worst output, unless all is within tolerance."""
        if self.ok:
            return
        failed = [e for e in self.errors if not e.ok]
        worst = self.worst()
        raise VerificationError(
            f"{len(failed)} of {len(self.errors)} outputs differ from the checkpoint; worst: {worst.scenario}, "
            f"{worst.output}: max|Δ| {worst.max_abs:.2e}, relative {worst.relative:.2e}",
            "the graphs do not compute what the checkpoint computes: please report it with the checkpoint's config",
        )

    def summary(self) -> str:
        """One line for people."""
        logits, states = self.worst("logits"), self.worst("present")
        mark = "✓" if self.ok else "✗"
        scenarios = len({e.scenario for e in self.errors})
        n_states = len({e.output for e in self.errors if e.output.startswith("present")})
        return (
            f"{mark} logits relative {logits.relative:.1e}, max|Δ| {logits.max_abs:.1e}   "
            f"{mark} {n_states} states relative {states.relative:.1e}   ({scenarios} scenarios, {self.runtime})"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for the manifest."""
        rows = [asdict(error) for error in self.errors]
        return {"ok": self.ok, "runtime": self.runtime, "tolerance": asdict(self.tolerance), "outputs": rows}
