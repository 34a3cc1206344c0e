"""What a checkpoint, a bundle or an engine holds, as plain data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from mamba_export.bundle import MANIFEST, Bundle, file_sha256
from mamba_export.checkpoint import open_checkpoint
from mamba_export.progress import Progress, silent


def inspect(
    path: str | Path, *, format: str | None = None, plugin: str | Path | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Describe what lies at ``path``.

    Args:
        path: a bundle (its checksums are verified), an engine (``.engine``), or a checkpoint: folder, file or hub id.
        format: of a checkpoint, when detection is not wanted.
        plugin: plugin library of an engine, where one is needed to load it.
        progress: gets told what is being done.

    Returns:
        A JSON-ready dict; ``kind`` says which of the three it is. Of an engine: see
        :func:`mamba_export.engine.describe_engine`.

    Raises:
        BundleError: the bundle is damaged.
        CheckpointError: the checkpoint is damaged or not supported.
    """
    if (Path(path) / MANIFEST).is_file():
        return _bundle(Path(path), progress)
    if Path(path).suffix == ".engine":
        from mamba_export.engine import describe_engine

        return {"kind": "engine", **describe_engine(path, plugin)}
    with open_checkpoint(path, format) as checkpoint:
        tensors = [
            {"name": t.name, "shape": list(t.shape), "dtype": t.dtype, "bytes": t.nbytes}
            for t in checkpoint.tensors.values()
        ]
        return {
            "kind": "checkpoint",
            "path": str(checkpoint.path),
            "format": checkpoint.format,
            "parameters": checkpoint.n_parameters,
            "bytes": checkpoint.nbytes,
            "dtype": checkpoint.dtype,
            "tokenizer": checkpoint.tokenizer is not None,
            "eos_token_ids": list(checkpoint.eos_token_ids),
            "assumptions": checkpoint.assumptions,
            "spec": checkpoint.spec.to_dict(),
            "tensors": tensors,
        }


def _bundle(path: Path, progress: Progress) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    with progress.stage("checksum", total=size) as tick:
        bundle = Bundle(path, progress=tick)
    facts = {"kind": "bundle", "path": str(path), "bytes": bundle.nbytes, **asdict(bundle.manifest)}
    for row in facts["engines"]:
        engine = bundle.file(row["file"])
        row["intact"] = engine.is_file() and file_sha256(engine) == row["sha256"]
    return facts
