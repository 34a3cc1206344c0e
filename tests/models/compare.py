"""Compare a checkpoint with an oracle: through the torch model, then through every target's graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mamba_export import export_onnx, open_checkpoint
from mamba_export.models.weights import load_model
from mamba_export.runtime import OrtRunner
from mamba_export.states import state_table

Array = np.ndarray[Any, Any]
TARGETS = ("ort", "portable", "tensorrt")
F32 = 1e-5
_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16}


def relative(found: Any, wanted: Any) -> float:
    """Norm of the difference over the norm."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def random_ids(vocab_size: int, batch: int = 2, length: int = 11, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, vocab_size, (batch, length), dtype=np.int64)


def torch_logits(folder: Path, ids: Array, dtype: str = "fp32", compute: str | None = None) -> Array:
    """Logits of all positions by the torch model."""
    with open_checkpoint(folder) as checkpoint, torch.no_grad():
        model = load_model(checkpoint, dtype, compute)
        kind = _DTYPES[compute or dtype]
        states = [
            torch.zeros(
                ids.shape[0], *s.shape, dtype=kind if s.kind == "conv" or kind == torch.float64 else torch.float32
            )
            for s in state_table(checkpoint.spec, "fp32")
        ]
        logits: Array = model(torch.from_numpy(ids), states)[0].numpy()
    return logits


def check_target(
    folder: Path, out: Path, target: str, ids: Array, wanted: Array, limit: float = F32, **options: Any
) -> None:
    """Export and run: prefill at once, in two pieces, and step by step, all against the oracle's logits."""
    bundle = export_onnx(folder, out, target=target, logits="all", verify=False, **options).bundle
    runner = OrtRunner(bundle, threads=1)
    zero = runner.initial_state(ids.shape[0])
    whole, state = runner.prefill(ids, zero)
    assert relative(whole, wanted) < limit
    cut = ids.shape[1] // 3
    head, middle = runner.prefill(ids[:, :cut], zero)
    tail, chunked = runner.prefill(ids[:, cut:], middle)
    assert relative(np.concatenate([head, tail], axis=1), wanted) < limit
    tokens, stepped = [], zero
    for t in range(ids.shape[1]):
        token, stepped = runner.step(ids[:, t : t + 1], stepped)
        tokens.append(token)
    assert relative(np.concatenate(tokens, axis=1), wanted) < limit
    final = runner.state_to_numpy(state)
    for other in (chunked, stepped):
        for name, value in runner.state_to_numpy(other).items():
            assert relative(value, final[name]) < limit, name
