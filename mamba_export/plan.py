"""What a model takes on a device before anything runs: memory part by part, and the speed that bandwidth allows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mamba_export.bundle import MANIFEST, STEP, WEIGHTS, Bundle
from mamba_export.devices import Device
from mamba_export.errors import UsageError
from mamba_export.runtime.prefill import CHUNK
from mamba_export.spec import ModelSpec
from mamba_export.states import state_table

# Bytes a weight. int8 has a float32 scale a row, which does not show; int4 a float16 scale for every 128 weights.
WEIGHT_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 128}
_FLOAT32 = ("A_log", ".D", "dt_bias", "dt_proj.bias")
# Python with ONNX Runtime, and what its session holds for each layer's nodes: measured on Linux, x86-64.
_HOST_RUNTIME, _PER_LAYER = 64e6, 0.39e6
# CUDA context and libraries of a GPU process: an estimate, it differs between drivers.
_GPU_RUNTIME = 600e6
# Two sets of states swap roles at every step.
_STATE_SETS = 2
# Prefill's scratch memory in units of its largest activation per token, and what matrix products of more than one row
# take: measured with ONNX Runtime.
_SCRATCH = {"mamba1": 1.05, "mamba2": 2.4}
_PRODUCTS = 3.5e6


@dataclass(frozen=True)
class Plan:
    """One model in one dtype on one device, for one batch. Sizes are in bytes.

    Attributes:
        mode: ``step`` (the step graph alone, low memory) or ``prefill+step``.
        weights: in the bundle's file, or of it what the step graph takes.
        packed: the second copy that ONNX Runtime packs on a CPU for faster steps, and the tied embedding, which both
            graphs map and which so counts twice as resident.
        states: all buffers of all rows.
        workspace: scratch memory and logits of the larger of the two graphs.
        runtime: the process without the model.
        available: what the device leaves to programs.
        tokens_per_second: all rows together, if reading weights and states were all the time there is.
    """

    device: str
    dtype: str
    batch: int
    mode: str
    weights: float
    packed: float
    states: float
    workspace: float
    runtime: float
    available: float
    tokens_per_second: float

    @property
    def total(self) -> float:
        """Peak memory of the process."""
        return self.weights + self.packed + self.states + self.workspace + self.runtime

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.total <= self.available

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with ``total`` and ``fits``."""
        return {**asdict(self), "total": self.total, "fits": self.fits}


def plan_memory(
    spec: ModelSpec,
    device: Device,
    *,
    dtype: str = "fp32",
    batch: int = 1,
    chunk: int = CHUNK,
    step_only: bool = False,
    weights: float | None = None,
    step_weights: float | None = None,
) -> Plan:
    """Memory and the bandwidth-bound speed of a model on a device.

    Args:
        spec: the model.
        device: where.
        dtype: of the weights, a key of :data:`WEIGHT_BYTES`; activations are float32, or float16 below that.
        batch: rows.
        chunk: tokens a prefill call takes at most.
        step_only: without the prefill graph, and without packed weights.
        weights: size of the weights, when it is known better than from the spec.
        step_weights: of those of the step graph alone, if they are fewer: a fused step has rows of its own.

    Raises:
        UsageError: an argument is out of range.
    """
    if dtype not in WEIGHT_BYTES:
        raise UsageError(f"no dtype named '{dtype}'", f"one of: {', '.join(WEIGHT_BYTES)}")
    if batch < 1 or chunk < 1:
        raise UsageError(f"batch = {batch} and chunk = {chunk} must be at least 1")
    weights = weight_bytes(spec, dtype) if weights is None else weights
    step_weights = weights if step_weights is None else step_weights
    one_state = state_bytes(spec, dtype)
    activation = 4 if dtype == "fp32" else 2
    logits = batch * spec.vocab_size * 4
    scratch = 0.0 if step_only else _SCRATCH[spec.family] * batch * chunk * _widest(spec, activation)
    graphs = 1 if step_only else 2
    packed = 0.0 if step_only or device.gpu else weights + _mapped_twice(spec, dtype)
    products = _PRODUCTS if batch > 1 or not step_only else 0.0
    runtime = (_GPU_RUNTIME if device.gpu else _HOST_RUNTIME) + graphs * _PER_LAYER * spec.n_layer
    return Plan(
        device=device.name,
        dtype=dtype,
        batch=batch,
        mode="step" if step_only else "prefill+step",
        weights=step_weights if step_only else weights,
        packed=packed,
        states=_STATE_SETS * batch * one_state,
        workspace=scratch + logits + products,
        runtime=runtime,
        available=device.memory - device.reserved,
        tokens_per_second=batch
        * device.bandwidth
        / (_read_per_step(spec, dtype, step_weights, batch) + 2 * batch * one_state),
    )


def weight_bytes(spec: ModelSpec, dtype: str) -> float:
    """Size of all parameters in ``dtype``; A, D and the bias of Δ stay float32."""
    from mamba_export.checkpoint import expected_tensors

    total = 0.0
    for name, shape in expected_tensors(spec).items():
        if name.startswith("lm_head") and spec.tie_embeddings:
            continue
        small = len(shape) < 2 and dtype in ("int8", "int4")
        each = 4.0 if name.endswith(_FLOAT32) else 2.0 if small else WEIGHT_BYTES[dtype]
        total += math.prod(shape) * each
    return total


def state_bytes(spec: ModelSpec, dtype: str) -> int:
    """Size of one row's states: the scan's in float32, the convolution's in the type of activations."""
    conv = 4 if dtype == "fp32" else 2
    return sum(math.prod(state.shape) * (conv if state.kind == "conv" else 4) for state in state_table(spec, "fp32"))


def _mapped_twice(spec: ModelSpec, dtype: str) -> float:
    return spec.padded_vocab_size * spec.d_model * WEIGHT_BYTES[dtype] if spec.tie_embeddings else 0.0


def _widest(spec: ModelSpec, activation: int) -> float:
    """Bytes a token of the largest thing prefill holds: the decays of a Mamba-1 scan, a Mamba-2 layer's inputs."""
    if spec.family == "mamba1":
        return spec.d_inner * spec.d_state * 4
    return (spec.d_in_proj + spec.conv_dim + spec.d_inner) * activation


def _read_per_step(spec: ModelSpec, dtype: str, weights: float, batch: int) -> float:
    """Bytes of weights a step reads: all of them, but of an untied embedding only a row for each token."""
    if spec.tie_embeddings:
        return weights
    row = spec.d_model * WEIGHT_BYTES[dtype]
    return weights - (spec.padded_vocab_size - batch) * row


@dataclass(frozen=True)
class Model:
    """What is known of a model before it is planned.

    Attributes:
        dtype: its own.
        weights: bytes of a bundle's weights, None for a checkpoint.
        step_weights: of those, the bytes that the step graph refers to.
    """

    spec: ModelSpec
    dtype: str
    weights: float | None = None
    step_weights: float | None = None


def open_model(path: str | Path) -> Model:
    """The model in a bundle or checkpoint.

    Raises:
        UsageError: there is neither at ``path``.
        BundleError: the bundle's step graph is damaged.
        CheckpointError: the checkpoint is damaged or not supported.
    """
    if (Path(path) / MANIFEST).is_file():
        from mamba_export.engine.onnx_wire import external_bytes  # the engine's package plans kits

        bundle = Bundle(path, check=False)
        step = external_bytes(bundle.file(STEP).read_bytes()) if STEP in bundle.manifest.files else None
        return Model(bundle.spec, bundle.manifest.dtype, float(bundle.manifest.files[WEIGHTS]["bytes"]), step)
    from mamba_export.checkpoint import open_checkpoint
    from mamba_export.extras import require

    require("torch", "safetensors", extra="export", purpose="reading a checkpoint")
    with open_checkpoint(path) as checkpoint:
        return Model(checkpoint.spec, checkpoint.dtype)
