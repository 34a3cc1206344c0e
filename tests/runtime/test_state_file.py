"""State files: exact round trips, every kind of wrong file refused, and no moment with half a file."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_export.errors import UsageError
from mamba_export.runtime.state_file import Snapshot, load_state, save_state, to_layout
from mamba_export.spec import ModelSpec
from mamba_export.states import state_table

SPEC = ModelSpec(
    family="mamba2", d_model=16, n_layer=2, vocab_size=50, padded_vocab_size=56, d_inner=32, d_state=8,
    nheads=4, headdim=8, d_ssm=32, gated_norm_group_size=32,
)  # fmt: skip
SHA = "ab" * 32


def snapshot(seed: int = 0) -> Snapshot:
    rng = np.random.default_rng(seed)
    arrays = {s.name: rng.standard_normal((2, *s.shape)).astype(np.float32) for s in state_table(SPEC, "fp32")}
    return Snapshot([[1, 2, 3], [4]], arrays, [{"state": 2**100, "inc": 3}, {"state": 4, "inc": 5}])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_state(tmp_path / "talk.state", snapshot(), SPEC, SHA)
    return tmp_path / "talk.state"


def test_round_trip(saved: Path) -> None:
    found, wanted = load_state(saved, SPEC, SHA), snapshot()
    assert (found.tokens, found.random) == (wanted.tokens, wanted.random)
    assert all(np.array_equal(found.arrays[name], array) for name, array in wanted.arrays.items())


def test_safetensors_reads_it(saved: Path) -> None:
    numpy_reader = pytest.importorskip("safetensors.numpy")
    found = numpy_reader.load_file(saved)
    assert all(np.array_equal(found[name], array) for name, array in snapshot().arrays.items())


def test_layouts_are_each_others_inverse() -> None:
    arrays = snapshot().arrays
    there = to_layout(arrays, SPEC, "NP")
    assert there["ssm_state_0"].shape == (2, 4, 8, 8)
    assert all(np.array_equal(array, arrays[name]) for name, array in to_layout(there, SPEC, "NP").items())


def test_every_truncation_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for length in [0, 1, 7, 8, 9, 50, *range(100, len(content), 997), len(content) - 1]:
        saved.write_bytes(content[:length])
        with pytest.raises(UsageError, match=r"truncated|not a state file"):
            load_state(saved, SPEC, SHA)


def test_every_flipped_byte_is_refused_or_harmless(saved: Path) -> None:
    """Nothing but a MambaExportError, and never other numbers or tokens than those that were saved."""
    content = saved.read_bytes()
    refused = 0
    for at in range(0, len(content), 31):
        saved.write_bytes(content[:at] + bytes([content[at] ^ 0x15]) + content[at + 1 :])
        try:
            found = load_state(saved, SPEC, SHA)
        except UsageError:
            refused += 1
            continue
        assert found.tokens == snapshot().tokens
        assert all(np.array_equal(found.arrays[name], array) for name, array in snapshot().arrays.items())
    assert refused > 50


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(100), b"\x93NUMPY", bytes(range(192, 256)), b"{}" * 40])
def test_foreign_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="not a state file"):
        load_state(path, SPEC, SHA)


def test_other_models(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="other weights"):
        load_state(saved, SPEC, "cd" * 32)
    with pytest.raises(UsageError, match="another shape"):
        load_state(saved, dataclasses.replace(SPEC, n_layer=3), SHA)
    with pytest.raises(UsageError, match="cannot read"):
        load_state(tmp_path / "missing", SPEC, SHA)
    with pytest.raises(UsageError, match="cannot write"):
        save_state(tmp_path / "no" / "folder", snapshot(), SPEC, SHA)


_WRITER = """
import sys
from tests.runtime.test_state_file import SHA, SPEC, snapshot
from mamba_export.runtime.state_file import save_state
print("ready", flush=True)
seed = 0
while True:
    seed += 1
    save_state(sys.argv[1], snapshot(seed % 2), SPEC, SHA)
"""


def test_a_kill_leaves_the_old_file_or_the_new_one(saved: Path, root: Path) -> None:
    wanted: list[dict[str, Any]] = [snapshot(0).arrays, snapshot(1).arrays]
    for delay in (0.0, 0.003, 0.011, 0.02):
        command = [sys.executable, "-c", _WRITER, str(saved)]
        with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        found = load_state(saved, SPEC, SHA).arrays
        assert any(all(np.array_equal(found[name], array) for name, array in arrays.items()) for arrays in wanted)
