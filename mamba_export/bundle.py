"""The bundle: a folder with graphs, weights, config, tokenizer and a manifest with checksums. Written atomically."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mamba_export.errors import BundleError, EnvironmentProblem, OutputExistsError, UsageError
from mamba_export.spec import ModelSpec
from mamba_export.states import State, StateType, state_table
from mamba_export.targets import Target, get_target

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PREFILL, STEP = "prefill.onnx", "step.onnx"
CPU_GRAPHS = {PREFILL: "prefill.cpu.onnx", STEP: "step.cpu.onnx"}
"""Second graphs over the same weights, which runners take on a CPU; only in bundles whose target has them."""
WEIGHTS, CONFIG, TOKENIZER = "weights.bin", "config.json", "tokenizer.json"
_BLOCK = 8 << 20


@dataclass
class Manifest:
    """What a bundle says of itself; the content of manifest.json."""

    spec: dict[str, Any]
    target: str
    dtype: str
    logits: str
    ragged: bool
    opset: int
    nodes: dict[str, dict[str, int]]
    """Per graph, named as its file without the suffix: op type → number of nodes."""
    checkpoint: dict[str, Any]
    tools: dict[str, str]
    eos_token_ids: list[int]
    states: list[dict[str, Any]]
    requires: str = ""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    verification: dict[str, Any] | None = None
    engines: list[dict[str, Any]] = field(default_factory=list)
    """What was built of the graphs, one entry a file under engines/; see :mod:`mamba_export.engine.build`."""
    quantization: dict[str, Any] | None = None
    """Of a quantized bundle: the recipe, and the provenance of its calibration."""
    schema_version: int = SCHEMA_VERSION


def state_rows(spec: ModelSpec, dtype: str, target: Target, ssm: StateType = "fp32") -> list[dict[str, Any]]:
    """The state table as the manifest holds it: shapes with the batch as a name."""
    return [
        {
            "name": state.name,
            "present": state.present,
            "kind": state.kind,
            "layer": state.layer,
            "dtype": state.dtype,
            "shape": ["batch", *state.shape],
            "axes": list(state.axes),
        }
        for state in state_table(spec, dtype, target.ssm_layout, ssm)
    ]


class Bundle:
    """An existing bundle, checked.

    Attributes:
        path: the folder.
        manifest: its manifest.
        spec: the model.
        target: the dialect its graphs are written in.
        states: the state table of its graphs.
    """

    def __init__(self, path: str | Path, check: bool = True, progress: Callable[[int], None] | None = None) -> None:
        """Open the bundle at ``path``.

        Args:
            path: the folder.
            check: compare the sha256 of every file with the manifest; otherwise names and sizes alone.
            progress: called with the number of bytes hashed since the last call.

        Raises:
            UsageError: when there is no bundle at ``path``.
            BundleError: when the bundle is damaged, incomplete or of a newer schema.
        """
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        self.spec = ModelSpec.from_dict(self.manifest.spec)
        self.target = get_target(self.manifest.target)
        ssm: StateType = (self.manifest.quantization or {}).get("state", "fp32")
        self.states: list[State] = state_table(self.spec, self.manifest.dtype, self.target.ssm_layout, ssm)
        self._check_files(check, progress)

    def file(self, name: str) -> Path:
        """Path of one of the bundle's files."""
        return self.path / name

    def graph(self, name: str, device: str) -> Path:
        """Path of the graph ``name`` (``prefill.onnx`` or ``step.onnx``) that suits ``device`` best."""
        for_cpu = CPU_GRAPHS[name]
        return self.path / (for_cpu if device == "cpu" and for_cpu in self.manifest.files else name)

    @property
    def nbytes(self) -> int:
        """Size of all files the manifest lists."""
        return sum(int(entry["bytes"]) for entry in self.manifest.files.values())

    @property
    def integer_inputs(self) -> bool:
        """Whether the recipe rounds the input of any linear layer to int8: a runtime may multiply integers."""
        recipe = self.manifest.quantization or {}
        parts = [recipe, *recipe.get("layers", {}).values()]
        return any(part.get("inputs", {}).get("type") == "int8" for part in parts)

    def _check_files(self, check: bool, progress: Callable[[int], None] | None) -> None:
        for name, entry in self.manifest.files.items():
            path = self.path / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise BundleError(f"the manifest of {self.path} names {name}, which lies outside the bundle")
            if not path.is_file():
                raise BundleError(f"{path} is missing")
            if path.stat().st_size != entry["bytes"]:
                raise BundleError(f"{path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}")
            if check and file_sha256(path, progress) != entry["sha256"]:
                raise BundleError(f"{path} is damaged: its sha256 is not the manifest's")

    def save_verification(self, verification: dict[str, Any]) -> None:
        """Record verification results in the manifest, atomically."""
        self.manifest.verification = verification
        self.save_manifest()

    def save_manifest(self) -> None:
        """Write the manifest as it stands, atomically."""
        target = self.path / MANIFEST
        partial = target.with_suffix(".partial")
        partial.write_text(_dump(asdict(self.manifest)), encoding="utf-8")
        os.replace(partial, target)


def _read_manifest(path: Path) -> Manifest:
    if not path.exists():
        raise UsageError(f"no such bundle: {path}")
    source = path / MANIFEST
    if not source.is_file():
        raise UsageError(f"{path} is not a bundle: it has no {MANIFEST}", "make one with: mamba-export onnx --ckpt …")
    try:
        data = json.loads(source.read_text(encoding="utf-8"))
        version = data["schema_version"]
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise BundleError(
                f"{source} is of schema {version}, this version reads up to {SCHEMA_VERSION}", "update mamba-export"
            )
        return Manifest(**data)
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{source} is not a manifest: {error}", "export the bundle again") from error


def file_sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Streamed sha256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def _dump(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


class BundleWriter:
    """The folder a bundle is written to before it takes its final name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def finish(self, manifest: Manifest) -> None:
        """Checksum every file and write the manifest."""
        for path in sorted(self.path.iterdir()):
            manifest.files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        (self.path / MANIFEST).write_text(_dump(asdict(manifest)), encoding="utf-8")


@contextlib.contextmanager
def write_bundle(out: str | Path, force: bool = False, needed: int = 0) -> Iterator[BundleWriter]:
    """Write a bundle atomically: ``out`` appears whole when the block ends well, and not at all otherwise.

    Args:
        out: the folder to make.
        force: replace an existing bundle (nothing else is ever replaced).
        needed: bytes the bundle will take; checked against the free space first.

    Raises:
        OutputExistsError: ``out`` exists and may not be replaced.
        UsageError: ``out`` can't be made there.
        EnvironmentProblem: the disk is or would be full.
    """
    out = Path(out)
    check_output(out, force)
    partial: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        free = shutil.disk_usage(partial).free
        if needed > free:
            raise EnvironmentProblem(
                f"the bundle needs {needed / 1e6:,.0f} MB, {out.parent} has {free / 1e6:,.0f} MB free",
                "free some space or choose another -o",
            )
        yield BundleWriter(partial)
        partial.chmod(0o755)
        _move_into_place(partial, out)
    except OSError as error:
        hint = "free some space or choose another -o"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentProblem(f"the disk of {out.parent} is full", hint) from error
        if error.errno == errno.EFBIG:
            raise EnvironmentProblem(f"{out} is larger than a file may be here", hint) from error
        raise UsageError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def check_output(out: str | Path, force: bool) -> None:
    """Refuse an output path that exists, unless it is a bundle (or an empty folder) and ``force`` is set.

    Raises:
        OutputExistsError: with a hint that says which of the two it is.
    """
    out = Path(out)
    if not out.exists():
        return
    if out.is_dir() and not any(out.iterdir()):
        return
    if not (out.is_dir() and (out / MANIFEST).is_file()):
        raise OutputExistsError(f"{out} exists and is not a bundle", "choose another -o")
    if not force:
        raise OutputExistsError(f"{out} exists", "add --force to replace it, or choose another -o")


def _move_into_place(partial: Path, out: Path) -> None:
    if not out.exists():
        os.rename(partial, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    os.rename(out, old / out.name)
    try:
        os.rename(partial, out)
    except BaseException:
        os.rename(old / out.name, out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
