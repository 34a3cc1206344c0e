"""Run a checkpoint itself, in torch: the oracle of verification."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mamba_export.checkpoint import Checkpoint
from mamba_export.models.lm import MambaLM, build_model
from mamba_export.models.weights import load_model
from mamba_export.quantized import QuantizedModel
from mamba_export.runtime.base import Ids, Logits, StateValues
from mamba_export.states import INT8_MAX, LEAST_SCALE, Layout, state_table


class TorchRunner:
    """The torch model behind the Runner protocol; logits are always those of every position.

    Args:
        checkpoint: an open checkpoint.
        dtype: what the weights are rounded to, as in the bundle it is compared with.
        compute: the precision of the arithmetic, ``fp32`` or ``fp64``.
        layout: in which :meth:`state_to_numpy` gives Mamba-2 states.
        quantized: run this quantized model of the checkpoint.
        device: where it runs; on ``cuda`` the ops take the kernels (see :mod:`mamba_export.ops.dispatch`).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: str = "fp32",
        compute: str = "fp32",
        layout: Layout = "PN",
        quantized: QuantizedModel | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.spec, self.layout, self.device = checkpoint.spec, layout, torch.device(device)
        self._wide = torch.float64 if compute == "fp64" else torch.float32
        self.prefill_model = load_model(checkpoint, dtype, compute).to(self.device)
        self.step_model = _step_twin(self.prefill_model, compute)
        self._ssm = "fp32" if quantized is None else quantized.state
        if quantized is not None:
            from mamba_export.calibration.simulation import apply

            self.prefill_model, self.step_model = (apply(m, quantized) for m in (self.prefill_model, self.step_model))

    def initial_state(self, batch: int) -> StateValues:
        states = state_table(self.spec, "fp32")
        return {s.name: torch.zeros(batch, *s.shape, dtype=self._wide, device=self.device) for s in states}

    def prefill(
        self, input_ids: Ids, state: StateValues, seq_lens: NDArray[np.int32] | None = None
    ) -> tuple[Logits, StateValues]:
        lens = None if seq_lens is None else torch.from_numpy(seq_lens.astype(np.int32)).to(self.device)
        return self._run(self.prefill_model, input_ids, state, lens)

    def step(self, input_ids: Ids, state: StateValues) -> tuple[Logits, StateValues]:
        return self._run(self.step_model, input_ids, state, None)

    def state_to_numpy(self, state: StateValues) -> dict[str, NDArray[Any]]:
        arrays = {name: value.cpu().numpy() for name, value in state.items()}
        if self.layout == "NP" and self.spec.family == "mamba2":
            swap = {name: a.swapaxes(-1, -2) for name, a in arrays.items() if name.startswith("ssm_state")}
            arrays.update(swap)
        return arrays

    def state_from_numpy(self, arrays: dict[str, NDArray[Any]]) -> StateValues:
        swap = self.layout == "NP" and self.spec.family == "mamba2"
        state = {}
        for name, array in arrays.items():
            values = array.swapaxes(-1, -2) if swap and name.startswith("ssm_state") else array
            state[name] = torch.from_numpy(np.ascontiguousarray(values)).to(self.device, self._wide)
        return state

    def _run(
        self, model: MambaLM, ids: Ids, state: StateValues, seq_lens: torch.Tensor | None
    ) -> tuple[Logits, StateValues]:
        with torch.inference_mode():
            tokens = torch.from_numpy(np.ascontiguousarray(ids)).to(self.device)
            logits, *presents = model(tokens, list(state.values()), seq_lens)
        kept = dict(zip(state, presents, strict=True))
        if self._ssm != "fp32":
            kept = {n: _round_state(v, self._ssm) if n.startswith("ssm") else v for n, v in kept.items()}
        return logits.float().cpu().numpy(), kept


def _round_state(state: torch.Tensor, kind: str) -> torch.Tensor:
    """As the graphs round it; d_state is the last axis of the torch model's state."""
    if kind == "fp16":
        return state.half().to(state.dtype)
    scale = state.abs().amax(-1, keepdim=True).clamp(min=LEAST_SCALE * INT8_MAX) / INT8_MAX
    return (state / scale).round().clamp(-128, 127) * scale


def _step_twin(model: MambaLM, compute: str) -> MambaLM:
    """The step model over the same weights."""
    twin = build_model(model.spec, compute, step=True)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin
