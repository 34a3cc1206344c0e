"""Long inputs in chunks: the same logits as in one piece, and memory that does not grow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mamba_export import Bundle, OrtRunner
from mamba_export.runtime.prefill import prefill_chunks

_STREAM = """
import sys
import numpy as np
from mamba_export import Bundle, OrtRunner
from mamba_export.runtime.memory import peak_host
from mamba_export.runtime.prefill import prefill_chunks
runner = OrtRunner(Bundle(sys.argv[1], check=False), threads=2)
state = runner.initial_state(1)
for length in (2048, 30_720):
    _, state = prefill_chunks(runner, np.arange(length)[None] % runner.spec.vocab_size, state)
    print(peak_host())
"""


def test_chunks_give_the_logits_of_one_piece(tiny_bundle: Path) -> None:
    runner = OrtRunner(Bundle(tiny_bundle, check=False), threads=2)
    ids = np.random.default_rng(0).integers(0, runner.spec.vocab_size, (1, 8192))
    whole, whole_state = runner.prefill(ids, runner.initial_state(1))
    logits, state = prefill_chunks(runner, ids, runner.initial_state(1), chunk=500)
    assert np.linalg.norm(logits - whole[:, -1]) < 1e-5 * np.linalg.norm(whole[:, -1])
    one, other = runner.state_to_numpy(whole_state), runner.state_to_numpy(state)
    for name, array in one.items():
        assert np.linalg.norm(array - other[name]) < 1e-4 * np.linalg.norm(array), name


@pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED: peak memory is read from /proc")
def test_memory_does_not_grow_with_the_length(tiny_bundle: Path, root: Path) -> None:
    command = [sys.executable, "-c", _STREAM, str(tiny_bundle)]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    short, long = map(int, output.split())
    assert long - short < 5e6
