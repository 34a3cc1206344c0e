"""Bad input to calibrate and quantize: one error, a hint, the right exit code, and nothing half-written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cli.refusal import USAGE, check_message
from tests.conftest import Cli

Case = Callable[[Path], list[str | Path]]


def _ids(folder: Path, *ids: int, name: str = "data.bin", count: int = 300) -> Path:
    path = folder / name
    np.resize(np.array(ids, "<u2"), count).tofile(path)
    return path


def _recipe(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


CALIBRATE: dict[str, tuple[Case, str]] = {
    "no data": (lambda d: ["--data", d / "none.bin"], "no such data file"),
    "ids of another tokenizer": (lambda d: ["--data", _ids(d, 5, 50000)], "50000|another tokenizer"),
    "too little data": (lambda d: ["--data", _ids(d, 5, count=20)], "less than one window"),
    "empty data": (lambda d: ["--data", _ids(d, 5, count=0)], "no tokens"),
    "half a token": (lambda d: ["--data", _odd(d)], "odd number of bytes"),
    "no such device": (lambda d: ["--data", _ids(d, 5), "--length", "64", "--device", "tpu"], "no device 'tpu'"),
}
QUANTIZE: dict[str, tuple[Case, str]] = {
    "unknown recipe": (lambda d: ["--recipe", "w3a3"], "no recipe named|w8a16"),
    "unknown key": (lambda d: ["--recipe", _recipe(d, "weight: {}")], "unknown key 'weight'"),
    "impossible group": (lambda d: ["--recipe", _recipe(d, "weights: {type: int4, group: 7}")], "can't be 7"),
    "no statistics": (lambda d: ["--recipe", "w8a8"], "needs calibration data|mamba-export calibrate"),
    "missing statistics": (lambda d: ["--recipe", "w8a8", "--calibration", d / "none"], "no such statistics file"),
    "damaged statistics": (lambda d: ["--recipe", "w8a8", "--calibration", _ids(d, 5)], "damaged or not a statistics"),
}


def _odd(folder: Path) -> Path:
    (folder / "odd.bin").write_bytes(b"abc")
    return folder / "odd.bin"


@pytest.mark.parametrize("case", CALIBRATE)
def test_calibrate_refuses(cli: Cli, tiny_checkpoint: Path, tmp_path: Path, case: str) -> None:
    arguments, words = CALIBRATE[case]
    given = arguments(tmp_path)
    before = sorted(tmp_path.iterdir())
    done = cli("calibrate", tiny_checkpoint, "-o", tmp_path / "out.safetensors", *given)
    assert done.returncode == USAGE
    check_message(done.stderr, words)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("case", QUANTIZE)
def test_quantize_refuses(cli: Cli, tiny_checkpoint: Path, tmp_path: Path, case: str) -> None:
    arguments, words = QUANTIZE[case]
    given = arguments(tmp_path)
    before = sorted(tmp_path.iterdir())
    done = cli("quantize", "--ckpt", tiny_checkpoint, "-o", tmp_path / "out", *given)
    assert done.returncode == USAGE
    check_message(done.stderr, words)
    assert sorted(tmp_path.iterdir()) == before


def test_quantize_refuses_statistics_of_another_checkpoint(
    cli: Cli, tiny_checkpoint: Path, statistics_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in tiny_checkpoint.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")  # the digest covers the config
    done = cli(
        *("quantize", "--ckpt", other, "--recipe", "w8a8", "--calibration", statistics_file, "-o", tmp_path / "out")
    )
    assert done.returncode == USAGE
    check_message(done.stderr, "belong to another checkpoint")
    assert not (tmp_path / "out").exists()
