"""Random inputs of the ops, drawn by hypothesis, and one way to call any op on them.

A :class:`Sample` keeps apart what runs along time (so that tests can split, flip, pad and poison it) and what does
not. Dimensions are small and odd on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from mamba_export.ops.causal_conv1d import causal_conv1d, causal_conv1d_reference
from mamba_export.ops.selective_scan import selective_scan, selective_scan_reference
from mamba_export.ops.selective_state_update import selective_state_update
from mamba_export.ops.ssd_scan import NO_LIMIT, ssd_scan, ssd_scan_reference
from mamba_export.ops.ssd_state_update import ssd_state_update

Kind = Literal["conv", "scan", "ssd"]
KINDS: tuple[Kind, ...] = ("conv", "scan", "ssd")
Outputs = tuple[Tensor, Tensor]

OP_TYPES = {"conv": "MambaCausalConv1d", "scan": "MambaSelectiveScan", "ssd": "MambaSsdScan"}
STEP_TYPES = {"conv": "MambaCausalConv1d", "scan": "MambaSelectiveStateUpdate", "ssd": "MambaSsdStateUpdate"}


def examples(n: int) -> settings:
    """Hypothesis settings of this folder: few examples, no deadline, for the machine may be busy."""
    return settings(max_examples=n, deadline=None)


@dataclass(frozen=True)
class Sample:
    """Arguments of one op.

    Attributes:
        kind: which op.
        time: tensors [B, L, ...] by argument name; ``z`` is there when the gate is.
        fixed: weights by argument name, in the order of the op's signature.
        state: the initial state.
        options: the attributes, by the names of the torch op.
    """

    kind: Kind
    time: dict[str, Tensor]
    fixed: dict[str, Tensor]
    state: Tensor
    options: dict[str, Any]

    @property
    def length(self) -> int:
        return next(iter(self.time.values())).shape[1]

    @property
    def batch(self) -> int:
        return self.state.shape[0]

    @property
    def reverse(self) -> bool:
        return bool(self.options.get("reverse", False))

    def map_time(self, function: Callable[[Tensor], Tensor]) -> Sample:
        return replace(self, time={name: function(value) for name, value in self.time.items()})

    def piece(self, start: int, stop: int) -> Sample:
        """Tokens ``start`` to ``stop`` from the same initial state."""
        return self.map_time(lambda x: x[:, start:stop].contiguous())

    def row(self, index: int, length: int) -> Sample:
        """One row alone, cut to ``length``."""
        alone = self.map_time(lambda x: x[index : index + 1, :length].contiguous())
        return replace(alone, state=self.state[index : index + 1])

    def with_state(self, state: Tensor) -> Sample:
        return replace(self, state=state)

    def with_options(self, **options: Any) -> Sample:
        return replace(self, options={**self.options, **options})

    def to(self, dtype: torch.dtype) -> Sample:
        """Activations in ``dtype``; everything in float64 when that is float64, as the ops then compute in it."""
        half = self.map_time(lambda x: x.to(dtype))
        wide = dtype if self.kind == "conv" or dtype == torch.float64 else torch.float32
        fixed = {name: value.to(wide) for name, value in self.fixed.items()}
        return replace(half, fixed=fixed, state=self.state.to(wide))

    def arguments(self, seq_lens: Tensor | None = None) -> tuple[Any, ...]:
        """Positional arguments of the prefill op."""
        t, f, o = self.time, self.fixed, self.options
        if self.kind == "conv":
            return t["x"], f["weight"], f["bias"], self.state, seq_lens, o["activation"]
        if self.kind == "scan":
            operands = (t["u"], t["delta"], f["A"], t["B"], t["C"], f["D"], f["delta_bias"], self.state)
            return *operands, t.get("z"), seq_lens, o["softplus"], o["reverse"]
        operands = (t["x"], t["dt"], f["A"], t["B"], t["C"], f["D"], f["dt_bias"], self.state)
        return *operands, t.get("z"), seq_lens, o["softplus"], o["dt_min"], o["dt_max"], o["reverse"]

    def step_arguments(self) -> tuple[Any, ...]:
        """Positional arguments of the step op."""
        if self.kind == "conv":
            return self.arguments()
        without_lens = [*self.arguments()[:9], *self.arguments()[10:-1]]
        return tuple(without_lens)


PREFILL_OPS: dict[Kind, Any] = {"conv": causal_conv1d, "scan": selective_scan, "ssd": ssd_scan}
STEP_OPS: dict[Kind, Any] = {"conv": causal_conv1d, "scan": selective_state_update, "ssd": ssd_state_update}
REFERENCES: dict[Kind, Any] = {
    "conv": causal_conv1d_reference,
    "scan": selective_scan_reference,
    "ssd": ssd_scan_reference,
}


def run(sample: Sample, seq_lens: Tensor | None = None) -> Outputs:
    """The torch op of the prefill graph."""
    y, present = PREFILL_OPS[sample.kind](*sample.arguments(seq_lens))
    return y, present


def run_step(sample: Sample) -> Outputs:
    """The torch op of the step graph; the sample has one token."""
    y, present = STEP_OPS[sample.kind](*sample.step_arguments())
    return y, present


def run_reference(sample: Sample, seq_lens: Tensor | None = None) -> Outputs:
    """The reference in the sample's own precision."""
    y, present = REFERENCES[sample.kind](*sample.arguments(seq_lens))
    return y, present


def _log_uniform(rng: np.random.Generator, low: float, high: float, shape: tuple[int, ...]) -> np.ndarray:
    return np.exp(rng.uniform(np.log(low), np.log(high), shape))


def _before_softplus(dt: np.ndarray) -> np.ndarray:
    """The inverse of softplus."""
    return dt + np.log(-np.expm1(-dt))


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(a)).float() for name, a in arrays.items()}


@st.composite
def samples(
    draw: st.DrawFn,
    kind: Kind | None = None,
    max_length: int = 9,
    reverse: bool | None = None,
    extreme: bool | None = None,
    min_length: int = 1,
) -> Sample:
    """A sample in float32. ``None`` lets hypothesis choose.

    Usual samples have Δ in 1e-3..1 and A in -16..-0.1; extreme ones Δ in 1e-8..50 and A in -1e3..-1e-4.
    """
    chosen: Kind = kind or draw(st.sampled_from(KINDS))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(min_length, max_length))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if chosen == "conv":
        return _conv(draw, rng, batch, length)
    wild = draw(st.booleans()) if extreme is None else extreme
    dt_range, a_range = ((1e-8, 50.0), (1e-4, 1e3)) if wild else ((1e-3, 1.0), (0.1, 16.0))
    groups, each, d_state = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 7))
    heads = groups * each
    options = {"softplus": draw(st.booleans()), "reverse": draw(st.booleans()) if reverse is None else reverse}
    if chosen == "scan":
        inner: tuple[int, ...] = (heads,)
        names, a_shape, d_shape = ("u", "delta", "delta_bias"), (heads, d_state), (heads,)
    else:
        headdim = draw(st.integers(1, 5))
        inner = (heads, headdim)
        names, a_shape = ("x", "dt", "dt_bias"), (heads,)
        d_shape = (heads, headdim) if draw(st.booleans()) else (heads,)
        low = draw(st.sampled_from([0.0, 1e-3, 0.05]))
        high = draw(st.sampled_from([NO_LIMIT, 0.1, 3.0]))
        options |= {"dt_min": low, "dt_max": high}
    x_name, dt_name, bias_name = names
    bias = rng.normal(size=heads)
    dt = _log_uniform(rng, *dt_range, (batch, length, heads))
    time = {
        x_name: rng.normal(size=(batch, length, *inner)),
        dt_name: (_before_softplus(dt) if options["softplus"] else dt) - bias,
        "B": rng.normal(size=(batch, length, groups, d_state)),
        "C": rng.normal(size=(batch, length, groups, d_state)),
    }
    if draw(st.booleans()):
        time["z"] = rng.normal(size=(batch, length, *inner))
    fixed = {"A": -_log_uniform(rng, *a_range, a_shape), "D": rng.normal(size=d_shape), bias_name: bias}
    state = torch.from_numpy(rng.normal(size=(batch, *inner, d_state))).float()
    return Sample(chosen, _tensors(time), _tensors(fixed), state, options)


def _conv(draw: st.DrawFn, rng: np.random.Generator, batch: int, length: int) -> Sample:
    channels, kernel = draw(st.integers(1, 7)), draw(st.integers(2, 8))
    fixed = {"weight": rng.normal(size=(channels, kernel)), "bias": rng.normal(size=channels)}
    state = torch.from_numpy(rng.normal(size=(batch, channels, kernel - 1))).float()
    time = {"x": rng.normal(size=(batch, length, channels))}
    return Sample("conv", _tensors(time), _tensors(fixed), state, {"activation": draw(st.booleans())})


@st.composite
def ragged_samples(draw: st.DrawFn, kind: Kind | None = None) -> tuple[Sample, Tensor]:
    """A sample and the valid lengths of its rows; padding is poisoned with NaN, infinities and huge numbers."""
    sample = draw(samples(kind, extreme=False))
    lens = torch.tensor(draw(st.lists(st.integers(0, sample.length), min_size=sample.batch, max_size=sample.batch)))
    poison = draw(st.sampled_from([float("nan"), float("inf"), float("-inf"), 3e38]))
    return poisoned(sample, lens, poison), lens.to(torch.int32)


def poisoned(sample: Sample, lens: Tensor, poison: float) -> Sample:
    """``sample`` with every padded position set to ``poison``."""

    def fill(x: Tensor) -> Tensor:
        padding = torch.arange(x.shape[1]) >= lens[:, None]
        return torch.where(padding.view(*padding.shape, *[1] * (x.dim() - 2)), torch.tensor(poison), x)

    return sample.map_time(fill)
