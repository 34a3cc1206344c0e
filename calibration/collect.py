"""Run calibration windows through the model and watch what its linear layers are given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamba_export.checkpoint import Checkpoint, open_checkpoint
from mamba_export.data import Tokens
from mamba_export.errors import OutputExistsError, UsageError
from mamba_export.extras import require
from mamba_export.models.lm import MambaLM
from mamba_export.models.weights import load_model
from mamba_export.progress import Progress, silent
from mamba_export.states import state_table
from mamba_export.version import __version__

from .data import read_windows, windows_sha256
from .observers import Observer
from .scans import fast_scans
from .statistics import Statistics, read_statistics

# Tokens a forward pass takes: enough to keep the cores busy, few enough that activations stay small.
_TOKENS = 512
_SAVE_EVERY = 8


def calibrate(
    ckpt: str | Path,
    data: str | Path | Tokens,
    out: str | Path,
    *,
    windows: int = 128,
    length: int = 512,
    device: str = "cpu",
    force: bool = False,
    format: str | None = None,
    progress: Progress = silent,
) -> Statistics:
    """Activation statistics of a checkpoint on token data, written to a safetensors file.

    Memory does not depend on ``windows``. A run that was interrupted continues when it is started again with the same
    arguments: until the end its state lies beside ``out`` with the suffix ``.partial``.

    Args:
        ckpt: folder, file or hub id.
        data: token file (.bin, .npy), text (through the checkpoint's tokenizer), or int64 ids.
        out: the file to write.
        windows: number of windows, spread evenly over the data.
        length: tokens a window.
        device: of torch: ``cpu`` or ``cuda``.
        force: replace ``out``.
        format: of the checkpoint, when detection is not wanted.
        progress: gets told what is being done.

    Raises:
        UsageError: the data does not fit the model, or its activations say nothing.
        CheckpointError: the checkpoint is damaged or not supported.
    """
    require("torch", "safetensors", extra="export", purpose="calibrate")
    out = Path(out)
    if windows < 1 or length < 2:
        raise UsageError(f"windows = {windows} and length = {length} are too few", "at least 1 window of 2 tokens")
    if out.exists() and not force:
        raise OutputExistsError(f"{out} exists", "add --force to replace it, or choose another -o")
    if not out.parent.is_dir():
        raise UsageError(f"cannot write {out}: its folder does not exist")
    check_device(device)
    with open_checkpoint(ckpt, format) as checkpoint:
        spec = checkpoint.spec
        ids = torch.from_numpy(read_windows(data, spec.vocab_size, checkpoint.tokenizer, windows, length))
        provenance = {
            "checkpoint": checkpoint.path.resolve().name,
            "checkpoint_sha256": checkpoint.sha256(),
            "data": "ids" if not isinstance(data, (str, Path)) else Path(data).name,
            "data_sha256": windows_sha256(ids.numpy()),
            "windows": ids.shape[0],
            "length": length,
            "mamba_export": __version__,
            "torch": str(torch.__version__),
        }
        partial = out.with_name(f".{out.name}.partial")
        found = _resume(partial, ids, provenance)
        _collect(checkpoint, found, device, partial, progress)
    found.check_values()
    found.save(out)
    partial.unlink(missing_ok=True)
    return found


def check_device(device: str) -> None:
    """Raises UsageError when torch can't use ``device``."""
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise UsageError(f"torch has no device '{device}' here", "use --device cpu")


def _resume(partial: Path, ids: Tensor, provenance: dict[str, Any]) -> Statistics:
    with contextlib.suppress(UsageError):
        found = read_statistics(partial)
        if found.provenance == provenance:
            return found
    return Statistics(ids, provenance=provenance)


def _collect(checkpoint: Checkpoint, found: Statistics, device: str, partial: Path, progress: Progress) -> None:
    model = load_model(checkpoint, "fp32").to(device)
    total, length = found.ids.shape
    rows = max(1, _TOKENS // length)
    with (
        progress.stage("calibrate", total=total) as tick,
        torch.inference_mode(),
        fast_scans(),
        _watch(model, found, device),
    ):
        tick(found.done)
        for start in range(found.done, total, rows):
            batch = found.ids[start : start + rows].to(device)
            for i, state in enumerate(run(model, batch)):
                peak = state.abs().amax(0) if state.dim() == 3 else state.abs().amax((0, 2))
                found.states[i] = torch.maximum(found.states[i], peak.cpu()) if i in found.states else peak.cpu()
            found.done += batch.shape[0]
            tick(batch.shape[0])
            if (start // rows) % _SAVE_EVERY == _SAVE_EVERY - 1 and not found.complete:
                found.check_values()
                found.save(partial)


def run(model: MambaLM, ids: Tensor) -> Iterator[Tensor]:
    """All of the model but the head's product, from zero states; gives the SSM state of every layer at the end."""
    device = ids.device
    states = [torch.zeros(ids.shape[0], *s.shape, device=device) for s in state_table(model.spec, "fp32")]
    x: Tensor = model.backbone.embedding(ids)
    residual: Tensor | None = None
    for i, layer in enumerate(model.backbone.layers):
        x, residual, _, state = layer(x, residual, states[2 * i], states[2 * i + 1], None)
        yield state
    x, _ = model.backbone.norm_f(x, residual)
    head = model.lm_head
    for hook in list(head._forward_pre_hooks.values()):
        hook(head, (x,))


@contextlib.contextmanager
def _watch(model: MambaLM, found: Statistics, device: str) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name.endswith("dt_proj"):
            continue
        observer = found.inputs.get(name) or Observer(module.in_features, device)
        found.inputs[name] = observer

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], observer: Observer = observer) -> None:
            observer.add(inputs[0])

        handles.append(module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
