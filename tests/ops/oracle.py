"""The ops in closed form, float64 numpy: no recurrence, so that it shares nothing with the implementations.

A scan is a weighted sum over the past: ``h_t = exp(A ΣΔ_{1..t}) h_0 + Σ_s exp(A ΣΔ_{s+1..t}) Δ_s B_s x_s``.
Mamba-2 is brought to the form of Mamba-1 by repeating what a head shares.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from tests.ops.samples import Sample, run

Array = np.ndarray[Any, Any]


def silu(x: Array) -> Array:
    return x * np.exp(-np.logaddexp(0.0, -x))


def oracle(sample: Sample) -> tuple[Array, Array, Array, Array]:
    """What the op returns, and how large its terms are.

    Returns:
        y and the present state in the shapes of the op, then for each the sum of the magnitudes of its terms: the
        scale that rounding errors are measured by, for a sum may cancel.
    """
    exact, magnitude = _evaluate(sample, False), _evaluate(sample, True)
    return *exact, *magnitude


def _evaluate(sample: Sample, magnitude: bool) -> tuple[Array, Array]:
    def read(value: Any) -> Array:
        array: Array = value.double().numpy()
        return np.abs(array) if magnitude else array

    if sample.kind == "conv":
        time = {"x": read(sample.time["x"])}
        fixed = {name: read(value) for name, value in sample.fixed.items()}
        return _conv(time["x"], fixed["weight"], fixed["bias"], read(sample.state), sample.options["activation"])
    dt_names = ("delta", "delta_bias") if sample.kind == "scan" else ("dt", "dt_bias")
    delta = sample.time[dt_names[0]].double().numpy() + sample.fixed[dt_names[1]].double().numpy()
    if sample.options["softplus"]:
        delta = np.logaddexp(0.0, delta)
    delta = (
        np.clip(delta, sample.options.get("dt_min"), sample.options.get("dt_max")) if sample.kind == "ssd" else delta
    )
    A = sample.fixed["A"].double().numpy()
    u, B, C, D = (
        read(v)
        for v in (
            sample.time["u" if "u" in sample.time else "x"],
            sample.time["B"],
            sample.time["C"],
            sample.fixed["D"],
        )
    )
    z = read(sample.time["z"]) if "z" in sample.time else None
    state = read(sample.state)
    shape, state_shape = u.shape, state.shape
    if sample.kind == "ssd":
        headdim = u.shape[3]
        u, state = u.reshape(*u.shape[:2], -1), state.reshape(state.shape[0], -1, state.shape[-1])
        z = None if z is None else z.reshape(u.shape)
        delta, A = np.repeat(delta, headdim, axis=2), np.repeat(A, headdim)[:, None]
        D = D.reshape(-1) if D.ndim == 2 else np.repeat(D, headdim)
    each = u.shape[2] // B.shape[2]
    B, C = np.repeat(B, each, axis=2), np.repeat(C, each, axis=2)  # [B, L, channels, N]
    if sample.reverse:
        u, delta, B, C = (v[:, ::-1] for v in (u, delta, B, C))
    y, present = _scan(u, delta, A, B, C, state)
    y = y + D * u
    y = y[:, ::-1] if sample.reverse else y
    y = y if z is None else y * silu(z)
    return y.reshape(shape), present.reshape(state_shape)


def _scan(u: Array, delta: Array, A: Array, B: Array, C: Array, state: Array) -> tuple[Array, Array]:
    """u and delta [B, L, D], A [D, N or 1], B and C [B, L, D, N], state [B, D, N] → C·h [B, L, D] and the last h."""
    elapsed = np.cumsum(delta, axis=1)
    terms = (delta * u)[..., None] * B  # what each token adds to the state
    outputs = []
    for t in range(u.shape[1]):
        decay = np.exp((elapsed[:, t : t + 1] - elapsed[:, : t + 1])[..., None] * A)  # [B, t+1, D, N]
        h = np.exp(elapsed[:, t, :, None] * A) * state + (decay * terms[:, : t + 1]).sum(axis=1)
        outputs.append((h * C[:, t]).sum(axis=-1))
    return np.stack(outputs, axis=1), h


def _conv(x: Array, weight: Array, bias: Array, state: Array, activation: bool) -> tuple[Array, Array]:
    kernel, length = weight.shape[1], x.shape[1]
    past = np.concatenate([state.transpose(0, 2, 1), x], axis=1)  # [B, K-1+L, C]
    y = np.stack([(past[:, t : t + kernel] * weight.T).sum(axis=1) + bias for t in range(length)], axis=1)
    return silu(y) if activation else y, past[:, length:].transpose(0, 2, 1)


def relative(found: Any, exact: Array, magnitude: Array) -> float:
    """The largest error in units of the size of the terms."""
    error = np.abs(np.asarray(found, np.float64) - exact)
    return float((error / (magnitude + 1e-30)).max(initial=0.0))


def assert_closed_form(found: tuple[Any, Any], sample: Sample, y_limit: float, present_limit: float) -> None:
    """``found``, y and the present state, is what the closed form gives, to limits in units of the terms' size."""
    y, present, y_size, present_size = oracle(sample)
    assert relative(found[0], y, y_size) < y_limit
    assert relative(found[1], present, present_size) < present_limit


def assert_ragged(found: tuple[Array, Array], sample: Sample, lens: Tensor) -> None:
    """``found`` is what the torch op gives on poisoned rows of valid lengths ``lens``, with zeros at the padding."""
    y, present = run(sample, lens)
    np.testing.assert_allclose(found[0], y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1], present, rtol=1e-5, atol=1e-5)
    for row, length in enumerate(lens.tolist()):
        assert not found[0][row, length:].any(), "padding of y is zero"
