"""Damaged bundles, foreign checkpoints and wrong data through the real command line: refused in one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.cli.refusal import CHECKPOINT, USAGE, Refused
from tests.make_checkpoints import make_statespaces


@pytest.fixture
def bundle(tmp_path: Path, tiny_bundle: Path) -> Path:
    """A bundle that may be damaged."""
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize("name", ["weights.bin", "prefill.onnx", "step.onnx", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_bundle(name: str, damage: str, bundle: Path, refused: Refused) -> None:
    path = bundle / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-1])
    refused(CHECKPOINT, name, "generate", bundle, "--prompt", "def ", "-n", "1")


def test_damaged_bundle_is_refused_by_every_command(bundle: Path, refused: Refused, tiny_checkpoint: Path) -> None:
    with (bundle / "weights.bin").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff" * 8)
    (bundle.parent / "ids.bin").write_bytes(np.arange(2000, dtype="<u2").tobytes())
    refused(CHECKPOINT, "weights.bin", "verify", bundle, "--ckpt", tiny_checkpoint)
    refused(CHECKPOINT, "weights.bin", "perplexity", bundle, "--data", bundle.parent / "ids.bin")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "manifest"),
        ("[]", "manifest"),
        ("{}", "manifest"),
        ('{"schema_version": 99}', "schema 99"),
        ("\0", "manifest"),
    ],
)
def test_damaged_manifest(text: str, words: str, bundle: Path, refused: Refused) -> None:
    (bundle / "manifest.json").write_text(text)
    refused(CHECKPOINT, words, "generate", bundle, "--prompt", "def ")


def test_manifest_that_points_outside(bundle: Path, refused: Refused, tmp_path: Path) -> None:
    """A bundle is a folder: its manifest names nothing beyond."""
    (tmp_path / "secret").write_text("x")
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": "0" * 64}
    path.write_text(json.dumps(manifest))
    refused(CHECKPOINT, "../secret", "generate", bundle, "--prompt", "def ")


def test_no_bundle(refused: Refused, tmp_path: Path) -> None:
    refused(USAGE, "no such bundle", "generate", tmp_path / "nothing", "--prompt", "a")
    refused(USAGE, "is not a bundle", "generate", tmp_path, "--prompt", "a")


def test_verify_against_another_checkpoint(bundle: Path, refused: Refused, tmp_path: Path) -> None:
    refused(USAGE, "", "verify", bundle, "--ckpt", make_statespaces(tmp_path / "other"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("ids.bin", b"\0" * 101, "ids.bin"),
        ("empty.bin", b"", "empty.bin"),
        ("large.bin", np.full(4000, 60000, "<u2").tobytes(), "60000"),
        ("floats.npy", b"not an array", "floats.npy"),
        ("picture.png", b"\x89PNG\r\n\x1a\n" + bytes(range(128, 256)) * 40, "picture.png"),
        ("nothing.txt", None, "nothing.txt"),
    ],
)
def test_data_of_the_wrong_type(
    name: str, content: bytes | None, words: str, tiny_bundle: Path, refused: Refused, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(USAGE, words, "perplexity", tiny_bundle, "--data", tmp_path / name)


def test_npy_of_floats_or_objects(tiny_bundle: Path, refused: Refused, tmp_path: Path) -> None:
    np.save(tmp_path / "floats.npy", np.zeros(3000))
    refused(USAGE, "floats.npy", "perplexity", tiny_bundle, "--data", tmp_path / "floats.npy")
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object))
    refused(USAGE, "objects.npy", "perplexity", tiny_bundle, "--data", tmp_path / "objects.npy")
