"""decode_stack on the GPU, fused and as a chain, against the torch model in float64."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kernels.decode_stack import DecodeStack  # noqa: E402
from kernels.library import KernelError  # noqa: E402
from kernels.packed_weights import Format, round_to  # noqa: E402
from mamba_export.checkpoint import open_checkpoint  # noqa: E402
from mamba_export.models import build_model  # noqa: E402
from mamba_export.models.lm import parameter_dtype  # noqa: E402
from mamba_export.models.weights import load_model  # noqa: E402
from mamba_export.spec import ModelSpec  # noqa: E402
from mamba_export.states import state_table  # noqa: E402

DTYPES = {"fp32": 2e-5, "fp16": 2e-3, "bf16": 2e-2}
ROOT = Path(__file__).resolve().parents[2]
EXAMPLE, SHARED = ROOT / "examples" / "mamba1-tiny", ROOT.parent / "shared" / "checkpoints"


def mamba1(d_model: int, n_layer: int = 3, vocab: int = 300, **changes: Any) -> ModelSpec:
    d_inner = changes.pop("d_inner", 2 * d_model)
    fields = {"d_state": 16, "dt_rank": -(-d_model // 16), "padded_vocab_size": vocab, "d_ssm": d_inner} | changes
    return ModelSpec(family="mamba1", d_model=d_model, n_layer=n_layer, vocab_size=vocab - 3, d_inner=d_inner, **fields)


def mamba2(d_model: int, headdim: int, d_state: int, n_layer: int = 3, vocab: int = 300, **changes: Any) -> ModelSpec:
    d_inner = changes.pop("d_inner", 2 * d_model)
    fields = {"gated_norm_group_size": d_inner, "d_ssm": d_inner, "nheads": d_inner // headdim} | changes
    return ModelSpec(
        family="mamba2",
        d_model=d_model,
        n_layer=n_layer,
        vocab_size=vocab,
        padded_vocab_size=vocab,
        d_inner=d_inner,
        headdim=headdim,
        d_state=d_state,
        **fields,
    )


SPECS = {
    "192": mamba1(192),
    "768": mamba1(768, 2, 1000),
    "2560": mamba1(2560, 2, 503),
    "untied": mamba1(256, tie_embeddings=False),
    "narrow residual": mamba1(128, residual_in_fp32=False),
    "three taps": mamba1(320, d_conv=3, d_state=8),
    "wide state": mamba1(64, d_state=64, d_inner=192, dt_rank=10),
    "odd": mamba1(36, d_state=5, d_inner=52, dt_rank=3, d_conv=5),  # the chain alone
    "mamba2 384": mamba2(384, 64, 128),
    "mamba2 2560": mamba2(2560, 64, 128, 2),
    "mamba2 groups": mamba2(256, 32, 64, ngroups=4, tie_embeddings=False),
    "mamba2 odd": mamba2(36, 13, 20, d_inner=52, d_conv=5),  # the chain alone
}


def weights_of(spec: ModelSpec, dtype: str, seed: int) -> dict[str, Any]:
    """Random parameters of a model that neither dies out nor blows up, on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    weights = {}
    for name, parameter in build_model(spec, dtype, step=True).named_parameters():
        w = torch.randn(parameter.shape, generator=generator, device="cuda")
        if name.endswith(("norm.weight", "norm_f.weight")):
            w = 1 + 0.1 * w
        elif name.endswith(".A"):
            w = -torch.exp(0.5 * w)
        elif w.dim() == 2 and "conv1d" not in name:
            w = w / w.shape[1] ** 0.5
        weights[name] = w.to(parameter_dtype(name, dtype))
    return weights


def torch_model(spec: ModelSpec, weights: dict[str, Any], dtype: str) -> Any:
    model = build_model(spec, dtype, step=True)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        source = weights.get(name, weights["backbone.embedding.weight"])
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(source.to(parameter.dtype), requires_grad=False))
    return model


def run_torch(spec: ModelSpec, weights: dict[str, Any], dtype: str, ids: Any) -> list[Any]:
    """The logits [1, steps, vocab] and the states after the last step."""
    model, kind = torch_model(spec, weights, dtype), {"fp32": torch.float32, "fp16": torch.float16}
    kind |= {"bf16": torch.bfloat16, "fp64": torch.float64}
    wide = torch.promote_types(kind[dtype], torch.float32)
    table = state_table(spec, "fp32")
    states = [torch.zeros(1, *s.shape, dtype=kind[dtype] if s.kind == "conv" else wide, device="cuda") for s in table]
    logits = []
    for token in ids:
        out, *states = model(token[None], states)
        logits.append(out[:, 0])
    return [torch.stack(logits, 1), *states]


def error(out: Any, reference: Any) -> float:
    return float((out.double() - reference).norm() / reference.norm())


def tactics(stack: DecodeStack) -> list[str]:
    covered = stack.covers()
    assert "chain" in covered
    return covered


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECS)
def test_matches_float64(name: str, dtype: str) -> None:
    spec = SPECS[name]
    weights = weights_of(spec, dtype, seed=len(name))
    ids = torch.randint(spec.vocab_size, (6, 1), generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    exact, rounded = (run_torch(spec, weights, d, ids) for d in ("fp64", dtype))
    # Rounding grows as the model does: ours may err about as the torch model of that dtype does, or by the tolerance.
    allowed = [max(DTYPES[dtype], 3 * error(r, e)) for r, e in zip(rounded, exact, strict=True)]
    stack = DecodeStack(spec, weights)
    assert ("fused" in stack.covers()) == ("odd" not in name), stack.covers()
    for tactic in tactics(stack):
        stack.reset()
        logits = []
        for token in ids:
            out = torch.full((1, spec.vocab_size), float("nan"), device="cuda")
            logits.append(stack.step(token, out, tactic))
        states = [s for pair in zip(stack.conv_states, stack.ssm_states, strict=True) for s in pair]
        found = [error(o, e) for o, e in zip([torch.stack(logits, 1), *states], exact, strict=True)]
        assert all(f < a for f, a in zip(found, allowed, strict=True)), (tactic, found, allowed)


FORMATS = {
    "int8": Format(8, 0, False),
    "int8 128": Format(8, 128, False),
    "int4 32": Format(4, 32, False),
    "int4 128": Format(4, 128, False),
    "int4 32 zeros": Format(4, 32, True),
    "int4 128 zeros": Format(4, 128, True),
}


def quantized(weights: dict[str, Any], form: Format, wide: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights with integers where they can be, a tied embedding too; and what they stand for.

    Matrices whose names match ``wide`` are int8 whatever ``form`` is.
    """
    heads = {"lm_head.weight": weights.get("lm_head.weight", weights["backbone.embedding.weight"])}
    names = [n for n in (*weights, *heads) if n.endswith(("in_proj.weight", "out_proj.weight", "lm_head.weight"))]
    kinds = {name: FORMATS["int8"] if wide and re.search(wide, name) else form for name in names}
    matrices = {name: round_to((weights | heads)[name], kinds[name]) for name in names}
    floats = {name: m.dequantize() for name, m in matrices.items()}
    if "lm_head.weight" not in weights:
        table = "backbone.embedding.weight"
        matrices[table], floats[table] = matrices["lm_head.weight"], floats["lm_head.weight"].to(weights[table].dtype)
    return {**weights, **matrices}, weights | floats


def run_stack(stack: DecodeStack, ids: Any, tactic: Any) -> list[Any]:
    stack.reset()
    logits = []
    for token in ids:
        out = torch.full((1, stack.spec.vocab_size), float("nan"), device="cuda")
        logits.append(stack.step(token, out, tactic))
    states = [s.clone() for pair in zip(stack.conv_states, stack.ssm_states, strict=True) for s in pair]
    return [torch.stack(logits, 1), *states]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "name", ["768", "2560", "untied", "narrow residual", "mamba2 384", "mamba2 2560", "mamba2 groups"]
)
def test_integers_match_float64(name: str, form: str, dtype: str) -> None:
    check_integers(name, quantized(weights_of(SPECS[name], dtype, seed=len(name)), FORMATS[form]), dtype)


def check_integers(name: str, pair: tuple[dict[str, Any], dict[str, Any]], dtype: str) -> None:
    """Both kernels against the model of the weights that the integers stand for."""
    spec, (mixed, weights) = SPECS[name], pair
    ids = torch.randint(spec.vocab_size, (6, 1), generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    exact, rounded = (run_torch(spec, weights, d, ids) for d in ("fp64", dtype))
    allowed = [max(DTYPES[dtype], 3 * error(r, e)) for r, e in zip(rounded, exact, strict=True)]
    stack = DecodeStack(spec, mixed)
    assert stack.covers() == ["fused", "chain"]
    for tactic in stack.covers():
        found = [error(o, e) for o, e in zip(run_stack(stack, ids, tactic), exact, strict=True)]
        assert all(f < a for f, a in zip(found, allowed, strict=True)), (tactic, found, allowed)


WIDE = r"lm_head|layers\.0\.mixer\.in_proj|layers\.1\.mixer\.out_proj"


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("form", ["int4 32 zeros", "int4 128"])
@pytest.mark.parametrize("name", ["768", "2560", "untied", "mamba2 384", "mamba2 2560"])
def test_int8_among_int4_matches_float64(name: str, form: str, dtype: str) -> None:
    check_integers(name, quantized(weights_of(SPECS[name], dtype, seed=len(name)), FORMATS[form], WIDE), dtype)


@pytest.mark.parametrize("name", ["768", "2560", "mamba2 384"])
@pytest.mark.parametrize("form", ["int8", "int4 32 zeros"])
def test_integers_give_the_same_bits(name: str, form: str) -> None:
    spec = SPECS[name]
    stack = DecodeStack(spec, quantized(weights_of(spec, "bf16", seed=5), FORMATS[form])[0])
    first: Any = None
    for _ in range(20):
        stack.reset()
        ids = stack.generate([3, 1, 4], 24)
        result = [ids, stack.step(ids[-1:], tactic="fused"), *stack.conv_states, *stack.ssm_states]
        first = first or [r.clone() for r in result]
        assert all(torch.equal(a, b) for a, b in zip(result, first, strict=True))


def test_integers_that_there_are_not() -> None:
    spec = SPECS["192"]
    weights = weights_of(spec, "bf16", seed=1)
    mixed, _ = quantized(weights, FORMATS["int8"])
    with pytest.raises(KernelError):
        DecodeStack(spec, {**mixed, "lm_head.weight": weights["backbone.embedding.weight"]})
    with pytest.raises(KernelError):
        DecodeStack(spec, {**mixed, "backbone.layers.0.mixer.x_proj.weight": mixed["lm_head.weight"]})
    wide = {name: w.float() if hasattr(w, "data_ptr") else w for name, w in mixed.items()}
    assert DecodeStack(spec, wide).covers() == []  # float32 activations


def test_chain_takes_batches() -> None:
    spec = SPECS["192"]
    weights = weights_of(spec, "fp32", seed=3)
    together, alone = DecodeStack(spec, weights, batch=3), DecodeStack(spec, weights)
    ids = torch.randint(spec.vocab_size, (4, 3), device="cuda")
    rows = [together.step(step, tactic="chain") for step in ids]
    for row in range(3):
        alone.reset()
        for step, expected in zip(ids, rows, strict=True):
            assert torch.equal(alone.step(step[row : row + 1], tactic="chain")[0], expected[row])


@pytest.mark.parametrize("name", ["768", "mamba2 384"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_run_gives_the_same_bits(name: str, dtype: str) -> None:
    spec = SPECS[name]
    stack = DecodeStack(spec, weights_of(spec, dtype, seed=5))
    first: Any = None
    for _ in range(20):
        stack.reset()
        ids = stack.generate([3, 1, 4], 24)
        logits = stack.step(ids[-1:], tactic="fused")
        result = [ids, logits, *stack.conv_states, *stack.ssm_states]
        first = first or [r.clone() for r in result]
        assert all(torch.equal(a, b) for a, b in zip(result, first, strict=True))


def test_one_launch_equals_many_and_a_graph() -> None:
    spec = SPECS["192"]
    stack = DecodeStack(spec, weights_of(spec, "bf16", seed=6))
    at_once = stack.generate([5, 6, 7], 10).tolist()
    stack.reset()
    ids = torch.tensor([5], device="cuda")
    logits = torch.empty(1, spec.vocab_size, device="cuda")
    stack.step(ids, logits, "fused")
    stack.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stack.step(ids, logits, "fused")
    one_by_one, feed = [], [5, 6, 7]
    for i in range(12):
        ids.fill_(feed[i] if i < 3 else one_by_one[-1])
        graph.replay()
        if i >= 2:
            one_by_one.append(int(logits.argmax()))
    assert one_by_one == at_once


def checkpoints() -> list[Path]:
    return [p for p in (EXAMPLE, *sorted(SHARED.glob("*"))) if (p / "golden_greedy.json").is_file()]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("folder", checkpoints(), ids=lambda p: p.name)
def test_greedy_text_of_trained_checkpoints(folder: Path, dtype: str) -> None:
    with open_checkpoint(folder) as checkpoint:
        spec = checkpoint.spec
        model = load_model(checkpoint, dtype, step=True)
    stack = DecodeStack(spec, {name: p.data.cuda() for name, p in model.named_parameters()})
    for case in json.loads((folder / "golden_greedy.json").read_text(encoding="utf-8")):
        stack.reset()
        assert stack.generate(case["prompt_ids"], len(case["greedy_ids"])).tolist() == case["greedy_ids"]
