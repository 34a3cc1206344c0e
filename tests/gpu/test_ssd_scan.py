"""ssd_scan on the GPU against the recurrence in float64, for every tactic that covers the shape."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kernels.bench.repeat import Call, repeat, tactics_of  # noqa: E402
from kernels.ssd_scan import ssd_scan, ssd_scan_tactics  # noqa: E402

TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4.5e-3}


def tolerance(dtype: Any, tactic: int) -> float:
    """float32 on tensor cores has the 16 bits of mantissa of two bfloat16 values."""
    return 2e-5 if dtype == torch.float32 and tactic % 16 != 1 else TOLERANCE[dtype]


# batch, seqlen, nheads, headdim, ngroups, d_state
SHAPES = [
    (2, 200, 4, 64, 1, 128),
    (1, 333, 6, 64, 2, 128),
    (1, 1, 3, 64, 1, 128),
    (2, 65, 5, 64, 1, 64),
    (1, 90, 5, 64, 1, 16),
    (1, 90, 4, 64, 1, 256),
    (2, 97, 3, 32, 1, 16),
    (1, 100, 9, 32, 3, 128),
    (1, 130, 5, 80, 1, 64),
    (1, 257, 4, 128, 2, 128),
    (2, 300, 6, 128, 2, 128),
    (1, 300, 5, 128, 1, 64),
    (4, 130, 40, 128, 2, 128),  # streams, as heads of 64
    (2, 300, 6, 80, 2, 128),
    (1, 257, 5, 96, 1, 64),
    (4, 130, 40, 80, 2, 128),
    (2, 300, 6, 64, 2, 256),
    (1, 700, 3, 128, 1, 256),
    (1, 301, 70, 80, 1, 256),
    (2, 300, 6, 32, 2, 96),
    (1, 201, 4, 24, 4, 16),
    (1, 150, 4, 104, 2, 200),
    (2, 130, 40, 64, 1, 16),
    (1, 70, 3, 48, 1, 40),
    (1, 37, 2, 7, 1, 5),
    (9, 130, 64, 64, 2, 128),  # more rows of heads than blocks: streams
    (2, 900, 40, 64, 1, 128),  # several chunks of 128, both passes side by side
    (3, 520, 10, 64, 2, 64),
]


def make(shape: tuple[int, ...], dtype: Any, seed: int, dt_scale: float = 1.0) -> dict[str, Any]:
    """Fresh inputs; x, B and C are slices of one tensor, as in the model."""
    batch, seqlen, nheads, headdim, ngroups, d_state = shape
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int) -> Any:
        return torch.randn(*size, generator=generator, device="cuda")

    inner, state = nheads * headdim, ngroups * d_state
    mixed = normal(batch, seqlen, inner + 2 * state + 8).to(dtype)
    step = torch.exp(torch.rand(nheads, generator=generator, device="cuda") * 4.6 - 6.9) * dt_scale
    return {
        "x": mixed[..., :inner].unflatten(-1, (nheads, headdim)),
        "B": mixed[..., inner : inner + state].unflatten(-1, (ngroups, d_state)),
        "C": mixed[..., inner + state : inner + 2 * state].unflatten(-1, (ngroups, d_state)),
        "dt": normal(batch, seqlen, nheads + 3).to(dtype)[..., :nheads],
        "A": -(1 + 15 * torch.rand(nheads, generator=generator, device="cuda")),
        "D": normal(nheads),
        "dt_bias": step + torch.log(-torch.expm1(-step)),
        "dt_softplus": True,
        "initial_state": normal(batch, nheads, headdim, d_state),
    }


def reference(
    x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None, dt_bias: Any = None,
    dt_softplus: bool = False, dt_limit: tuple[float, float] = (0.0, float("inf")), initial_state: Any = None,
    seq_lens: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Token by token, in float64."""
    batch, seqlen, nheads, headdim = x.shape
    ngroups, d_state = B.shape[2:]
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    B, C = (t.repeat_interleave(nheads // ngroups, 2) for t in (B, C))
    dt = dt if dt_bias is None else dt + dt_bias.double()
    dt = torch.nn.functional.softplus(dt) if dt_softplus else dt
    dt = dt.clamp(*dt_limit)
    state = torch.zeros(batch, nheads, headdim, d_state, dtype=torch.float64, device=x.device)
    if initial_state is not None:
        state = initial_state.double()
    y = torch.zeros_like(x)
    for t in range(seqlen):
        keep = torch.exp(dt[:, t] * A)[..., None, None]
        new = keep * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        y[:, t] = (new * C[:, t, :, None]).sum(-1)
        valid = torch.ones(batch, dtype=torch.bool, device=x.device) if seq_lens is None else seq_lens > t
        state = torch.where(valid[:, None, None, None], new, state)
    if D is not None:
        y = y + x * (D.double()[:, None] if D.dim() == 1 else D.double())
    if z is not None:
        y = y * torch.nn.functional.silu(z.double())
    if seq_lens is not None:
        y[torch.arange(seqlen, device=x.device)[None] >= seq_lens[:, None]] = 0
    return y, state


def error(out: Any, expected: Any) -> float:
    value = float((out.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    return value if value == value else float("inf")  # NaN never passes


def run(inputs: dict[str, Any], tactic: int, **more: Any) -> tuple[Any, Any]:
    poisoned = torch.full(inputs["x"].shape, float("nan"), dtype=inputs["x"].dtype, device="cuda")
    return ssd_scan(**inputs, **more, return_final_state=True, out=poisoned, tactic=tactic)


def tactics(inputs: dict[str, Any]) -> list[int]:
    return [-1, *ssd_scan_tactics(*(inputs[name] for name in ("x", "dt", "A", "B", "C")))]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: tuple[int, ...], dtype: Any) -> None:
    inputs = make(shape, dtype, seed=shape[1])
    if shape[1] % 2:
        inputs["z"] = torch.randn(inputs["x"].shape, device="cuda").to(dtype)
        inputs["D"] = torch.randn(shape[2], shape[3], device="cuda")
    expected, final = reference(**inputs)
    for tactic in tactics(inputs):
        y, h = run(inputs, tactic)
        assert error(y, expected) < tolerance(dtype, tactic), tactic
        assert error(h, final) < tolerance(dtype, tactic), tactic


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_ragged_rows_ignore_poisoned_padding(dtype: Any) -> None:
    inputs = make((5, 150, 4, 64, 1, 128), dtype, seed=5)
    lens = torch.tensor([150, 1, 0, 64, 93], dtype=torch.int32, device="cuda")
    expected, final = reference(**inputs, seq_lens=lens)
    for row, length in enumerate(lens.tolist()):
        for name in ("x", "dt", "B", "C"):
            inputs[name][row, length:] = float("nan")
    for tactic in tactics(inputs):
        y, h = run(inputs, tactic, seq_lens=lens)
        assert error(y, expected) < tolerance(dtype, tactic), tactic
        assert error(h, final) < tolerance(dtype, tactic), tactic
        assert torch.equal(h[2], inputs["initial_state"][2])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_extreme_steps(dtype: Any) -> None:
    inputs = make((1, 140, 8, 64, 1, 128), dtype, seed=7)
    generator = torch.Generator("cuda").manual_seed(8)
    spread = torch.rand(inputs["dt"].shape, generator=generator, device="cuda")
    inputs.update(dt=(10 ** (spread * 9.7 - 8)).to(dtype), dt_bias=None, dt_softplus=False)
    inputs["A"] = -(10 ** torch.linspace(-4, 3, 8, device="cuda"))
    expected, final = reference(**inputs)
    for tactic in tactics(inputs):
        y, h = run(inputs, tactic)
        assert error(y, expected) < tolerance(dtype, tactic), tactic
        assert error(h, final) < tolerance(dtype, tactic), tactic
    limited = inputs | {"dt_limit": (1e-3, 0.5)}
    expected, final = reference(**limited)
    for tactic in tactics(inputs):
        y, h = run(limited, tactic)
        assert error(y, expected) < tolerance(dtype, tactic), tactic


@pytest.mark.parametrize("cut", [1, 63, 64, 130])
def test_any_split_continues(cut: int) -> None:
    inputs = make((2, 200, 5, 64, 1, 128), torch.float32, seed=cut)
    whole, final = run(inputs, -1)
    parts, state = [], inputs.pop("initial_state")
    for piece in (slice(0, cut), slice(cut, None)):
        now = inputs | {name: inputs[name][:, piece] for name in ("x", "dt", "B", "C")}
        y, state = run(now, -1, initial_state=state)
        parts.append(y)
    assert error(torch.cat(parts, 1), whole.double()) < 2e-5
    assert error(state, final.double()) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 300, 160, 80, 1, 128), (2, 300, 10, 64, 1, 128)], ids=str)
def test_state_in_place(shape: tuple[int, ...], dtype: Any) -> None:
    inputs = make(shape, dtype, seed=4)
    initial, (expected, final) = inputs["initial_state"], reference(**inputs)
    for tactic in tactics(inputs):
        call = Call("ssd_scan", {k: v for k, v in inputs.items() if k != "initial_state"}, None, tactic)
        call.poison()
        call.final.copy_(initial)
        call.params.initial_state = call.params.final_state
        call.run()
        assert error(call.y, expected) < tolerance(dtype, tactic), tactic
        assert error(call.final, final) < tolerance(dtype, tactic), tactic


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(9, 130, 64, 64, 1, 128), (2, 400, 40, 80, 1, 128), (2, 400, 24, 64, 1, 256)], ids=str
)
def test_deterministic(shape: tuple[int, ...], dtype: Any) -> None:
    inputs = make(shape, dtype, seed=3)
    for tactic in tactics(inputs):
        first = run(inputs, tactic)
        for _ in range(3):
            again = run(inputs, tactic)
            assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("shape", [(1, 80, 2048), (8, 80, 2048)], ids=str)  # batch, nheads, seqlen
def test_same_bits_every_time(shape: tuple[int, int, int]) -> None:
    """Stages are refilled while others are read, launches overlap: what goes wrong there does so in few runs."""
    for tactic in tactics_of("ssd_scan", shape):
        assert repeat("ssd_scan", shape, 304, tactic) == {"apart": [], "together": []}, tactic


def test_a_kernel_may_need_more_shared_memory_than_before() -> None:
    for d_state in (16, 64, 256):  # one kernel, more bytes each time
        inputs = make((1, 70, 2, 32, 1, d_state), torch.float32, seed=d_state)
        expected, _ = reference(**inputs)
        for tactic in tactics(inputs):
            assert error(run(inputs, tactic)[0], expected) < tolerance(torch.float32, tactic)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 2048, 24, 64, 1, 64), (1, 1100, 3, 64, 1, 128), (2, 1100, 3, 80, 1, 128), (1, 1100, 5, 64, 1, 256)],
    ids=str,
)
def test_slow_heads(shape: tuple[int, ...], dtype: Any) -> None:
    """Rows cut in pieces, each of which is still seen by the last."""
    inputs = make(shape, dtype, seed=12, dt_scale=0.02)
    expected, final = reference(**inputs)
    for tactic in tactics(inputs):
        y, h = run(inputs, tactic)
        assert error(y, expected) < tolerance(dtype, tactic), tactic
        assert error(h, final) < tolerance(dtype, tactic), tactic


def test_does_not_drift() -> None:
    """65,536 tokens with slow decay: the tensor-core form against the generic one in float32."""
    inputs = make((1, 65536, 3, 64, 1, 128), torch.bfloat16, seed=11, dt_scale=0.02)
    exact = {k: v.float() if torch.is_tensor(v) else v for k, v in inputs.items()}
    expected, final = run(exact, -1)
    y, h = run(inputs, -1)
    for begin in (0, 32768, 65536 - 512):
        piece = slice(begin, begin + 512)
        assert error(y[:, piece], expected[:, piece].double()) < TOLERANCE[torch.bfloat16]
    assert error(h, final.double()) < TOLERANCE[torch.bfloat16]
