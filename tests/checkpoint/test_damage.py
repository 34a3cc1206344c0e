"""Folders and configs that are incomplete, foreign or contradict their weights: one clear line with a hint each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mamba_export.checkpoint import open_checkpoint
from mamba_export.errors import CheckpointError, UnsupportedError, UsageError
from tests.checkpoint.refusal import hostile_zip, refused
from tests.make_checkpoints import make_bare, make_codestral, make_huggingface, make_statespaces, save_weights


def test_no_such_path(tmp_path: Path) -> None:
    refused("", UsageError, "empty")
    refused(tmp_path / "nothing", UsageError, "no such file or folder", "nothing")
    refused(str(tmp_path / "model.pt"), UsageError, "no such file or folder")
    refused("models/model.safetensors", UsageError, "no such file or folder")


def test_unknown_format(tmp_path: Path) -> None:
    refused(make_statespaces(tmp_path), UsageError, "unknown checkpoint format 'gguf'", format="gguf")


def test_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, CheckpointError, "is an empty folder")
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path, CheckpointError, "neither a config nor weights")


def test_folder_of_another_kind(tmp_path: Path) -> None:
    for names, kind, word in [
        (["manifest.json", "prefill.onnx"], UsageError, "is a bundle"),
        (["adapter_config.json", "adapter_model.safetensors"], UnsupportedError, "adapter"),
        (["model.gguf"], UnsupportedError, "GGUF"),
        (["__0_0.distcp", ".metadata"], UnsupportedError, "tensor-parallel"),
        (["mp_rank_00_model_states.pt"], UnsupportedError, "tensor-parallel"),
    ]:
        folder = tmp_path / names[0].replace(".", "_")
        folder.mkdir()
        for name in names:
            (folder / name).write_text("{}")
        refused(folder, kind, word)


def test_special_files_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    refused(tmp_path / "pipe.pt", UsageError, "is not a file")


def test_config_without_weights(tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path)
    (folder / "pytorch_model.bin").unlink()
    refused(folder, CheckpointError, "holds no weights")


def test_weights_without_the_config_a_format_needs(tmp_path: Path) -> None:
    path = make_bare(tmp_path / "model.pt")
    refused(path, CheckpointError, "has no config.json", format="huggingface")
    refused(path, CheckpointError, "has no params.json", format="codestral")


def test_several_weight_files(tmp_path: Path) -> None:
    make_bare(tmp_path / "a.pt")
    make_bare(tmp_path / "b.pt")
    refused(tmp_path, CheckpointError, "2 weight files", "a.pt", "b.pt")


@pytest.mark.parametrize("text", ["{not json", "", "[1, 2]", "\xff\xfe", '{"a": ' + "[" * 100_000])
def test_config_that_is_not_json(text: str, tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path)
    (folder / "config.json").write_text(text, encoding="latin-1")
    refused(folder, CheckpointError, "config.json")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_weights(folder, weights, "safetensors")


def test_unsupported_model_is_named_before_its_weights_are_touched(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "jamba", "hidden_size": 8}')
    refused(tmp_path, UnsupportedError, "'jamba'")
    hostile_zip(tmp_path / "pytorch_model.bin")
    refused(tmp_path, UnsupportedError, "'jamba'")


def test_missing_tensor(tmp_path: Path) -> None:
    folder = make_huggingface(tmp_path)
    rewrite(folder, lambda w: w.pop("backbone.layers.1.mixer.D"))
    refused(folder, CheckpointError, "'backbone.layers.1.mixer.D' [64]", "missing from model.safetensors")
    rewrite(folder, lambda w: w.pop("backbone.embeddings.weight"))
    refused(folder, CheckpointError, "'backbone.embeddings.weight' [50, 32]", "and 1 more")


def test_left_over_tensor(tmp_path: Path) -> None:
    folder = make_huggingface(tmp_path)
    rewrite(folder, lambda w: w.update({"backbone.layers.0.mixer.in_proj.bias": torch.zeros(128)}))
    refused(folder, CheckpointError, "'backbone.layers.0.mixer.in_proj.bias' [128]", "no place", "config.json")


def test_layer_beyond_the_last(tmp_path: Path) -> None:
    folder = make_huggingface(tmp_path)
    rewrite(folder, lambda w: w.update({"backbone.layers.2.norm.weight": torch.zeros(32)}))
    refused(folder, CheckpointError, "'backbone.layers.2.norm.weight'", "no place")


def test_shape_that_contradicts_the_config(tmp_path: Path) -> None:
    folder = make_huggingface(tmp_path)
    rewrite(folder, lambda w: w.update({"backbone.layers.1.mixer.A_log": torch.zeros(64, 9)}))
    refused(folder, CheckpointError, "'backbone.layers.1.mixer.A_log'", "[64, 9]", "expected [64, 8]", "config.json")


def test_integer_weights(tmp_path: Path) -> None:
    folder = make_huggingface(tmp_path)
    rewrite(folder, lambda w: w.update({"backbone.layers.1.mixer.D": torch.zeros(64, dtype=torch.int8)}))
    refused(folder, UnsupportedError, "'backbone.layers.1.mixer.D'", "int8")
    rewrite(folder, lambda w: w.update({"backbone.layers.1.mixer.D": torch.zeros(64).to(torch.float8_e4m3fn)}))
    refused(folder, UnsupportedError, "float8_e4m3fn")


def test_a_tensor_under_two_names(tmp_path: Path) -> None:
    folder = make_huggingface(tmp_path)
    rewrite(folder, lambda w: w.update({"backbone.embedding.weight": w["backbone.embeddings.weight"].clone()}))
    refused(folder, CheckpointError, "'backbone.embedding.weight'", "'backbone.embeddings.weight'", "both")


@pytest.mark.parametrize("make", [make_statespaces, make_huggingface])
def test_tied_head_that_differs(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make(tmp_path, **({"container": "safetensors"} if make is make_statespaces else {}))
    name = "backbone.embedding.weight" if make is make_statespaces else "backbone.embeddings.weight"

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights[name].clone()
        weights["lm_head.weight"][3, 3] += 1

    rewrite(folder, spoil)
    refused(folder, CheckpointError, "'lm_head.weight'", "differs")


def test_tied_head_is_compared_bytewise(tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path, container="safetensors")
    rewrite(folder, lambda w: w["backbone.embedding.weight"].fill_(float("nan")))
    rewrite(folder, lambda w: w["lm_head.weight"].fill_(float("nan")))
    assert open_checkpoint(folder).spec.tie_embeddings


def test_no_head_and_not_tied(tmp_path: Path) -> None:
    refused(make_huggingface(tmp_path, "mamba2", head=False), CheckpointError, "'lm_head.weight'", "missing")


def test_falcon_norms_with_weights(tmp_path: Path) -> None:
    folder = make_huggingface(tmp_path, "falcon_mamba")
    rewrite(folder, lambda w: w.update({"backbone.layers.1.mixer.dt_layernorm.weight": torch.full((64,), 0.5)}))
    refused(folder, UnsupportedError, "'backbone.layers.1.mixer.dt_layernorm.weight'")


# bare files


def test_bare_file_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"encoder.weight": torch.zeros(2, 2)}, path)
    refused(path, UnsupportedError, "encoder.weight")
    torch.save({"backbone.embedding.weight": torch.zeros(4, 2), "backbone.layers.0.norm.weight": torch.zeros(2)}, path)
    refused(path, CheckpointError, "'backbone.layers.0.mixer.out_proj.weight'", "missing")


def test_bare_file_that_contradicts_itself(tmp_path: Path) -> None:
    path = make_bare(tmp_path / "model.pt")
    good = torch.load(path, weights_only=True)

    def change(name: str, value: torch.Tensor | None) -> None:
        weights = dict(good)
        if value is None:
            del weights[name]
        else:
            weights[name] = value
        torch.save(weights, path)

    change("backbone.layers.0.mixer.A_log", torch.zeros(64))
    refused(path, CheckpointError, "'backbone.layers.0.mixer.A_log'", "[64]", "2 dimensions")
    change("backbone.layers.1.mixer.A_log", torch.zeros(64, 15))
    refused(path, CheckpointError, "'backbone.layers.1.mixer.A_log'", "[64, 15]", "[64, 16]")
    change("backbone.layers.1.mixer.A_log", None)
    refused(path, CheckpointError, "'backbone.layers.1.mixer.A_log'", "missing")
    change("backbone.layers.99999999.mixer.A_log", torch.zeros(64, 16))
    refused(path, CheckpointError, "n_layer")
    change("backbone.layers.0.mixer.x_proj.weight", None)
    refused(path, UnsupportedError, "neither a Mamba-1 mixer")


def test_bare_mamba2_that_contradicts_itself(tmp_path: Path) -> None:
    path = make_bare(tmp_path / "model.pt", ssm_cfg={"layer": "Mamba2", "d_state": 16, "headdim": 8})
    weights = torch.load(path, weights_only=True)
    weights["backbone.layers.0.mixer.in_proj.weight"] = torch.zeros(169, 32)
    torch.save(weights, path)
    refused(path, CheckpointError, "contradict each other", "169 rows")


def test_codestral_with_a_damaged_file(tmp_path: Path) -> None:
    folder = make_codestral(tmp_path)
    path = folder / "consolidated.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    refused(folder, CheckpointError, "truncated")
