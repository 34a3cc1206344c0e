"""mamba_ssm's language model in float64 numpy, written from its configs and the papers: an oracle, slow and literal.

It reads the state dict and config that mamba_ssm saves and shares no code with the package. One sequence position
after the other, every head and group by its index.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Weights = dict[str, Array]


def silu(x: Array) -> Array:
    return x * np.exp(-np.logaddexp(0.0, -x))


def softplus(x: Array) -> Array:
    return np.logaddexp(0.0, x)


def rms_norm(x: Array, weight: Array, eps: float = 1e-5) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias


def linear(x: Array, w: Weights, name: str) -> Array:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def causal_conv(x: Array, w: Weights) -> Array:
    """x [B, L, C] → silu(conv(x)), zeros before the first token."""
    weight = w["conv1d.weight"][:, 0]  # [C, K]
    kernel = weight.shape[1]
    y = np.zeros_like(x) + w.get("conv1d.bias", 0.0)
    for back in range(kernel):  # the last column meets the current token
        shifted = np.zeros_like(x)
        shifted[:, back:] = x[:, : x.shape[1] - back]
        y = y + shifted * weight[:, kernel - 1 - back]
    return silu(y)


def mamba1(x: Array, w: Weights, cfg: dict[str, Any]) -> Array:
    """x [B, L, d_model] → the same."""
    d_model = x.shape[2]
    d_inner, d_state = int(cfg.get("expand", 2) * d_model), cfg.get("d_state", 16)
    rank = math.ceil(d_model / 16) if cfg.get("dt_rank", "auto") == "auto" else cfg["dt_rank"]
    xz = linear(x, w, "in_proj")
    u, z = xz[..., :d_inner], xz[..., d_inner:]
    u = causal_conv(u, w)
    dbc = linear(u, w, "x_proj")
    dt, B, C = dbc[..., :rank], dbc[..., rank : rank + d_state], dbc[..., rank + d_state :]
    dt = softplus(linear(dt, w, "dt_proj"))
    A = -np.exp(w["A_log"])
    h, y = np.zeros((x.shape[0], d_inner, d_state)), np.zeros_like(u)
    for t in range(x.shape[1]):
        h = np.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        y[:, t] = (h * C[:, t, None, :]).sum(-1)
    return linear((y + w["D"] * u) * silu(z), w, "out_proj")


def mamba2(x: Array, w: Weights, cfg: dict[str, Any]) -> Array:
    """x [B, L, d_model] → the same."""
    batch, length, d_model = x.shape
    d_inner, d_state = int(cfg.get("expand", 2) * d_model), cfg.get("d_state", 128)
    d_ssm, headdim, groups = cfg.get("d_ssm") or d_inner, cfg.get("headdim", 64), cfg.get("ngroups", 1)
    heads, width = d_ssm // headdim, groups * d_state
    low, high = cfg.get("dt_limit", (0.0, math.inf))
    sizes = [d_inner - d_ssm, d_inner - d_ssm, d_ssm, d_ssm + 2 * width]
    z0, x0, z, xbc, dt = np.split(linear(x, w, "in_proj"), np.cumsum(sizes), axis=-1)
    xbc = causal_conv(xbc, w)
    u = xbc[..., :d_ssm].reshape(batch, length, heads, headdim)
    B, C = (
        xbc[..., d_ssm + i * width : d_ssm + (i + 1) * width].reshape(batch, length, groups, d_state) for i in (0, 1)
    )
    dt = np.clip(softplus(dt + w["dt_bias"]), low, high)
    A = -np.exp(w["A_log"])
    D = w["D"].reshape(heads, headdim) if cfg.get("D_has_hdim", False) else w["D"][:, None]
    y = np.zeros_like(u)
    for head in range(heads):
        group = head // (heads // groups)
        h = np.zeros((batch, headdim, d_state))
        for t in range(length):
            step = dt[:, t, head, None, None]
            h = np.exp(step * A[head]) * h + step * u[:, t, head, :, None] * B[:, t, group, None, :]
            y[:, t, head] = (h * C[:, t, group, None, :]).sum(-1) + D[head] * u[:, t, head]
    y = y.reshape(batch, length, d_ssm)
    if not cfg.get("rmsnorm", True):
        y = y * silu(z)
    elif cfg.get("norm_before_gate", False):
        y = grouped_norm(y, w["norm.weight"], groups) * silu(z)
    else:
        y = grouped_norm(y * silu(z), w["norm.weight"], groups)
    return linear(np.concatenate([silu(z0) * x0, y], axis=-1), w, "out_proj")


def grouped_norm(x: Array, weight: Array, groups: int) -> Array:
    parts = [rms_norm(part, 1.0) for part in np.split(x, groups, axis=-1)]
    return np.concatenate(parts, axis=-1) * weight


def logits(config: dict[str, Any], weights: Weights, input_ids: Array) -> Array:
    """input_ids [B, L] → float64 logits [B, L, vocab_size]."""
    weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    ssm_cfg = config["ssm_cfg"]
    mixer = {"Mamba1": mamba1, "Mamba2": mamba2}[ssm_cfg.get("layer", "Mamba1")]

    def norm(name: str, x: Array) -> Array:
        if config["rms_norm"]:
            return rms_norm(x, weights[f"{name}.weight"])
        return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = weights["backbone.embedding.weight"][input_ids]
    for i in range(config["n_layer"]):
        layer = f"backbone.layers.{i}"
        own = {k[len(layer) + 7 :]: v for k, v in weights.items() if k.startswith(f"{layer}.mixer.")}
        x = x + mixer(norm(f"{layer}.norm", x), own, ssm_cfg)
        if config["d_intermediate"]:
            hidden = linear(norm(f"{layer}.norm2", x), weights, f"{layer}.mlp.fc1")
            value, gate = np.split(hidden, 2, axis=-1)
            x = x + linear(value * silu(gate), weights, f"{layer}.mlp.fc2")
    head = weights["backbone.embedding.weight" if config["tie_embeddings"] else "lm_head.weight"]
    result: Array = (norm("backbone.norm_f", x) @ head.T)[..., : config["vocab_size"]]
    return result
