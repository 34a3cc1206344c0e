"""Every option of every config either works or is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mamba_export.checkpoint import codestral, huggingface, open_checkpoint, statespaces
from mamba_export.checkpoint.config import as_float
from mamba_export.errors import CheckpointError, UnsupportedError
from mamba_export.spec import ModelSpec
from tests.make_checkpoints import MAMBA2, make_huggingface, make_statespaces


def ss(ssm_cfg: dict[str, Any] | None = None, **config: Any) -> ModelSpec:
    base = {"d_model": 32, "n_layer": 2, "vocab_size": 50, "ssm_cfg": ssm_cfg or {}}
    return statespaces.spec_from_config({**base, **config}, "config.json")


def hf(model_type: str = "mamba", **config: Any) -> ModelSpec:
    base: dict[str, Any] = {"model_type": model_type, "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
    if model_type == "mamba2":
        base.update(num_heads=8, head_dim=8, n_groups=2)
    return huggingface.spec_from_config({**base, **config}, "config.json")


# state-spaces


def test_defaults_of_mamba_ssm() -> None:
    spec = statespaces.spec_from_config({}, "config.json")
    assert (spec.d_model, spec.n_layer, spec.vocab_size, spec.padded_vocab_size) == (2560, 64, 50277, 50280)
    assert (spec.family, spec.d_inner, spec.d_state, spec.d_conv, spec.dt_rank) == ("mamba1", 5120, 16, 4, 160)
    assert (spec.norm, spec.norm_eps, spec.residual_in_fp32, spec.tie_embeddings) == ("rms", 1e-5, True, True)
    assert (spec.proj_bias, spec.conv_bias, spec.d_intermediate) == (False, True, 0)
    spec = ss({"layer": "Mamba2"}, d_model=256)
    assert (spec.d_inner, spec.d_ssm, spec.nheads, spec.headdim) == (512, 512, 8, 64)
    assert (spec.d_state, spec.ngroups, spec.chunk_size, spec.dt_limit) == (128, 1, 256, (0.0, math.inf))
    assert (spec.gated_norm, spec.norm_before_gate, spec.gated_norm_group_size) == (True, False, 512)
    assert (spec.gated_norm_eps, spec.D_has_hdim) == (1e-5, False)


def test_mamba1_options() -> None:
    spec = ss({"d_state": 5, "d_conv": 3, "expand": 1.7, "dt_rank": 9, "bias": True, "conv_bias": False})
    assert (spec.d_state, spec.d_conv, spec.d_inner, spec.dt_rank) == (5, 3, 54, 9)
    assert (spec.proj_bias, spec.conv_bias) == (True, False)
    assert ss({"dt_rank": "auto"}, d_model=33).dt_rank == 3


def test_mamba2_options() -> None:
    options = {"ngroups": 2, "d_ssm": 32, "expand": 3, "rmsnorm": True, "norm_before_gate": True, "chunk_size": 64}
    spec = ss({**MAMBA2, **options, "dt_limit": [0.001, 0.1], "D_has_hdim": True})
    assert (spec.d_inner, spec.d_ssm, spec.d_mlp, spec.nheads, spec.ngroups) == (96, 32, 64, 4, 2)
    assert (spec.gated_norm_group_size, spec.norm_before_gate, spec.chunk_size) == (16, True, 64)
    assert (spec.dt_limit, spec.D_has_hdim) == ((0.001, 0.1), True)
    assert not ss({**MAMBA2, "rmsnorm": False}).gated_norm
    assert ss({**MAMBA2, "expand": 1.5}).d_inner == 48
    assert ss({**MAMBA2, "dt_limit": [0.0, math.inf]}).dt_limit == (0.0, math.inf)


def test_model_options() -> None:
    spec = ss(rms_norm=False, residual_in_fp32=False, tie_embeddings=False, d_intermediate=129, vocab_size=53)
    assert (spec.norm, spec.residual_in_fp32, spec.tie_embeddings) == ("layer", False, False)
    assert (spec.d_intermediate, spec.vocab_size, spec.padded_vocab_size) == (256, 53, 56)
    assert ss(pad_vocab_size_multiple=1, vocab_size=53).padded_vocab_size == 53


@pytest.mark.parametrize("key", ["dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path"])
def test_mamba1_options_of_the_initialization(key: str) -> None:
    assert ss({key: 0.5}) == ss()


@pytest.mark.parametrize("key", ["dt_min", "A_init_range", "conv_init", "use_mem_eff_path", "sequence_parallel"])
def test_mamba2_options_of_the_initialization(key: str) -> None:
    assert ss({**MAMBA2, key: None}) == ss(dict(MAMBA2))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"attn_layer_idx": [3]}, "attn_layer_idx = [3]"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg.layer = 'Mamba3'"),
        ({"ssm_cfg": {"headdim": 64}}, "ssm_cfg.headdim = 64 for a Mamba1 layer"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_rank": 3}}, "ssm_cfg.dt_rank = 3 for a Mamba2 layer"),
        ({"ssm_cfg": {"layer": "Mamba2", "process_group": "tp"}}, "ssm_cfg.process_group"),
        ({"ssm_cfg": {"layer": "Mamba2", "learnable_init_states": True}}, "ssm_cfg.learnable_init_states"),
        ({"ssm_cfg": {"layer": "Mamba2", "activation": "gelu"}}, "ssm_cfg.activation"),
        ({"num_experts": 8}, "'num_experts' = 8"),
    ],
)
def test_statespaces_refuses_by_name(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        statespaces.spec_from_config({"d_model": 32, "n_layer": 2, "vocab_size": 50, **config}, "config.json")
    assert words in str(caught.value)
    assert caught.value.hint and "supported" in caught.value.hint


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"d_model": "big"}, "'d_model' is 'big', expected a whole number"),
    ({"d_model": 31.5}, "'d_model' is 31.5"),
    ({"d_model": True}, "'d_model' is True"),
    ({"d_model": 10**9}, "d_model = 1000000000"),
    ({"d_model": 10**400}, "no sensible inner width"),
    ({"d_model": -32}, "no sensible inner width"),
    ({"d_model": 0}, "no sensible inner width"),
    ({"n_layer": 10**6}, "n_layer = 1000000"),
    ({"n_layer": 0}, "n_layer = 0"),
    ({"vocab_size": 10**12}, "vocab_size"),
    ({"d_intermediate": -5}, "d_intermediate"),
    ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple"),
    ({"rms_norm": "yes"}, "'rms_norm' is 'yes', expected true or false"),
    ({"ssm_cfg": [1]}, "'ssm_cfg' is [1], expected an object"),
    ({"ssm_cfg": {"d_state": 10**7}}, "d_state = 10000000"),
    ({"ssm_cfg": {"d_conv": 1}}, "d_conv = 1"),
    ({"ssm_cfg": {"expand": math.nan}}, "'expand' is nan"),
    ({"ssm_cfg": {"expand": math.inf}}, "no sensible inner width"),
    ({"ssm_cfg": {"expand": 1e300}}, "no sensible inner width"),
    ({"ssm_cfg": {"dt_rank": "full"}}, "'dt_rank' is 'full'"),
    ({"ssm_cfg": {"layer": "Mamba2", "headdim": 7}}, "not a multiple of headdim = 7"),
    ({"ssm_cfg": {"layer": "Mamba2", "headdim": 0}}, "headdim = 0"),
    ({"ssm_cfg": {**MAMBA2, "ngroups": 3}}, "ngroups = 3"),
    ({"ssm_cfg": {**MAMBA2, "d_ssm": 128}}, "d_ssm = 128"),
    ({"ssm_cfg": {**MAMBA2, "expand": 1.51}}, "not a whole number"),
    ({"ssm_cfg": {**MAMBA2, "dt_limit": [0.1]}}, "'dt_limit' is [0.1], expected two numbers"),
    ({"ssm_cfg": {**MAMBA2, "dt_limit": [0.2, 0.1]}}, "dt_limit"),
]


@pytest.mark.parametrize(("config", "words"), WRONG)
def test_wrong_values(config: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        statespaces.spec_from_config({"d_model": 32, "n_layer": 2, "vocab_size": 50, **config}, "config.json")
    assert str(caught.value).startswith("config.json")
    assert words in str(caught.value)
    assert not isinstance(caught.value, UnsupportedError)


def test_a_wrong_value_through_the_front_door(tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "d_model": 10**9}))
    with pytest.raises(CheckpointError, match=r"config.json: d_model = 1000000000 is not an integer in"):
        open_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps({**config, "d_model": 48}))
    with pytest.raises(CheckpointError, match=r"'backbone.embedding.weight'.*\[56, 32\], expected \[56, 48\]"):
        open_checkpoint(folder)


# Hugging Face


def test_transformers_defaults_match_the_installed_version() -> None:
    """A config without a field means what transformers takes it to mean."""
    import transformers

    for kind, config in [
        ("mamba", transformers.MambaConfig()),
        ("falcon_mamba", transformers.FalconMambaConfig()),
        ("mamba2", transformers.Mamba2Config()),
    ]:
        explicit = huggingface.spec_from_config({**config.to_dict(), "model_type": kind}, "config.json")
        assert huggingface.spec_from_config({"model_type": kind}, "config.json") == explicit


def test_every_entry_transformers_writes_is_known(tmp_path: Path) -> None:
    for kind in huggingface.MODEL_TYPES:
        folder = make_huggingface(tmp_path / kind, kind)
        assert open_checkpoint(folder).assumptions == []


def test_stored_intermediate_size_wins_over_expand() -> None:
    import transformers

    assert hf(expand=16, intermediate_size=72).d_inner == 72
    assert transformers.MambaConfig(hidden_size=32, expand=16, intermediate_size=72).intermediate_size == 72
    assert hf("falcon_mamba", expand=16, intermediate_size=72).d_inner == 72
    assert hf("mamba2", intermediate_size=72).d_inner == 64, "mamba2 computes it"


def test_transformers_gated_norm_options() -> None:
    notes: list[str] = []
    config = {"model_type": "mamba2", "hidden_size": 32, "num_heads": 8, "head_dim": 8, "n_groups": 2}
    spec = huggingface.spec_from_config({**config, "norm_before_gate": True, "rms_norm": True}, "config.json", notes)
    assert not spec.norm_before_gate, "transformers gates first, whatever the config says"
    assert len(notes) == 1 and "'norm_before_gate' = True is ignored" in notes[0]
    assert spec.gated_norm_group_size == 32
    assert hf("mamba2", layer_norm_epsilon=1e-3).gated_norm_eps == 1e-3


def test_unknown_entries_are_said() -> None:
    notes: list[str] = []
    huggingface.spec_from_config({"model_type": "mamba", "unsloth_version": "1"}, "config.json", notes)
    assert notes == ["config.json: 'unsloth_version' = '1' is ignored, as transformers ignores it"]


# Configs in the manner of published models: JSON as it lies on the hub, the spec it must give, and what must be said.
PUBLISHED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "the first Mamba, converted, with mamba_ssm's options left in": (
        """{"architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536,
        "d_model": 768, "eos_token_id": 0, "expand": 2, "fused_add_norm": true, "hidden_act": "silu",
        "hidden_size": 768, "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-05,
        "model_type": "mamba", "n_layer": 24, "num_hidden_layers": 24, "pad_token_id": 0,
        "pad_vocab_size_multiple": 8, "rescale_prenorm_residual": false, "residual_in_fp32": true,
        "rms_norm": true, "ssm_cfg": {}, "state_size": 16, "time_step_floor": 0.0001, "time_step_max": 0.1,
        "time_step_init_scheme": "random", "time_step_min": 0.001, "time_step_rank": 48, "time_step_scale": 1.0,
        "torch_dtype": "float32", "transformers_version": "4.39.0.dev0", "use_bias": false, "use_cache": true,
        "use_conv_bias": true, "vocab_size": 50280}""",
        {"family": "mamba1", "d_inner": 1536, "n_layer": 24, "dt_rank": 48, "tie_embeddings": True, "d_state": 16},
        [],
    ),
    "a Mamba-2 of the first transformers version that knew it": (
        """{"model_type": "mamba2", "chunk_size": 256, "conv_kernel": 4, "expand": 2, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 8192, "layer_norm_epsilon": 1e-05,
        "n_groups": 8, "norm_before_gate": true, "num_heads": 128, "num_hidden_layers": 64, "rms_norm": true,
        "state_size": 128, "time_step_limit": [0.0, Infinity], "time_step_rank": 256, "vocab_size": 32768,
        "use_bias": false, "use_conv_bias": true, "tie_word_embeddings": false, "torch_dtype": "bfloat16"}""",
        {"family": "mamba2", "d_inner": 8192, "gated_norm_group_size": 1024, "norm_before_gate": False},
        ["norm_before_gate"],
    ),
    "Falcon-Mamba, whose expand is not what it says": (
        """{"model_type": "falcon_mamba", "hidden_size": 4096, "expand": 16, "intermediate_size": 8192,
        "num_hidden_layers": 64, "state_size": 16, "time_step_rank": 256, "vocab_size": 65024,
        "tie_word_embeddings": false, "use_mambapy": false, "use_bias": false, "use_conv_bias": true}""",
        {"family": "mamba1", "d_inner": 8192, "bcdt_norm_eps": 1e-6, "tie_embeddings": False, "dt_rank": 256},
        [],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_in_the_manner_of_published_models(name: str) -> None:
    text, fields, said = PUBLISHED[name]
    notes: list[str] = []
    spec = huggingface.spec_from_config(json.loads(text), "config.json", notes)
    assert {field: getattr(spec, field) for field in fields} == fields
    assert len(notes) == len(said)
    assert all(word in note for word, note in zip(said, notes, strict=True))


@pytest.mark.parametrize(
    "limit", [[0.0, {"__float__": "Infinity"}], [0.0, math.inf], [0.0, "Infinity"], (0.0, math.inf), [0, None]]
)
def test_infinite_limit_is_written_in_several_ways(limit: Any) -> None:
    assert hf("mamba2", time_step_limit=limit).dt_limit == (0.0, math.inf)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"model_type": "jamba"}, "model_type 'jamba'"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized (bitsandbytes)"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, "auto_map"),
        ({"rms_norm": False}, "'rms_norm' = False"),
        ({"attn_layer_idx": [1]}, "'attn_layer_idx' = [1]"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "'ssm_cfg'"),
    ],
)
def test_huggingface_refuses_by_name(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        hf(**config)
    assert words in str(caught.value)
    assert caught.value.hint


def test_unsupported_model_type_lists_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "zamba2", "hidden_size": 8}')
    (tmp_path / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    with pytest.raises(UnsupportedError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.hint == "supported: mamba, falcon_mamba, mamba2"


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("mamba2", {"num_heads": 7}, "nheads * headdim"),
        ("mamba2", {"n_groups": 3}, "n_groups = 3"),
        ("mamba2", {"n_groups": 0}, "n_groups = 0"),
        ("mamba2", {"time_step_limit": "no"}, "'time_step_limit'"),
        ("mamba", {"hidden_size": None, "layer_norm_epsilon": -1.0}, "norm_eps"),
        ("mamba", {"state_size": "16"}, "'state_size' is '16'"),
        ("mamba", {"use_bias": 1}, "'use_bias' is 1"),
    ],
)
def test_huggingface_wrong_values(kind: str, config: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        hf(kind, **config)
    assert words in str(caught.value)


# Codestral


PARAMS = {"dim": 4096, "n_layers": 64, "vocab_size": 32768, "n_groups": 8, "model_type": "mamba"}


def test_codestral_mamba_7b() -> None:
    options = {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
    spec = codestral.spec_from_params({**PARAMS, **options, "pad_vocab_size_multiple": 1, "tie_embeddings": False}, "p")
    assert (spec.family, spec.d_inner, spec.nheads, spec.headdim, spec.d_state) == ("mamba2", 8192, 128, 64, 128)
    assert (spec.padded_vocab_size, spec.gated_norm_group_size, spec.tie_embeddings) == (32768, 1024, False)
    assert codestral.spec_from_params(PARAMS, "p") == spec


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"model_type": "transformer"}, "model_type 'transformer'"),
        ({"n_heads": 32}, "model_type"),
        ({"sliding_window": 4096}, "'sliding_window'"),
        ({"attn_layer_idx": [2]}, "attn_layer_idx"),
        ({"d_state": 64, "state_size": 128}, "contradicts"),
    ],
)
def test_codestral_refuses_by_name(params: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        codestral.spec_from_params({**PARAMS, **params}, "params.json")


@pytest.mark.parametrize("key", ["dim", "n_layers", "vocab_size"])
def test_codestral_incomplete(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"has no '{key}'"):
        codestral.spec_from_params({k: v for k, v in PARAMS.items() if k != key}, "params.json")


def test_numbers_out_of_json() -> None:
    assert as_float("-Infinity") == -math.inf
    assert as_float(math.nan) is None
    assert as_float(10**400) is None
    assert as_float(True) is None
    assert as_float({"__float__": "NaN"}) is None
    assert as_float([1.0]) is None
