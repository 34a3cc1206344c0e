"""selective_scan on the GPU against its definition in float64, tactic by tactic."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

from kernels.bench.repeat import repeat, tactics_of  # noqa: E402
from kernels.library import KernelError  # noqa: E402
from kernels.selective_scan import (  # noqa: E402
    chain_tactic,
    channel_tactic,
    selective_scan,
    selective_scan_tactics,
)

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def reference(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    delta_bias: Any,
    state: Any,
    z: Any,
    seq_lens: Any,
    reverse: bool,
) -> tuple[Any, Any]:
    """The recurrence, token by token, in float64; rows shorter than the sequence stop early."""
    batch, seqlen, dim = u.shape
    u, delta, B, C = (x.double() for x in (u, delta, B, C))
    repeat = dim // B.shape[2]
    lens = torch.full((batch,), seqlen, device=u.device) if seq_lens is None else seq_lens
    dt = F.softplus(delta + delta_bias.double(), threshold=1000.0)
    h, y, rows = state.double().clone(), torch.zeros_like(u), torch.arange(batch, device=u.device)
    for step in range(seqlen):
        inside = step < lens
        t = (lens - 1 - step if reverse else torch.full_like(lens, step)).clamp(0, seqlen - 1).long()
        b, c = (x[rows, t].repeat_interleave(repeat, 1) for x in (B, C))
        d, x = dt[rows, t], u[rows, t]
        h = torch.where(inside[:, None, None], torch.exp(d[:, :, None] * A.double()) * h + (d * x)[:, :, None] * b, h)
        out = (h * c).sum(-1) + D.double() * x
        out = out * F.silu(z.double()[rows, t]) if z is not None else out
        y[rows[inside], t[inside]] = out[inside]
    return y, h


def make(shape: tuple[int, ...], dtype: Any, seed: int, scale: float = 16.0, shift: float = -3.0) -> dict[str, Any]:
    batch, seqlen, dim, d_state, groups = shape
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*size: int) -> Any:
        return torch.randn(*size, device="cuda", generator=generator)

    return {
        "u": randn(batch, seqlen, dim).to(dtype),
        "delta": (0.5 * randn(batch, seqlen, dim) + shift).to(dtype),
        "A": -torch.rand(dim, d_state, device="cuda", generator=generator) * scale - 1e-4,
        "B": randn(batch, seqlen, groups, d_state).to(dtype),
        "C": randn(batch, seqlen, groups, d_state).to(dtype),
        "D": randn(dim),
        "delta_bias": 0.3 * randn(dim),
        "state": randn(batch, dim, d_state),
        "z": randn(batch, seqlen, dim).to(dtype),
    }


def run(inputs: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """The kernel into poisoned outputs."""
    y = torch.full(inputs["u"].shape, float("nan"), dtype=inputs["u"].dtype, device="cuda")
    final = torch.full_like(inputs["state"], float("nan"))
    selective_scan(**inputs, **options, out=y, final_state=final)
    torch.cuda.synchronize()
    return y, final


def error(out: Any, expected: Any) -> float:
    return float((out.double() - expected).norm() / expected.norm().clamp(min=1e-30))


LINKED = 5  # struct Tactic in selective_scan.cuh


def some_tactics(inputs: dict[str, Any]) -> list[int]:
    """The selector's choice and a spread of the others, every kernel among them."""
    every = selective_scan_tactics(*(inputs[k] for k in ("u", "delta", "A", "B", "C", "z")))
    kernels: dict[tuple[int, ...], int] = {}
    for tactic in every:  # kernels of the chain differ by one group or more to a block, linked ones by warps a group
        kernel, groups, warps = tactic & 15, tactic >> 4 & 255, tactic >> 12 & 31
        kernels.setdefault((kernel, tactic >> 20 > 1, groups == 1, warps if kernel == LINKED else 0), tactic)
    # Listed only for shapes that fill the device, or for long rows; they serve any.
    pieces = (
        [channel_tactic(3, 1), channel_tactic(7, 2), channel_tactic(3), channel_tactic(9)]
        if inputs["A"].shape[1] == 16
        else []
    )
    return [-1, *kernels.values(), *every[:: max(1, len(every) // 4)], *pieces]


SHAPES = [
    *((2, 1, 64, 16, 1), (1, 129, 96, 16, 1), (2, 300, 72, 16, 1), (2, 67, 48, 16, 2), (1, 700, 136, 16, 1)),
    (2, 90, 36, 16, 1),  # rows of u start at multiples of 8 bytes only
    *((1, 100, 33, 16, 1), (2, 77, 48, 8, 1), (1, 70, 48, 20, 1), (1, 50, 36, 64, 2), (1, 50, 16, 256, 1)),
    *((2, 70, 64, 24, 1), (1, 90, 48, 32, 2), (2, 60, 24, 48, 1), (1, 100, 40, 128, 2), (1, 40, 28, 200, 1)),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: tuple[int, ...], dtype: Any) -> None:
    for mode in ("dense", "ragged", "reverse"):
        inputs = make(shape, dtype, seed=shape[1] + len(mode))
        lens = (
            None if mode == "dense" else torch.randint(1, shape[1] + 1, (shape[0],), device="cuda", dtype=torch.int32)
        )
        if mode == "reverse":
            inputs["z"] = None
        expected, final = reference(**inputs, seq_lens=lens, reverse=mode == "reverse")
        if lens is not None:  # padding must touch nothing
            padding = torch.arange(shape[1], device="cuda")[None, :] >= lens[:, None]
            for name in ("u", "delta", "B", "C"):
                inputs[name][padding] = float("nan")
        for tactic in some_tactics(inputs):
            y, h = run(inputs, seq_lens=lens, reverse=mode == "reverse", tactic=tactic)
            assert error(y, expected) < TOLERANCE[dtype], (mode, hex(tactic))
            assert error(h, final) < 1e-5, (mode, hex(tactic))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("block", [(2, 1, 5, 2), (2, 3, 5, 1), (4, 2, 7, 2), (4, 5, 3, 1), (4, 7, 2, 1)], ids=str)
@pytest.mark.parametrize(("seqlen", "groups", "gate"), [(113, 1, True), (192, 2, False), (320, 1, True)], ids=str)
def test_blocks_that_take_several_lots(
    block: tuple[int, ...], dtype: Any, seqlen: int, groups: int, gate: bool
) -> None:
    """More groups of channels than the device has places for."""
    inputs = make((9, seqlen, 1840, 16, groups), dtype, seqlen)
    inputs["z"] = inputs["z"] if gate else None
    y, final = run(inputs, tactic=chain_tactic(*block))
    expected, expected_final = reference(**inputs, seq_lens=None, reverse=False)
    assert error(y, expected) < TOLERANCE[dtype] and error(final, expected_final) < 1e-5
    again, final_again = run(inputs, tactic=chain_tactic(*block))
    assert torch.equal(again, y) and torch.equal(final_again, final)


def test_slices_of_wider_projections_need_no_copy() -> None:
    inputs = make((2, 90, 64, 16, 1), torch.bfloat16, seed=5)
    expected, final = reference(**inputs, seq_lens=None, reverse=False)
    xz = torch.cat([inputs["u"], inputs["z"]], -1)
    bc = torch.cat(
        [torch.zeros(2, 90, 8, device="cuda", dtype=torch.bfloat16), inputs["B"][:, :, 0], inputs["C"][:, :, 0]], -1
    )
    inputs |= {"u": xz[..., :64], "z": xz[..., 64:], "B": bc[..., 8:24].unsqueeze(2), "C": bc[..., 24:].unsqueeze(2)}
    for tactic in some_tactics(inputs):
        y, h = run(inputs, tactic=tactic)
        assert error(y, expected) < 4e-3, hex(tactic)
        assert error(h, final) < 1e-5, hex(tactic)


@pytest.mark.parametrize(("scale", "shift"), [(1e-4, -18.0), (1e3, 3.0), (1e3, 50.0), (1.0, 50.0), (16.0, -18.0)])
def test_extreme_steps_and_decays(scale: float, shift: float) -> None:
    inputs = make((1, 200, 64, 16, 1), torch.float32, seed=3, scale=scale, shift=shift)
    expected, final = reference(**inputs, seq_lens=None, reverse=False)
    for tactic in some_tactics(inputs):
        y, h = run(inputs, tactic=tactic)
        assert error(y, expected) < 5e-6, hex(tactic)
        assert error(h, final) < 1e-5, hex(tactic)


def test_long_sequences_do_not_drift() -> None:
    inputs = make((1, 65536, 32, 16, 1), torch.float32, seed=9, scale=1e-3, shift=-5.0)
    u, dt = inputs["u"].double(), F.softplus(inputs["delta"].double() + inputs["delta_bias"].double(), threshold=1000.0)
    # The final state in closed form: sum over t of exp(A (S_end - S_t)) dt u B.
    left = dt.flip(1).cumsum(1).flip(1)
    left = torch.cat([left, torch.zeros_like(left[:, :1])], 1)
    A = inputs["A"].double()
    final = torch.exp(A * left[0, 0, :, None]) * inputs["state"][0].double()
    for t0 in range(0, 65536, 4096):
        part = slice(t0, t0 + 4096)
        decay = torch.exp(A[None] * left[0, t0 + 1 : t0 + 4097, :, None])
        final += ((dt * u)[0, part, :, None] * decay * inputs["B"][0, part].double()).sum(0)
    for tactic in some_tactics(inputs):
        _, h = run(inputs, tactic=tactic)
        # Memory of 1e5 tokens: ex2.approx of these small arguments is 1e-8 too low on average, which adds up to 3.7e-4
        # (the recurrence in float64 with the instruction's decays; measured: ours 3.4e-4 to 3.7e-4, the peer 3.4e-4).
        assert error(h[0], final) < 1e-3, hex(tactic)


def test_a_split_sequence_continues() -> None:
    inputs = make((1, 333, 64, 16, 1), torch.bfloat16, seed=11)
    whole, final = run(inputs)
    state, parts = inputs["state"], []
    for part in (slice(0, 1), slice(1, 130), slice(130, 333)):
        piece = {k: v[:, part] if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()} | {
            "state": state
        }
        y, state = run(piece)
        parts.append(y)
    assert error(torch.cat(parts, 1), whole.double()) < 3e-3
    assert error(state, final.double()) < 1e-5


def test_bitwise_reproducible() -> None:
    inputs = make((2, 600, 128, 16, 1), torch.bfloat16, seed=2)
    for tactic in some_tactics(inputs):
        first = run(inputs, tactic=tactic)
        for _ in range(5):
            again = run(inputs, tactic=tactic)
            assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]), hex(tactic)


@pytest.mark.parametrize("shape", [(8, 5120, 2048), (1, 5120, 1024), (1, 1536, 65536), (8, 1536, 512)], ids=str)
def test_the_same_bits_every_time_at_full_size(shape: tuple[int, int, int]) -> None:
    """Hand-overs between warps and blocks: a race shows only where they overlap as they do in use."""
    for tactic in tactics_of("selective_scan", shape):
        assert repeat("selective_scan", shape, 104, tactic) == {"apart": [], "together": []}, hex(tactic)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scale", "shift"), [(16.0, -3.0), (3.0, -2.0), (200.0, 0.0)])
def test_pieces_of_a_long_row(dtype: Any, scale: float, shift: float) -> None:
    """States are left behind one by one, until a few of a block go on alone; the others last to the piece's start."""
    inputs = make((1, 20000, 200, 16, 1), dtype, seed=5, scale=scale, shift=shift)
    inputs["A"][:, 3] *= 1e-3
    whole, final = run(inputs, tactic=channel_tactic())
    for tactic in (channel_tactic(2), channel_tactic(3), channel_tactic(40)):
        y, h = run(
            inputs, tactic=tactic
        )  # the long memory is 2e-5 off in whole rows, see test_long_sequences_do_not_drift
        assert error(y, whole.double()) < (5e-5 if dtype == torch.float32 else 4e-4), hex(tactic)
        assert error(h, final.double()) < 1e-4, hex(tactic)
    for tactic in (channel_tactic(2, 1), channel_tactic(40, 2)):
        y, h = run(inputs, tactic=tactic)
        assert torch.equal(y, whole) and torch.equal(h, final), hex(tactic)


def test_pieces_without_softplus() -> None:
    """dt may be negative, so that a state that has decayed may come back: nothing may be left behind."""
    inputs = make((1, 400, 200, 16, 1), torch.float32, seed=7, scale=4.0)
    inputs["delta"] = 0.5 + 0.02 * inputs["u"]
    inputs["delta"][:, 250:] = -0.05 + 0.02 * inputs["u"][:, 250:]
    inputs["delta_bias"] *= 0.0
    whole, final = run(inputs, tactic=channel_tactic(), delta_softplus=False)
    for tactic in (channel_tactic(2), channel_tactic(5), channel_tactic(5, 1)):
        y, h = run(inputs, tactic=tactic, delta_softplus=False)
        assert error(y, whole.double()) < 1e-5 and error(h, final.double()) < 1e-5, hex(tactic)


def test_refuses_what_it_does_not_cover() -> None:
    inputs = make((1, 8, 16, 16, 1), torch.float32, seed=1)
    with pytest.raises(KernelError, match="tactic"):
        run(inputs, tactic=15)
    inputs["B"] = inputs["B"].bfloat16()
    with pytest.raises(KernelError, match="B must be"):
        run(inputs)
