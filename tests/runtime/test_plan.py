"""Planned memory against measured memory, and planned speed against arithmetic done by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mamba_export import Bundle
from mamba_export.devices import DEVICES, Device, get_device
from mamba_export.errors import UsageError
from mamba_export.plan import plan_memory, state_bytes, weight_bytes
from mamba_export.spec import ModelSpec

HOST = Device("host", "host", 64e9, 20e9, 0.0, gpu=False)

_MEASURE = """
import sys
import numpy as np
from mamba_export import Bundle, OrtRunner
from mamba_export.runtime.memory import peak_host
step_only, batch = sys.argv[2] == "1", int(sys.argv[3])
runner = OrtRunner(Bundle(sys.argv[1], check=False), threads=2, low_memory=step_only)
state = runner.initial_state(batch)
if not step_only:
    _, state = runner.prefill(np.ones((batch, 512), np.int64), state)
loop = runner.step_loop(state, batch)
for token in range(4):
    loop.step(np.full((batch, 1), token))
print(peak_host())
"""


def measured(bundle: Path, root: Path, step_only: bool, batch: int) -> int:
    command = [sys.executable, "-c", _MEASURE, str(bundle), str(int(step_only)), str(batch)]
    return int(subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED: the constants were measured on Linux")
@pytest.mark.parametrize(("step_only", "batch"), [(True, 1), (True, 8), (False, 1), (False, 4)])
def test_memory_is_within_five_percent(
    step_only: bool, batch: int, make_bundle: Callable[..., Path], root: Path
) -> None:
    path = make_bundle(logits="last")
    bundle = Bundle(path, check=False)
    weights = float(bundle.manifest.files["weights.bin"]["bytes"])
    plan = plan_memory(bundle.spec, HOST, batch=batch, step_only=step_only, weights=weights)
    found = measured(path, root, step_only, batch)
    assert plan.total == pytest.approx(found, rel=0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED: the constants were measured on Linux")
@pytest.mark.parametrize(("step_only", "batch"), [(True, 1), (True, 8), (False, 1)])
def test_memory_of_a_larger_model(
    step_only: bool, batch: int, make_bundle: Callable[..., Path], shared_checkpoint: Callable[[str], Path], root: Path
) -> None:
    path = make_bundle(ckpt=shared_checkpoint("mamba2-small"), logits="last")
    plan = plan_memory(Bundle(path, check=False).spec, HOST, step_only=step_only, batch=batch)
    assert plan.total == pytest.approx(measured(path, root, step_only, batch), rel=0.05)


def test_weights_and_states_are_those_of_the_bundle(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle, check=False)
    assert weight_bytes(bundle.spec, "fp32") == pytest.approx(bundle.manifest.files["weights.bin"]["bytes"], rel=0.01)
    assert state_bytes(bundle.spec, "fp32") == 6 * 384 * (3 + 16) * 4


def test_speed_of_mamba_130m() -> None:
    """The floors that a person computed for Orin Nano: bf16, int8, int4."""
    spec = ModelSpec(
        family="mamba1", d_model=768, n_layer=24, vocab_size=50280, padded_vocab_size=50280, d_inner=1536,
        d_state=16, dt_rank=48, d_ssm=1536,
    )  # fmt: skip
    found = [
        plan_memory(spec, get_device("orin-nano-8gb"), dtype=d).tokens_per_second for d in ("bf16", "int8", "int4")
    ]
    assert found == pytest.approx([257, 490, 913], rel=0.05)
    untied = ModelSpec.from_dict({**spec.to_dict(), "tie_embeddings": False})
    one = plan_memory(untied, get_device("thor"), dtype="bf16")
    assert one.tokens_per_second == pytest.approx(
        plan_memory(spec, get_device("thor"), dtype="bf16").tokens_per_second, rel=0.01
    )
    assert one.weights > plan_memory(spec, get_device("thor"), dtype="bf16").weights


def test_what_fits() -> None:
    spec = ModelSpec(
        family="mamba1", d_model=2560, n_layer=64, vocab_size=50280, padded_vocab_size=50280, d_inner=5120,
        d_state=16, dt_rank=160, d_ssm=5120,
    )  # fmt: skip
    fits = {name: plan_memory(spec, device, dtype="bf16", step_only=True).fits for name, device in DEVICES.items()}
    assert not fits["orin-nano-4gb"]
    assert fits["agx-orin-32gb"]
    with pytest.raises(UsageError, match="no device"):
        get_device("toaster")
    with pytest.raises(UsageError, match="no dtype"):
        plan_memory(spec, HOST, dtype="fp7")


def test_command(cli: Callable[..., Any], tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    run = cli("plan", tiny_bundle, "--device", "raspberry-pi-5-8gb", "-b", "1,8", "--json")
    assert run.returncode == 0, run.stderr
    assert [plan["batch"] for plan in json.loads(run.stdout)["plans"]] == [1, 8]
    table = cli("plan", tiny_checkpoint, "--dtype", "int8")
    assert all(name in table.stdout for name in DEVICES)
    assert cli("plan", tiny_bundle, "--memory", "2").returncode == 2
