"""The whole-stack decode kernel on the CPU, device and host code as it stands, a fiber for every thread of every block.

Only what is PTX is replaced (``fibers/``). Threads run in random orders, copies land at random times and shared memory
begins as NaN: a missing wait, a wrong index or a deadlock shows. Speed and memory order need a GPU.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import decode_stack
from kernels.decode_stack import DecodeStack
from kernels.packed_weights import Format, round_to
from mamba_export.models import build_model
from mamba_export.models.lm import parameter_dtype
from mamba_export.spec import ModelSpec
from mamba_export.states import state_table

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels" / "cuda"
TOLERANCE = {"fp32": 2e-5, "fp16": 5e-3, "bf16": 4e-2}
KINDS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="NOT TESTED: the decode kernel on the CPU, g++ is missing"),
]


def replace_assembly(text: str, replacements: dict[str, str]) -> str:
    """Every ``asm`` statement becomes the replacement whose key it contains."""
    out, at = [], 0
    for found in re.finditer(r"\basm(?: volatile)?\(", text):
        if found.start() < at:
            continue
        depth, quoted, end = 1, False, found.end()
        while depth:
            char = text[end]
            quoted ^= char == '"'
            depth += 0 if quoted else {"(": 1, ")": -1}.get(char, 0)
            end += 1
        statement = text[found.start() : end]
        (key,) = [k for k in replacements if k in statement]
        out += [text[at : found.start()], replacements[key]]
        at = end
    return "".join(out) + text[at:]


ASSEMBLY = {
    "createpolicy": "policy = 0",
    "cp.async.bulk": "emulation::bulk(to, piece.source, piece.bytes, full)",
    "cp.async.mbarrier.arrive": "std::abort()",
    "red.relaxed": "*to += amount",
    "st.relaxed": "*to = make_word(data, epoch)",
    "ld.relaxed": "emulation::yield(); v = *reinterpret_cast<const ulonglong2*>(from)",
    "bar.sync 1": "emulation::block_barrier(1, kThreads)",
    "// keep": "",
    "{%0,%1,%2,%3};": "emulated_mma<T>(c, {a0, a1, a2, a3, b0, b1})",
    "{%10,%10,%10,%10};": "c[0] = c[1] = c[2] = c[3] = 0.0f; emulated_mma<T>(c, {a0, a1, a2, a3, b0, b1})",
    "lop3.b32": "out = (v & mask) ^ magic",
}


def copy_shared_headers(folder: Path) -> None:
    """The headers that every emulated kernel takes, and common.cuh without PTX."""
    shutil.copytree(SOURCES / "include", folder / "include")
    for header in (*HERE.glob("emulation/cuda_*16.h"), *HERE.glob("fibers/*")):
        shutil.copy(header, folder)
    common = (SOURCES / "common.cuh").read_text()
    common = common[: common.index("// ---- asynchronous copies")] + "}  // namespace mamba\n"
    common = re.sub(r'asm\("ex2.*\n', "y = std::exp2(x);\n", common)
    common = re.sub(r'asm\("rcp.*\n', "y = 1.0f / x;\n", common)
    (folder / "common.cuh").write_text(common + '#include "asynchronous.cuh"\n')


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("decode")
    copy_shared_headers(folder)
    for header in SOURCES.glob("decode_*.cuh"):
        if header.name.startswith("decode_chain_"):  # the kernels of the chain: not emulated
            continue
        text = replace_assembly(header.read_text(), ASSEMBLY)
        text = text.replace("extern __shared__ __align__(128) unsigned char smem[];",
                            "unsigned char* smem = emulation::current->block->base;")  # fmt: skip
        (folder / header.name).write_text(text)
    text = (folder / "decode_launch.cuh").read_text()
    launch = re.search(r"  void\* arguments\[\].*?MAMBA_ERROR_CUDA;\n", text, re.DOTALL)
    assert launch is not None
    text = text.replace(
        launch[0],
        "  const bool whole = emulation::run(plan.blocks, kThreads + 32, plan.shared_bytes, emulated_seed,"
        " [&] { kernel(p, layers, plan); });\n  return whole ? MAMBA_OK : MAMBA_ERROR_CUDA;\n",
    )
    text = text.replace("namespace mamba::decode {", "static unsigned emulated_seed = 0;\nnamespace mamba::decode {", 1)
    (folder / "decode_launch.cuh").write_text(text)
    text = (SOURCES / "decode_stack.cu").read_text()
    text = text.replace('#include "decode_chain.cuh"', '#include <algorithm>\n#include "decode_chain.cuh"')
    text += "".join((SOURCES / f"decode_{kind}.cu").read_text() for kind in ("packed", "mixed"))
    text += """
static int emulated_blocks = 1;
static size_t emulated_shared = 0;
extern "C" void emulate(int blocks, size_t shared, unsigned seed) {
  emulated_blocks = blocks, emulated_shared = shared, emulated_seed = seed;
}
int mamba::sm_count() { return emulated_blocks; }
size_t mamba::max_shared_bytes() { return emulated_shared; }
namespace mamba::decode {
size_t chain_workspace(const Params&) { return 16; }
template <typename T> int launch_chain(const Params&, cudaStream_t) { return MAMBA_ERROR_TACTIC; }
template int launch_chain<float>(const Params&, cudaStream_t);
template int launch_chain<__half>(const Params&, cudaStream_t);
template int launch_chain<__nv_bfloat16>(const Params&, cudaStream_t);
}
"""
    (folder / "decode_stack.cpp").write_text(text)
    output = folder / "libdecode.so"
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing"]
    command += ["-w", "-I", str(folder), "-I", str(folder / "include"), str(folder / "decode_stack.cpp")]
    done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:6000]
    library = ctypes.CDLL(str(output))
    library.mamba_decode_stack_workspace.restype = ctypes.c_size_t
    library.emulate.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_uint]
    return library


def mamba1(d_model: int, **changes: Any) -> ModelSpec:
    d_inner = changes.pop("d_inner", 2 * d_model)
    fields = {"d_state": 16, "dt_rank": -(-d_model // 16), "n_layer": 2} | changes
    return ModelSpec(
        family="mamba1", d_model=d_model, d_inner=d_inner, d_ssm=d_inner, vocab_size=61, padded_vocab_size=64, **fields
    )


def mamba2(d_model: int, **changes: Any) -> ModelSpec:
    d_inner = changes.pop("d_inner", 2 * d_model)
    fields = {"d_state": 16, "headdim": 32, "nheads": d_inner // 32, "n_layer": 2} | changes
    return ModelSpec(
        family="mamba2", d_model=d_model, d_inner=d_inner, d_ssm=d_inner, vocab_size=61, padded_vocab_size=64,
        gated_norm_group_size=d_inner, **fields,
    )  # fmt: skip


def quantized(
    weights: dict[str, torch.Tensor], form: Format, wide: str = ""
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The weights with integers where they can be, a tied embedding too; and what they stand for.

    Matrices whose names match ``wide`` are int8 whatever ``form`` is, with a scale a row.
    """
    heads = {"lm_head.weight": weights.get("lm_head.weight", weights["backbone.embedding.weight"])}
    names = [n for n in (*weights, *heads) if n.endswith(("in_proj.weight", "out_proj.weight", "lm_head.weight"))]
    matrices = {
        name: round_to((weights | heads)[name], INT8 if wide and re.search(wide, name) else form) for name in names
    }
    floats = {name: m.dequantize() for name, m in matrices.items()}
    if "lm_head.weight" not in weights:
        table = "backbone.embedding.weight"
        matrices[table], floats[table] = matrices["lm_head.weight"], floats["lm_head.weight"].to(weights[table].dtype)
    return {**weights, **matrices}, weights | floats


INT8, INT8_128 = Format(8, 0, False), Format(8, 128, False)
INT4_32, INT4_64, INT4_128 = (Format(4, group, False) for group in (32, 64, 128))
INT4_32_ZEROS, INT4_128_ZEROS = Format(4, 32, True), Format(4, 128, True)
# model, dtype, blocks, kB of shared memory, how integers are stored, and which matrices of int4 models are int8
INTEGER_CASES: dict[str, tuple[Any, ...]] = {
    "mamba1 mixed": (mamba1(128), "bf16", 3, 160, INT4_64, r"0\.mixer\.in_proj|1\.mixer\.out_proj|lm_head"),
    "mamba1 mixed held": (
        mamba1(128, d_inner=128), "fp16", 8, 160, INT4_32_ZEROS, r"0\.mixer\.out_proj|1\.mixer\.in_proj",
    ),
    "mamba2 mixed pieces": (
        mamba2(128, n_layer=1, d_inner=4096, nheads=64, headdim=64, d_state=8), "bf16", 3, 227, INT4_128, "out_proj",
    ),
    "mamba1 int8": (mamba1(64), "bf16", 3, 96, INT8),
    "mamba1 int8 held": (mamba1(64, d_inner=64), "fp16", 4, 96, Format(8, 32, False)),
    "mamba2 int8 pieces": (
        mamba2(64, n_layer=1, d_inner=4096, nheads=64, headdim=64, d_state=8), "bf16", 3, 227, INT8_128,
    ),
    "mamba1 int4": (mamba1(128, n_layer=1), "fp16", 3, 160, INT4_32_ZEROS),
    "mamba1 int4 held": (mamba1(128, n_layer=1, d_inner=128), "bf16", 8, 160, INT4_64),
    "mamba1 int4 held zeros": (mamba1(128, n_layer=1, d_inner=128), "fp16", 8, 160, INT4_32_ZEROS),
    "mamba2 int4": (mamba2(128, n_layer=1, ngroups=2, tie_embeddings=False), "bf16", 6, 160, INT4_32),
    "mamba2 int4 pieces": (
        mamba2(128, n_layer=1, d_inner=4096, nheads=64, headdim=64, d_state=8), "bf16", 3, 227, INT4_128_ZEROS,
    ),
}  # fmt: skip
# model, dtype, blocks, kB of shared memory
CASES: dict[str, tuple[Any, ...]] = INTEGER_CASES | {
    "mamba1 bf16": (mamba1(64), "bf16", 3, 96),
    "mamba1 fp16": (mamba1(64, n_layer=1, d_inner=192, d_state=64, residual_in_fp32=False, dt_rank=10), "fp16", 3, 128),
    "mamba1 fp32": (mamba1(72, n_layer=1, d_conv=3, dt_rank=6, tie_embeddings=False), "fp32", 2, 64),
    "mamba1 bf16 held": (mamba1(64, d_inner=64), "bf16", 4, 96),  # a warp's weights in registers
    "mamba1 bf16 wide": (mamba1(128, n_layer=1, d_state=64, dt_rank=16), "bf16", 4, 160),  # dt, B, C by the whole block
    "mamba2 bf16": (mamba2(64, n_layer=1, ngroups=2), "bf16", 3, 96),
    "mamba2 fp16 held": (mamba2(64, ngroups=1, d_inner=64), "fp16", 6, 96),
}


def weights_of(spec: ModelSpec, dtype: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(spec.d_model)
    weights = {}
    for name, parameter in build_model(spec, dtype, step=True).named_parameters():
        w = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("norm.weight", "norm_f.weight")):
            w = 1 + 0.1 * w
        elif name.endswith(".A"):
            w = -torch.exp(0.5 * w)
        elif w.dim() == 2 and "conv1d" not in name:
            w = w / w.shape[1] ** 0.5
        weights[name] = w.to(parameter_dtype(name, dtype))
    return weights


def run_torch(spec: ModelSpec, weights: dict[str, torch.Tensor], ids: list[int]) -> list[torch.Tensor]:
    """Logits [steps, vocab] and the states at the end, in float64."""
    model = build_model(spec, "fp64", step=True)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        source = weights.get(name, weights["backbone.embedding.weight"]).to(parameter.dtype)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(source, requires_grad=False))
    states = [torch.zeros(1, *s.shape, dtype=torch.float64) for s in state_table(spec, "fp32")]
    logits = []
    for token in ids:
        out, *states = model(torch.tensor([[token]]), states)
        logits.append(out[0, 0])
    return [torch.stack(logits), *states]


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("case", CASES)
def test_matches_float64_in_any_order(case: str, built: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, dtype, blocks, shared, *form = CASES[case]
    seed = 0

    def launch(op: str, params: ctypes.Structure, like: Any) -> None:
        built.emulate(blocks, shared << 10, seed)
        size = built.mamba_decode_stack_workspace(ctypes.byref(params))
        workspace = torch.empty(size, dtype=torch.uint8)
        params.workspace, params.workspace_size = workspace.data_ptr(), size
        assert built.mamba_decode_stack(ctypes.byref(params), None) == 0

    monkeypatch.setattr(decode_stack, "launch", launch)
    weights = weights_of(spec, dtype)
    mixed: Any = weights
    if form:
        mixed, weights = quantized(weights, *form)
    stack = DecodeStack(spec, mixed)
    prompt = [5, 7]
    expected = run_torch(spec, weights, prompt)
    results: list[list[torch.Tensor]] = []
    for seed in range(2):  # noqa: B007 (the launch reads it)
        stack.reset()
        logits = [stack.step(torch.tensor([token]), tactic="fused")[0] for token in prompt]
        states = [s.clone() for pair in zip(stack.conv_states, stack.ssm_states, strict=True) for s in pair]
        stack.reset()
        ids = stack.generate(prompt, 2)  # in one launch
        results.append([torch.stack(logits), *states, ids, *(s.clone() for s in stack.ssm_states)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "the order of the threads matters"
    for ours, exact in zip(results[0], expected, strict=False):
        assert error(ours, exact) < TOLERANCE[dtype]
    first, second = results[0][1 + 2 * spec.n_layer].tolist()
    assert first == int(logits[-1].argmax())
    stack.reset()
    for token in (*prompt, first):
        last = stack.step(torch.tensor([token]), tactic="fused")[0]
    assert second == int(last.argmax())
