"""Fused steps by a recipe: packed rows in the node, and the integers, scales and text that the unfused bundle has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mamba_export.calibration.recipes import load_recipe
from mamba_export.kernels.packed_weights import Format, row_bytes, unpack, within

from mamba_export import Bundle, quantize
from mamba_export.errors import UsageError
from mamba_export.fused_step import OP_TYPE, PACKABLE, parameter_names
from mamba_export.graph.lower import for_stock_runtime
from mamba_export.ops.decode_stack import decode_stack_reference
from mamba_export.quantized import HEAD
from mamba_export.runtime import OrtRunner
from tests.cli.refusal import check_message
from tests.conftest import Cli
from tests.make_checkpoints import make_statespaces
from tests.models.traced import traced_once

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "mamba1": {"d_model": 256, "vocab_size": 51},
    "mamba2": {
        "d_model": 256,
        "tie_embeddings": False,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 32, "ngroups": 1},
    },
}
RECIPES = {
    "w8a16": "extends: w8a16\n",
    "groups": "weights: {type: int8, group: 64}\nhead: {type: int8, group: 64}\n",
    "w4": "weights: {type: int4, group: 32, scales: mse}\nhead: {type: int4, group: 32}\nembedding: {type: int8}\n"
    "layers:\n  '*.dt_proj': {weights: {type: int8}}\n",
    "mixed": "weights: {type: int4, group: 64}\nhead: {type: int8}\n"
    "layers:\n  '*.1.mixer.in_proj': {weights: {type: int8, group: channel}}\n"
    "  '*.0.mixer.out_proj': {weights: {type: int8, group: 128}}\n",
    "w4 rows": "weights: {type: int4}\nhead: {type: int4}\n",
}
FORMS = {
    "w8a16": Format(8, 0, False),
    "groups": Format(8, 64, False),
    "w4": Format(4, 32, False),
    "mixed": Format(4, 64, False),
    "w4 rows": Format(4, 0, False),
}
CASES = [(model, recipe, dtype) for model in CHECKPOINTS for recipe, dtype in zip(RECIPES, ("fp16", "bf16") * 3)]  # noqa: B905
by_case = pytest.mark.parametrize(("model", "recipe", "dtype"), CASES)
TOLERANCE = {"fp16": 3e-3, "bf16": 2e-2}
BundleOf = Callable[[str, str, str, bool], Bundle]


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BundleOf]:
    """``bundle_of(model, recipe, dtype, fused)``; the fused ones are verified."""
    base, made = tmp_path_factory.mktemp("fused"), {}

    def make(model: str, recipe: str, dtype: str, fused: bool) -> Bundle:
        key = (model, recipe, dtype, fused)
        if key not in made:
            ckpt = base / model
            if not ckpt.exists():
                make_statespaces(ckpt, **CHECKPOINTS[model])
            file = base / f"{recipe}.yaml"
            file.write_text(RECIPES[recipe])
            options = {"recipe": file, "dtype": dtype, "fuse_step": fused, "verify": fused}
            made[key] = quantize(ckpt, base / str(len(made)), **options).bundle
        return made[key]

    with traced_once():
        yield make


def tensors(bundle: Bundle, graph: str) -> dict[str, torch.Tensor]:
    """The initializers by name, 4-bit integers one a byte."""
    model = onnx.load(bundle.file(graph))
    found = {}
    for t in model.graph.initializer:
        if t.data_type == onnx.TensorProto.BFLOAT16:
            raw = np.frombuffer(t.raw_data, np.int16).copy().reshape(tuple(t.dims))
            found[t.name] = torch.from_numpy(raw).view(torch.bfloat16)
            continue
        array = onnx.numpy_helper.to_array(t)
        kind = np.int8 if t.data_type == onnx.TensorProto.INT4 else array.dtype
        found[t.name] = torch.from_numpy(array.astype(kind))
    return found


def dequantized(found: dict[str, torch.Tensor], name: str, dtype: torch.dtype) -> torch.Tensor:
    """What DequantizeLinear makes of ``NAME.q`` and ``NAME.scale``."""
    q, scales = found[f"{name}.q"].float(), found[f"{name}.scale"].float()
    scales = scales[:, None] if scales.dim() == 1 else scales
    return (q * scales.repeat_interleave(q.shape[1] // scales.shape[1], 1)).to(dtype)


def node_of(bundle: Bundle) -> onnx.NodeProto:
    (node,) = onnx.load(bundle.file("step.onnx"), load_external_data=False).graph.node
    return node


def node_parameters(bundle: Bundle) -> list[str]:
    return list(node_of(bundle).input)[1 + len(bundle.states) :]


def shares(bundle: Bundle, recipe: str) -> bool:
    """Whether the embedding is the head's integers."""
    return bundle.spec.tie_embeddings and recipe != "w4"


def wide(name: str, recipe: str) -> bool:
    """Whether a matrix is int8 in a model of int4."""
    return recipe == "mixed" and name.endswith(
        ("layers.1.mixer.in_proj.weight", "layers.0.mixer.out_proj.weight", HEAD)
    )


@by_case
def test_the_node_takes_packed_rows_of_the_unfused_integers(
    model: str, recipe: str, dtype: str, bundle_of: BundleOf
) -> None:
    fused, plain = (bundle_of(model, recipe, dtype, fuse) for fuse in (True, False))
    kind, form = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype], FORMS[recipe]
    names = node_parameters(fused)
    node, found, unfused = node_of(fused), tensors(fused, "step.onnx"), tensors(plain, "step.onnx")
    assert node.op_type == OP_TYPE and list(node.input)[-len(names) :] == names and set(found) == set(names)
    assert names == parameter_names(fused.spec, packed=True, packed_embedding=shares(fused, recipe))
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert (attributes["weight_bits"], attributes["group_size"]) == (form.bits, form.group)
    packed = [name.removesuffix(".packed") for name in names if name.endswith(".packed")]
    assert len(packed) == 2 * fused.spec.n_layer + 1 + shares(fused, recipe)
    assert attributes["packed_embedding"] == shares(fused, recipe)
    for name in (n.removesuffix(".packed") for n in names):
        stored = "backbone.embedding.weight" if name == "lm_head.weight" and f"{name}.q" not in unfused else name
        if name not in packed:
            same = dequantized(unfused, name, kind) if f"{name}.q" in unfused else unfused[name]
            assert torch.equal(found[name], same), name
            continue
        assert name.endswith(PACKABLE)
        wanted, rows = dequantized(unfused, stored, kind), found[f"{name}.packed"]
        own = within(form, 4 if form.bits == 4 and not wide(name, recipe) else 8)
        assert rows.dtype == torch.int32 and rows.shape[1] * 4 == row_bytes(own, wanted.shape[1])
        assert torch.equal(unpack(rows.view(torch.uint8), own, wanted.shape[1], kind), wanted), name


@by_case
def test_the_unfused_step_the_body_and_the_reference_agree(
    model: str, recipe: str, dtype: str, bundle_of: BundleOf
) -> None:
    fused, plain = (bundle_of(model, recipe, dtype, fuse) for fuse in (True, False))
    kinds = {"conv": tensors(fused, "step.onnx")["backbone.norm_f.weight"].dtype, "ssm": torch.float32}
    ids, generator = torch.tensor([[3], [11]]), torch.Generator().manual_seed(1)
    given = [torch.randn(2, *s.shape, generator=generator).to(kinds[s.kind]) for s in fused.states]
    wide = dtype == "bf16"  # ONNX Runtime computes it in float32
    feed = {s.name: (t.float() if wide else t).numpy() for s, t in zip(fused.states, given, strict=True)}
    wanted, ours = (plain_session(b).run(None, {"input_ids": ids.numpy(), **feed}) for b in (plain, fused))
    found, names = tensors(fused, "step.onnx"), node_parameters(fused)
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node_of(fused).attribute}
    with torch.no_grad():
        reference = decode_stack_reference(ids, given, [found[name] for name in names], attributes)
    for unfused, body, definition in zip(wanted, ours, reference, strict=True):
        assert error(body, unfused) < (TOLERANCE[dtype] if wide else 1e-6)  # in float32 no float matrix was rounded
        assert error(body, definition.float().numpy()) < TOLERANCE[dtype]


def plain_session(bundle: Bundle) -> onnxruntime.InferenceSession:
    """The step without the fusions that let ONNX Runtime quantize the inputs of products of integer weights."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
    source = for_stock_runtime(bundle.file("step.onnx"), False, bundle.manifest.dtype == "bf16")
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def error(ours: Any, theirs: Any) -> float:
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


REFUSALS = {
    "inputs": ("extends: w8a8", "recipe inputs quantizes the inputs of in_proj to int8"),
    "fp8": ("weights: {type: fp8}\nhead: {type: fp8}", "can't hold head of the recipe fp8: .* no fp8 weights"),
    "rotation": ("extends: w8a16\nrotate: {out_proj: 64}", "rotates no inputs"),
    "state": ("extends: w8a16\nstate: int8", "no int8 state"),
    "small groups": ("weights: {type: int4, group: 16}\nhead: {type: int4, group: 16}", "no groups of 16 values"),
    "some float": ("extends: w8a16\nhead: {type: float}", "head is float, layers.0.in_proj is not"),
    "rows alike": ("weights: {type: int4, group: 128}\nhead: {type: int8}", r"int8 rows of 128 values .*\(head of"),
    "may be promoted": (
        "extends: w4a16\nhead: {type: int4}\nembedding: {type: int8}",
        r"int8 rows of 128 values .*\(layers.0.in_proj of",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_kernels_do_not_hold_is_refused_before_any_work(case: str, tmp_path: Path) -> None:
    text, message = REFUSALS[case]
    recipe = tmp_path / f"{case}.yaml"
    recipe.write_text(text)
    ckpt = make_statespaces(tmp_path / "model", d_model=128)
    stages: list[str] = []

    class Watched:
        def stage(self, name: str, total: int | None = None) -> Any:
            stages.append(name)
            raise AssertionError(name)

    with pytest.raises(UsageError, match=message) as caught:
        quantize(ckpt, tmp_path / "out", recipe=recipe, fuse_step=True, progress=Watched())  # type: ignore[arg-type]
    assert caught.value.hint and not stages and not (tmp_path / "out").exists()


def test_narrow_models_and_float32_are_refused(tmp_path: Path) -> None:
    for width, recipe, message in ((96, "w8a16", "no rows of 96 int8"), (192, "w4a16", "no rows of 192 ")):
        narrow = make_statespaces(tmp_path / f"{width}", d_model=width)
        with pytest.raises(UsageError, match=message) as caught:
            quantize(narrow, tmp_path / "out", recipe=recipe, fuse_step=True, calibration=None)
        assert "widths are multiples of" in str(caught.value.hint)
    ckpt = make_statespaces(tmp_path / "model", d_model=128)
    with pytest.raises(UsageError, match="no fp32"):
        quantize(ckpt, tmp_path / "out", recipe="w8a16", dtype="fp32", fuse_step=True)


def test_the_command_line(cli: Cli, tmp_path: Path) -> None:
    ckpt, out = make_statespaces(tmp_path / "model", d_model=64), tmp_path / "out"
    done = cli("onnx", "--ckpt", ckpt, "--recipe", "w8a16", "--fuse-step", "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)["manifest"]
    assert manifest["nodes"]["step"] == {OP_TYPE: 1} and manifest["dtype"] == "fp16"
    assert manifest["quantization"]["name"] == "w8a16"
    plans = []
    for only in ([], ["--step-only"]):
        done = cli("plan", out, "--device", "orin-nano-8gb", *only, "--json")
        plans += json.loads(done.stdout)["plans"]
    assert plans[0]["weights"] == (out / "weights.bin").stat().st_size  # prefill and the step have rows of their own
    assert 0 < plans[1]["weights"] < 0.7 * plans[0]["weights"]
    assert plans[0]["tokens_per_second"] == plans[1]["tokens_per_second"]
    for command, recipe in (("onnx", "w8a8"), ("quantize", "fp8")):
        done = cli(command, "--ckpt", ckpt, "--recipe", recipe, "--fuse-step", "-o", tmp_path / "x")
        assert done.returncode == 2
        check_message(done.stderr, f"{recipe}|quantizes the inputs of in_proj")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8a16", "w4a16"])
@pytest.mark.parametrize("model", ["mamba1-tiny", "mamba1-small", "mamba2-small"])
def test_trained_checkpoints_say_what_the_unfused_bundle_says(
    model: str, recipe: str, shared_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Greedy text of the golden prompts, token by token; int4 rounded to nearest, which needs no calibration."""
    ckpt, file = shared_checkpoint(model), tmp_path / f"{recipe}.yaml"
    extra = "weights: {method: rtn}\nsmooth: 0\npromote: {bits: 0}\n" if recipe == "w4a16" else ""
    file.write_text(f"extends: {recipe}\n{extra}")
    if recipe == "w4a16" and model == "mamba1-tiny":  # 192 wide
        with pytest.raises(UsageError, match="no rows of 192 int4"):
            quantize(ckpt, tmp_path / "out", recipe=file, fuse_step=True)
        return
    assert not load_recipe(file).needs_calibration
    bundles = [
        quantize(ckpt, tmp_path / str(fuse), recipe=file, dtype="fp16", fuse_step=fuse, verify=fuse).bundle
        for fuse in (False, True)
    ]
    texts = [greedy(bundle, ckpt) for bundle in bundles]
    assert texts[0] == texts[1]


def greedy(bundle: Bundle, ckpt: Path) -> list[list[int]]:
    """As many tokens after each golden prompt as the golden text has."""
    runner, step, texts = OrtRunner(bundle), plain_session(bundle), []
    names = [s.name for s in bundle.states]
    for case in json.loads((ckpt / "golden_greedy.json").read_text(encoding="utf-8")):
        logits, state = runner.prefill(np.array([case["prompt_ids"]]), runner.initial_state(1))
        feed, said = {name: state[name].numpy() for name in names}, [int(logits[0, -1].argmax())]
        while len(said) < len(case["greedy_ids"]):
            logits, *presents = step.run(None, {"input_ids": np.array([[said[-1]]]), **feed})
            feed = dict(zip(names, presents, strict=True))
            said.append(int(logits[0, -1].argmax()))
        texts.append(said)
    return texts
