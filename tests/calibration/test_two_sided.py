"""What errors of a layer do to the predictions, rounding that knows it, zero points, and int8 where it counts."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mamba_export.calibration import load_statistics
from mamba_export.calibration.gptq import gptq
from mamba_export.calibration.promotion import Candidate, promote
from mamba_export.calibration.quantizer import quantize_model
from mamba_export.calibration.recipes import Promote, Weights
from mamba_export.calibration.rounding import round_to_nearest
from mamba_export.calibration.sensitivity import measure_sensitivity

from mamba_export.checkpoint import open_checkpoint
from mamba_export.models.lm import MambaLM
from mamba_export.models.weights import load_model
from mamba_export.quantized import Kind, Linear, Matrix, QuantizedModel
from mamba_export.states import state_table

INT4 = Weights("int4", 32, "yaqa", "mse")


def _correlated(size: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * size, size, generator=g) @ torch.randn(size, size, generator=g)
    return x.T @ x / size


def _cost(off: torch.Tensor, g: torch.Tensor, h: torch.Tensor) -> float:
    return float(((g @ off @ h) * off).sum())


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (1, 32), (40, 33)])
def test_rows_make_up_for_each_other(shape: tuple[int, int], zeros: bool) -> None:
    g, h = _correlated(shape[0], 1), _correlated(shape[1], 2)
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    scheme = Weights("int4", 32, "yaqa", "mse", zeros)
    one, two = gptq(w, h, scheme), gptq(w, h, scheme, outputs=[g])
    costs = [_cost(w - m.dequantize(), g, h) for m in (one, two)]
    assert costs[1] <= costs[0] * (1.02 if shape[0] == 1 else 0.8)
    for matrix in (one, two):
        stored = matrix.values.int()
        if matrix.zeros is not None:
            stored = stored + matrix.zeros.repeat_interleave(matrix.group, 1)[:, : shape[1]]
        assert int(stored.min()) >= -8 and int(stored.max()) <= 7


def test_blocks_of_rows_are_rounded_apart() -> None:
    g, h = _correlated(32, 1), _correlated(64, 2)
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    both = gptq(w, h, INT4, outputs=[g, 2 * g])
    for rows, block in ((slice(0, 32), g), (slice(32, 64), 2 * g)):
        alone = gptq(w[rows], h, INT4, outputs=[block])
        assert torch.equal(both.values[rows], alone.values) and torch.equal(both.scales[rows], alone.scales)


def test_zero_points_suit_values_on_one_side() -> None:
    w = torch.rand(8, 64, generator=torch.Generator().manual_seed(0)) + 0.2
    plain, shifted = (round_to_nearest(w, Weights("int4", 32, "rtn", "mse", zeros)) for zeros in (False, True))
    assert plain.zeros is None and shifted.zeros is not None
    errors = [float((m.dequantize() - w).square().mean()) for m in (plain, shifted)]
    assert errors[1] < 0.4 * errors[0]
    assert round_to_nearest(w, Weights("int8", 0, "rtn", "mse", True)).zeros is None


def _log_probabilities(model: MambaLM, ids: torch.Tensor) -> torch.Tensor:
    states = [torch.zeros(ids.shape[0], *s.shape) for s in state_table(model.spec, "fp32")]
    with torch.no_grad():
        return F.log_softmax(model(ids, states)[0], -1)


@pytest.mark.parametrize("kind", ["in_proj", "x_proj", "out_proj"])
def test_the_sensitivity_foretells_the_divergence(tiny_checkpoint: Path, token_file: Path, kind: str) -> None:
    """Rounding errors of one layer: predicted and measured KL agree within the noise of 1,024 tokens."""
    ids = torch.from_numpy(np.fromfile(token_file, "<u2").astype(np.int64))[:1024].view(8, 128)
    path = f"backbone.layers.3.mixer.{kind}"
    with open_checkpoint(tiny_checkpoint) as checkpoint:
        model = load_model(checkpoint, "fp32", "fp32")
    side = measure_sensitivity(model, ids)[path]
    layer = model.get_submodule(path)
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    wanted = _log_probabilities(model, ids)
    handle.remove()
    x = seen[0]
    hessian = (x * side.tokens.flatten()[:, None]).T @ x
    error = round_to_nearest(layer.weight.detach(), Weights("int4", 64, "rtn", "max")).dequantize() - layer.weight
    predicted = side.divergence(error.detach(), hessian)
    layer.weight.data += error.detach()
    found = _log_probabilities(model, ids)
    measured = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert 0.5 < predicted / measured < 2.0, (predicted, measured)


def test_the_float_model_is_left_alone(tiny_checkpoint: Path) -> None:
    with open_checkpoint(tiny_checkpoint) as checkpoint:
        model = load_model(checkpoint, "fp32", "fp32")
    before = copy.deepcopy(model.state_dict())
    found = measure_sensitivity(model, torch.arange(64)[None])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert {name.split(".")[-1] for name in found} == {"in_proj", "x_proj", "out_proj"}
    assert all(not layer._forward_pre_hooks and not layer._backward_hooks for layer in model.modules())


def test_bits_go_where_they_gain_most() -> None:
    def matrix(kind: Kind) -> Matrix:
        groups = 2 if kind == "int4" else 1
        return Matrix(kind, torch.zeros(64, 64, dtype=torch.int8), torch.ones(64, groups), 64 // groups)

    names = [f"backbone.layers.{i}.mixer.out_proj.weight" for i in range(4)]
    gains = dict(zip(names, (0.1, 0.4, -0.2, 0.3), strict=True))
    for bits, wanted in (
        (4.5, []),
        (5.5, [names[1]]),
        (6.4, [names[1], names[3]]),
        (8.2, [names[1], names[3], names[0]]),
    ):
        model = QuantizedModel({name: Linear(matrix("int4")) for name in names})
        candidates = {name: Candidate(matrix("int8"), gain) for name, gain in gains.items()}
        assert promote(model, candidates, Promote(bits)) == wanted
        assert [n for n in names if model.linears[n].weight.kind == "int8"] == sorted(wanted)


def test_recipes_stay_within_their_bits(tiny_checkpoint: Path, statistics_file: Path) -> None:
    with open_checkpoint(tiny_checkpoint) as checkpoint:
        model = quantize_model(checkpoint, "w4a16-g32", load_statistics(statistics_file), blocks=True)
    assert model.promoted
    for name in model.promoted:
        assert model.linears[name].weight.kind == "int8"
    assert any(linear.weight.zeros is not None for linear in model.linears.values())
