"""The shapes that a spec implies are those of mamba_ssm and transformers, and a bare file gives the spec back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_export.checkpoint import LazyTensor, expected_tensors, huggingface
from mamba_export.checkpoint.bare import spec_from_shapes
from mamba_export.checkpoint.layout import account, common_prefix
from mamba_export.checkpoint.statespaces import spec_from_config
from mamba_export.errors import CheckpointError
from mamba_export.spec import ModelSpec


def small(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    config: dict[str, Any] = {
        "d_model": draw(small(1, 40)),
        "n_layer": draw(small(1, 3)),
        "vocab_size": draw(small(1, 60)),
        "rms_norm": draw(st.booleans()),
        "d_intermediate": draw(st.sampled_from([0, 0, 1, 128, 200])),
        "tie_embeddings": draw(st.booleans()),
    }
    common = {"d_state": draw(small(1, 20)), "d_conv": draw(small(2, 5)), "expand": draw(small(1, 3))}
    biases = {"bias": draw(st.booleans()), "conv_bias": draw(st.booleans())}
    if draw(st.booleans()):
        ssm_cfg = {**common, **biases, "dt_rank": draw(st.sampled_from(["auto", 1, 5]))}
    else:
        headdim, nheads, groups = draw(small(1, 4)), draw(small(1, 4)), draw(small(1, 3))
        d_ssm = headdim * nheads * groups
        config["d_model"] = d_ssm * draw(small(1, 2))
        ssm_cfg = {
            **common,
            **biases,
            "layer": "Mamba2",
            "headdim": headdim,
            "ngroups": groups,
            "d_ssm": draw(st.sampled_from([d_ssm, None])),
            "rmsnorm": draw(st.booleans()),
            "D_has_hdim": draw(st.booleans()),
        }
    return spec_from_config({**config, "ssm_cfg": ssm_cfg}, "config.json")


def lazily(shapes: dict[str, tuple[int, ...]], **dtypes: str) -> dict[str, LazyTensor]:
    def refuse() -> Any:
        raise AssertionError("values were read")

    return {
        name: LazyTensor(name, name, shape, dtypes.get(name, "float32"), Path("model.pt"), refuse)
        for name, shape in shapes.items()
    }


@given(specs())
def test_a_bare_file_gives_the_spec_back(spec: ModelSpec) -> None:
    found = lazily(expected_tensors(spec))
    if not spec.tie_embeddings:  # telling a tied head from another needs the values
        found.pop("lm_head.weight")
    read = spec_from_shapes(found, "model.pt", assumptions := [])
    assert assumptions
    blind = {"vocab_size", "tie_embeddings", "dt_limit", "gated_norm_group_size"}
    if spec.family == "mamba2":
        blind |= {"ngroups", "d_state"}
        assert read.ngroups * read.d_state == spec.ngroups * spec.d_state
        if spec.headdim == 1:
            blind |= {"D_has_hdim"}
    first, second = spec.to_dict(), read.to_dict()
    assert {k: v for k, v in first.items() if k not in blind} == {k: v for k, v in second.items() if k not in blind}
    shapes = expected_tensors(read)
    assert shapes == {name: shape for name, shape in expected_tensors(spec).items() if name != "lm_head.weight"}


@given(specs(), st.data())
def test_any_tensor_missing_left_over_or_misshapen_is_named(spec: ModelSpec, data: st.DataObject) -> None:
    expected = expected_tensors(spec)
    found = lazily(expected)
    assert list(account(spec, found, "model.pt", "config.json")) == list(expected)
    name = data.draw(st.sampled_from(sorted(expected)))
    with pytest.raises(CheckpointError) as caught:
        account(spec, {k: v for k, v in found.items() if k != name}, "model.pt", "config.json")
    assert f"'{name}'" in str(caught.value) and "missing from model.pt" in str(caught.value)
    axis = data.draw(st.integers(0, len(expected[name]) - 1))
    shape = tuple(n + (i == axis) for i, n in enumerate(expected[name]))
    with pytest.raises(CheckpointError) as caught:
        account(spec, {**found, **lazily({name: shape})}, "model.pt", "config.json")
    message = str(caught.value)
    assert f"'{name}'" in message and str(list(shape)) in message and str(list(expected[name])) in message
    with pytest.raises(CheckpointError, match=r"'backbone\.more' \[3\] .*no place"):
        account(spec, {**found, **lazily({"backbone.more": (3,)})}, "model.pt", "config.json")


@pytest.mark.parametrize("kind", huggingface.MODEL_TYPES)
def test_shapes_are_those_of_transformers(kind: str) -> None:
    import torch
    import transformers

    options = {"hidden_size": 48, "state_size": 6, "vocab_size": 30, "num_hidden_layers": 3, "use_bias": True}
    if kind == "mamba2":
        options.update(num_heads=12, head_dim=8, n_groups=4)
    config = transformers.AutoConfig.for_model(kind, **options, tie_word_embeddings=False)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {huggingface.rename(name): tuple(value.shape) for name, value in model.state_dict().items()}
    spec = huggingface.spec_from_config({**config.to_dict(), "model_type": kind}, "config.json")
    assert expected_tensors(spec) == shapes
    assert sum(math.prod(shape) for shape in shapes.values()) == sum(p.numel() for p in model.parameters())


def test_order_follows_the_model() -> None:
    spec = spec_from_config({"d_model": 8, "n_layer": 11, "vocab_size": 5, "tie_embeddings": False}, "config.json")
    names = list(expected_tensors(spec))
    assert names[0] == "backbone.embedding.weight"
    assert names[-2:] == ["backbone.norm_f.weight", "lm_head.weight"]
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)


def test_common_prefix() -> None:
    assert common_prefix([]) == ""
    assert common_prefix(["backbone.a", "lm_head.b"]) == ""
    assert common_prefix(["module._orig_mod.backbone.a", "module._orig_mod.lm_head.b"]) == "module._orig_mod."
    assert common_prefix(["model.backbone.a", "lm_head.b"]) == ""
