"""Bad input through the real command line: one clear line, a hint, the right exit code, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from tests.cli.refusal import CHECKPOINT, ENVIRONMENT, INTERRUPTED, USAGE, Refused, check_message
from tests.make_checkpoints import make_bare, make_huggingface, make_statespaces

MAMBA2 = {"layer": "Mamba2", "d_state": 6, "headdim": 8}


@pytest.fixture
def export_refused(refused: Refused, tmp_path: Path) -> Refused:
    """``export_refused(code, words, ckpt, *options)``: the export ends so and leaves nothing where the bundle goes."""

    def check(code: int, words: str, ckpt: str | Path, *options: str) -> str:
        room = tmp_path / "room"
        room.mkdir(exist_ok=True)
        message = refused(code, words, "onnx", "--ckpt", ckpt, "-o", room / "out", "--no-verify", *options)
        assert list(room.iterdir()) == [], "a half-written bundle"
        return message

    return check


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    change(weights)
    torch.save(weights, path)


# --- checkpoints -------------------------------------------------------------------------------------------------


def test_no_such_path(export_refused: Refused, tmp_path: Path) -> None:
    export_refused(USAGE, "no such file or folder", tmp_path / "nothing")


def test_empty_folder(export_refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    export_refused(CHECKPOINT, "empty folder", tmp_path / "empty")


@pytest.mark.parametrize("container", ["bin", "bin-legacy", "safetensors"])
@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99], ids=["empty", "header", "half", "almost"])
def test_truncated_weights(container: str, keep: float, export_refused: Refused, tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path / "ckpt", container=container)
    [path] = [p for p in folder.iterdir() if p.suffix != ".json"]
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    export_refused(CHECKPOINT, path.name, folder)


@pytest.mark.parametrize("container", ["bin", "safetensors"])
def test_overwritten_weights(container: str, export_refused: Refused, tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path / "ckpt", container=container)
    [path] = [p for p in folder.iterdir() if p.suffix != ".json"]
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))
    export_refused(CHECKPOINT, path.name, folder)


def test_a_pickle_that_runs_code_does_not_run(export_refused: Refused, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    folder = make_statespaces(tmp_path / "ckpt")
    torch.save({"backbone.embedding.weight": Hostile()}, folder / "pytorch_model.bin")
    export_refused(CHECKPOINT, "system", folder)
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Hostile()))
    export_refused(CHECKPOINT, "model.pt", tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "name", ["backbone.embedding.weight", "backbone.layers.1.mixer.A_log", "backbone.layers.0.mixer.conv1d.bias"]
)
def test_weights_that_are_no_numbers(name: str, value: str, export_refused: Refused, tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path / "ckpt")

    def poison(weights: dict[str, torch.Tensor]) -> None:
        weights[name].view(-1)[3] = float(value)

    change_weights(folder, poison)
    export_refused(CHECKPOINT, f"{name}|NaN or infinite", folder)


def test_weights_beyond_float16(export_refused: Refused, tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path / "ckpt")
    change_weights(folder, lambda weights: weights["backbone.layers.0.mixer.in_proj.weight"].view(-1)[:1].fill_(1e5))
    export_refused(CHECKPOINT, "in_proj.weight|1e+05|--dtype bf16", folder, "--dtype", "fp16")


def test_shapes_that_contradict_the_config(export_refused: Refused, tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path / "ckpt")
    change_config(folder, d_model=40)
    export_refused(CHECKPOINT, "backbone.embedding.weight|[56, 32]|[56, 40]|config.json", folder)


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_tensors_that_do_not_add_up(change: str, export_refused: Refused, tmp_path: Path) -> None:
    folder, name = make_statespaces(tmp_path / "ckpt"), "backbone.layers.1.mixer.D"

    def apply(weights: dict[str, torch.Tensor]) -> None:
        weights[name if change == "left over" else "other"] = weights.pop(name)
        if change == "left over":
            weights["backbone.layers.1.mixer.E"] = torch.zeros(3)

    change_weights(folder, apply)
    export_refused(CHECKPOINT, name if change == "missing" else "backbone.layers.1.mixer.E", folder)


@pytest.mark.parametrize("kind", ["llama", "jamba", "mamba3"])
def test_unsupported_architecture(kind: str, export_refused: Refused, tmp_path: Path) -> None:
    folder = make_huggingface(tmp_path / "ckpt")
    change_config(folder, model_type=kind)
    message = export_refused(CHECKPOINT, f"'{kind}'|supported: mamba, falcon_mamba, mamba2", folder)
    assert "not supported" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"d_model": 10**9},
        {"n_layer": 10**7},
        {"n_layer": 0},
        {"vocab_size": -1},
        {"d_model": 32.5},
        {"d_model": "wide"},
        {"ssm_cfg": {"d_state": 0}},
        {"ssm_cfg": {"d_conv": 1}},
        {"ssm_cfg": {"expand": 1e30}},
        {"ssm_cfg": {**MAMBA2, "headdim": 0}},
        {"ssm_cfg": {**MAMBA2, "ngroups": 3}},
    ],
    ids=str,
)
def test_absurd_dimensions(changes: dict[str, Any], export_refused: Refused, tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path / "ckpt")
    change_config(folder, **changes)
    export_refused(CHECKPOINT, "config.json", folder)


def test_config_that_is_not_json(export_refused: Refused, tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path / "ckpt")
    (folder / "config.json").write_text('{"d_model": 32,')
    export_refused(CHECKPOINT, "config.json|JSON", folder)


def test_a_tokenizer_of_another_model(export_refused: Refused, tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = make_statespaces(tmp_path / "ckpt")
    shutil.copyfile(tiny_checkpoint / "tokenizer.json", folder / "tokenizer.json")
    export_refused(CHECKPOINT, "tokenizer.json|4095|56", folder)


def test_a_tokenizer_that_is_none(export_refused: Refused, tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path / "ckpt")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    export_refused(CHECKPOINT, "tokenizer.json", folder)


# --- the output --------------------------------------------------------------------------------------------------


def test_existing_bundle(refused: Refused, tmp_path: Path, tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(tiny_bundle, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refused(USAGE, "exists|--force", "onnx", "--ckpt", tiny_checkpoint, "-o", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_force_replaces_bundles_only(refused: Refused, tmp_path: Path) -> None:
    folder, out = make_bare(tmp_path / "model.pt"), tmp_path / "photos"
    out.mkdir()
    (out / "holiday.jpg").write_text("precious")
    refused(USAGE, "is not a bundle", "onnx", "--ckpt", folder, "-o", out, "--force")
    refused(USAGE, "is not a bundle", "onnx", "--ckpt", folder, "-o", out / "holiday.jpg", "--force")
    assert (out / "holiday.jpg").read_text() == "precious"


def test_a_failed_export_keeps_the_old_bundle(refused: Refused, tmp_path: Path, tiny_bundle: Path) -> None:
    folder, out = make_statespaces(tmp_path / "ckpt"), tmp_path / "out"
    shutil.copytree(tiny_bundle, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    change_weights(folder, lambda weights: weights["backbone.norm_f.weight"].fill_(float("nan")))
    refused(CHECKPOINT, "backbone.norm_f.weight", "onnx", "--ckpt", folder, "-o", out, "--force", "--no-verify")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "out"]


def test_output_below_a_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ckpt = make_bare(tmp_path / "model.pt")
    refused(USAGE, "cannot write", "onnx", "--ckpt", ckpt, "-o", tmp_path / "file" / "out", "--no-verify")


def test_no_room_on_the_disk(export_refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before the first byte is written."""
    folder = make_statespaces(tmp_path / "ckpt")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    export_refused(ENVIRONMENT, "MB free", folder)


@pytest.mark.parametrize("where", ["write_weights", "save_graph"])
def test_disk_that_fills_up(
    where: str, export_refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"mamba_export.graph.external.{where}", full)
    export_refused(ENVIRONMENT, "is full", make_statespaces(tmp_path / "ckpt"))


def test_a_limit_on_file_sizes(tmp_path: Path, root: Path) -> None:
    """The same from the operating system: files may not grow beyond 64 kB."""
    ckpt, room = make_statespaces(tmp_path / "ckpt", d_model=128), tmp_path / "room"
    room.mkdir()
    command = f'ulimit -f 64; exec "{sys.executable}" cli.py onnx --ckpt "{ckpt}" -o "{room / "out"}" --no-verify'
    done = subprocess.run(["bash", "-c", command], cwd=root, capture_output=True, text=True, check=False)
    check_message(done.stderr, "out")
    assert done.returncode == ENVIRONMENT
    assert list(room.iterdir()) == []


@pytest.mark.parametrize("sign", ["trace", "weights"])
def test_interrupt(sign: str, tmp_path: Path, root: Path) -> None:
    """Ctrl-C while the graphs are traced, and while the weights are written."""
    ckpt, room = make_statespaces(tmp_path / "ckpt"), tmp_path / "room"
    room.mkdir()
    script = tmp_path / "slow.py"
    stage = {"trace": "trace prefill", "weights": "write weights"}[sign]
    script.write_text(
        "import sys, time, contextlib, signal\n"
        # A test run in the background is started with Ctrl-C ignored, which its children inherit.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from mamba_export.commands.console import Console\n"
        "from mamba_export.main import main\n"
        "original = Console.stage\n"
        "@contextlib.contextmanager\n"
        "def slow(self, name, total=None):\n"
        f"    if name == {stage!r}:\n"
        "        open(sys.argv[1], 'w').close()\n"
        "        time.sleep(60)\n"
        "    with original(self, name, total) as tick:\n"
        "        yield tick\n"
        "Console.stage = slow\n"
        "main(sys.argv[2:])\n"
    )
    ready = tmp_path / "ready"
    command = [sys.executable, script, ready, "onnx", "--ckpt", ckpt, "-o", room / "out", "--no-verify"]
    env = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not ready.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, stderr
    assert stderr.strip() == "error: interrupted"
    assert list(room.iterdir()) == []


# --- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["onnx"], "--ckpt"),
        (["onnx", "--ckpt", "x", "-o", "y", "--target", "tpu"], "tpu|tensorrt"),
        (["onnx", "--ckpt", "x", "-o", "y", "--dtype", "int3"], "int3|fp16"),
        (["onnx", "--ckpt", "x", "-o", "y", "--format", "gguf"], "gguf"),
        (["onnx", "--ckpt", "x", "-o", "y", "--quickly"], "--quickly"),
        (["exprot"], "exprot"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments(args: list[str], words: str, refused: Refused) -> None:
    refused(USAGE, words, *args)
