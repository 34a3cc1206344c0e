"""A kit: a folder with all that a device needs to build a bundle's engines and write text, without this package."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mamba_export.bundle import PREFILL, STEP, TOKENIZER, Bundle, BundleWriter
from mamba_export.devices import Device, find_device_kind
from mamba_export.engine import kit_text
from mamba_export.engine.build import LOW_MEMORY
from mamba_export.engine.onnx_wire import without_functions
from mamba_export.engine.plugin import source_files, source_folders
from mamba_export.engine.profiles import DEFAULT_SEQ, ONE, Profile, Range
from mamba_export.errors import EnvironmentProblem, OutputExistsError, UsageError
from mamba_export.plan import Plan, open_model, plan_memory
from mamba_export.progress import Progress, silent
from mamba_export.version import __version__

FACTS = "kit.json"
SMALL_SEQ = Range(1, 128, 512)
"""Prompt lengths on devices with less than 16 GB; longer prompts run in pieces."""


@dataclass(frozen=True)
class Kit:
    """What :func:`make_kit` made.

    Attributes:
        path: the folder.
        device: name of the device it is for.
        arch: GPU architecture of the plugin library.
        single_engine: whether the build script makes one engine with two profiles.
        seq: prompt lengths of the engines: min, opt, max.
        engines: engine files of the bundle that run on this device and came along.
        bytes: size of everything.
        plan: what the model takes on the device; see :func:`mamba_export.plan.plan_memory`.
    """

    path: str
    device: str
    arch: str
    single_engine: bool
    seq: list[int]
    engines: list[str]
    bytes: int
    plan: dict[str, Any]


def make_kit(
    bundle: Bundle,
    device: str,
    out: str | Path,
    *,
    seq: Range | None = None,
    single_engine: bool | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Kit:
    """Collect what a device needs: graphs without function bodies, sources of plugins and program, scripts, a README.

    Args:
        bundle: of target ``tensorrt``, ``tensorrt-10.3`` or ``portable``.
        device: a name of the device table, or the beginning of one: ``orin-nano``.
        out: the folder to make.
        seq: prompt lengths of the engines; by the device's memory when None.
        single_engine: one engine with two profiles; by the device's memory when None.
        force: replace an existing kit (nothing else is ever replaced).
        progress: gets told what is being done.

    Raises:
        UsageError: the device has no NVIDIA GPU, the bundle is not for TensorRT, or ``out`` exists.
    """
    wanted, out = find_device_kind(device), Path(out)
    if not wanted.sm:
        raise UsageError(f"{wanted.title} has no NVIDIA GPU", "copy the bundle there; ONNX Runtime runs it")
    if bundle.target.flavour == "ort":
        raise UsageError(
            f"a bundle of target '{bundle.target.name}' holds ONNX Runtime's own ops, which TensorRT does not read",
            "export it with --target tensorrt",
        )
    _check_output(out, force)
    small = wanted.memory < LOW_MEMORY
    single = small if single_engine is None else single_engine
    seq = seq or (SMALL_SEQ if small else DEFAULT_SEQ)
    plan = _plan(bundle, wanted, seq)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror or error}") from error
    try:
        with progress.stage("kit", total=bundle.nbytes) as tick:
            engines = _copy_bundle(bundle, folder / "bundle", wanted, tick)
        _link_engines(folder)
        _copy_sources(folder, plugins=bundle.target.plugins)
        text = kit_text.Facts(
            device=wanted,
            bundle=Bundle(folder / "bundle", check=False),
            single=single,
            profiles=(Profile("prefill", ONE, seq), Profile("step", ONE, ONE)),
            plan=plan,
        )
        _write_texts(folder, text)
        kit = Kit(
            str(out), wanted.name, f"sm_{wanted.sm}", single, seq.to_list(), engines, _size(folder), plan.to_dict()
        )
        facts = {"made_by": f"mamba-export {__version__}", **asdict(kit)}
        (folder / FACTS).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        folder.chmod(0o755)
        if out.is_dir():
            shutil.rmtree(out)
        os.replace(folder, out)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {out}: {error.strerror or error}", "free some space") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return kit


def program_folder() -> Path:
    """The C++ program's sources, in a checkout or installed.

    Raises:
        EnvironmentProblem: the installation lacks them.
    """
    root = Path(__file__).resolve().parents[2]
    candidates = [root / "examples" / "jetson", root / "mamba_export" / "jetson"]
    found = next((folder for folder in candidates if (folder / "CMakeLists.txt").is_file()), None)
    if found is None:
        raise EnvironmentProblem("this installation lacks the C++ program", "install mamba-export again")
    return found


def _check_output(out: Path, force: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / FACTS).is_file():
        raise OutputExistsError(f"{out} exists and is not a kit", "choose another -o")
    if not force:
        raise OutputExistsError(f"{out} exists", "add --force to replace it, or choose another -o")


def _plan(bundle: Bundle, device: Device, seq: Range) -> Plan:
    model = open_model(bundle.path)
    return plan_memory(
        model.spec,
        device,
        dtype=model.dtype,
        chunk=seq.maximum,
        weights=model.weights,
        step_weights=model.step_weights,
    )


def _copy_bundle(bundle: Bundle, target: Path, device: Device, tick: Any) -> list[str]:
    """The bundle, its graphs without function bodies where the ops are plugins; returns the engines that came along.

    TensorRT up to 10.6 takes a function body where it could take the plugin, and nothing on the device needs bodies.
    """
    target.mkdir()
    manifest = copy.deepcopy(bundle.manifest)
    for name, entry in bundle.manifest.files.items():
        if bundle.target.functions and name in (PREFILL, STEP):
            (target / name).write_bytes(without_functions(bundle.file(name).read_bytes()))
            manifest.target = "tensorrt-10.3"
        else:
            shutil.copyfile(bundle.file(name), target / name)
        tick(int(entry["bytes"]))
    manifest.files, manifest.engines = {}, []
    BundleWriter(target).finish(manifest)
    made = Bundle(target, check=False)
    for row in bundle.manifest.engines:
        if device.sm in row["compute_capabilities"] and bundle.file(row["file"]).is_file():
            source = {name: made.manifest.files[name]["sha256"] for name in row["source"]}
            made.manifest.engines.append({**row, "source": source})
            library = [] if row["plugin"] is None else [str(Path(row["file"]).with_name(row["plugin"]["file"]))]
            for name in (row["file"], *library):
                if bundle.file(name).is_file():
                    _copy(bundle.file(name), target / name)
    made.save_manifest()
    return [row["file"] for row in made.manifest.engines]


def _link_engines(folder: Path) -> None:
    """TensorRT engines that came along, under the names the program knows; the build script keeps what is there."""
    target = folder / "engines"
    for row in Bundle(folder / "bundle", check=False).manifest.engines:
        if row["runtime"] != "tensorrt":
            continue
        target.mkdir(exist_ok=True)
        names = {f"{row['kind']}.engine": row["file"]}
        if row["plugin"] is not None:
            names[row["plugin"]["file"]] = str(Path(row["file"]).with_name(row["plugin"]["file"]))
        for name, source in names.items():
            (target / name).unlink(missing_ok=True)
            (target / name).symlink_to(Path("..") / "bundle" / source)


def _copy_sources(folder: Path, plugins: bool) -> None:
    if plugins:
        source_folders()
        for name, path in source_files().items():
            if "/tests/" not in name:
                _copy(path, folder / name)
    for path in sorted(program_folder().iterdir()):
        if path.suffix in (".cpp", ".h", ".inl", ".txt"):
            _copy(path, folder / "program" / path.name)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _write_texts(folder: Path, facts: kit_text.Facts) -> None:
    (folder / "README.md").write_text(kit_text.readme(facts), encoding="utf-8")
    has_tokenizer = facts.bundle.file(TOKENIZER).is_file()
    scripts = {"build.sh": kit_text.build_script(facts), "generate.sh": kit_text.generate_script(facts, has_tokenizer)}
    for name, text in scripts.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
