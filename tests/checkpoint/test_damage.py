"""Damaged, hostile and foreign files: each ends in one clear line with a hint, of the right class."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from mamba_export.checkpoint import open_checkpoint
from mamba_export.errors import CheckpointError, MambaExportError, UnsupportedError, UsageError
from tests.make_checkpoints import make_bare, make_codestral, make_huggingface, make_statespaces, save_weights

MARKER = "PWNED"


def refused(path: str | Path, kind: type[MambaExportError], *words: str, format: str | None = None) -> None:
    """Opening fails with one line that holds all the words, exactly of the class, with a hint of one line."""
    with pytest.raises(MambaExportError) as caught:
        open_checkpoint(path, format=format)
    error = caught.value
    assert type(error) is kind, repr(error)
    message = str(error)
    assert "\n" not in message and len(message) < 600
    for word in words:
        assert word in message, message
    assert error.hint is None or "\n" not in error.hint
    assert error.hint or words


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


# safetensors files


def tamper(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


NAME = "backbone.layers.0.mixer.D"
LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "beyond the file": lambda h: h[NAME].update(shape=[1 << 20], data_offsets=[0, 4 << 20]),
    "shape": lambda h: h[NAME].update(shape=[65]),
    "negative": lambda h: h[NAME].update(shape=[-64]),
    "absurd": lambda h: h[NAME].update(shape=[10**12, 10**12]),
    "float": lambda h: h[NAME].update(shape=[64.0]),
    "backwards": lambda h: h[NAME].update(data_offsets=h[NAME]["data_offsets"][::-1]),
    "overlap": lambda h: h[NAME].update(data_offsets=[0, 256]),
    "no offsets": lambda h: h[NAME].pop("data_offsets"),
    "not a table": lambda h: h.update({NAME: 3}),
    "dtype": lambda h: h[NAME].update(dtype="F12"),
    "list dtype": lambda h: h[NAME].update(dtype=["F32"]),
    "hole": lambda h: h.pop(NAME),
}


@pytest.mark.parametrize("lie", LIES)
def test_safetensors_header_that_lies(lie: str, tmp_path: Path) -> None:
    folder = make_huggingface(tmp_path)
    tamper(folder / "model.safetensors", LIES[lie])
    refused(folder, CheckpointError, "model.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -4000])
def test_truncated_safetensors(keep: int, tmp_path: Path) -> None:
    folder = make_huggingface(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, CheckpointError, "model.safetensors", "truncated" if keep else "empty")


def test_safetensors_with_damaged_header(tmp_path: Path) -> None:
    folder = make_huggingface(tmp_path)
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[8:40] = b"\xff" * 32
    path.write_bytes(raw)
    refused(folder, CheckpointError, "header is damaged")
    path.write_bytes(struct.pack("<Q", 2) + b"[]")
    refused(folder, CheckpointError, "header is damaged")
    path.write_bytes(struct.pack("<Q", 18) + b'{"a":{}, "a":{}}  ')
    refused(folder, CheckpointError, "occurs twice")
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    refused(folder, CheckpointError, "truncated")


def test_safetensors_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    refused(path, CheckpointError, "holds no tensors")


def test_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    folder = make_huggingface(tmp_path)
    checkpoint = open_checkpoint(folder)
    os.truncate(folder / "model.safetensors", 4000)
    with pytest.raises(CheckpointError, match="changed"):
        checkpoint.tensors["backbone.embedding.weight"].load()


# shards


@pytest.mark.parametrize("container", ["bin-sharded", "safetensors-sharded"])
def test_missing_shard(container: str, tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path, container=container)
    next(folder.glob("*-00002-of-00002*")).unlink()
    refused(folder, CheckpointError, "-00002-of-00002", "missing")
    next(folder.glob("*.index.json")).unlink()
    refused(folder, CheckpointError, "-00002-of-00002", "missing")


def test_index_that_lies(tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path, container="safetensors-sharded")
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    shards = sorted(set(good["weight_map"].values()))

    def write(change: dict[str, Any]) -> None:
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], **change}}))

    write({"backbone.norm_f.weight": shards[0]})
    refused(folder, CheckpointError, "'backbone.norm_f.weight'", shards[1])
    write({"backbone.more.weight": shards[0]})
    refused(folder, CheckpointError, "'backbone.more.weight'", "in no shard")
    write({"backbone.norm_f.weight": "../other/model.safetensors"})
    refused(folder, CheckpointError, "outside its folder")
    for text in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'):
        index.write_text(text)
        refused(folder, CheckpointError, "index.json")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path, container="safetensors-sharded")
    first, second = sorted(folder.glob("*.safetensors"))
    shutil.copy(first, second)
    refused(folder, CheckpointError, "in two files", first.name, second.name)


# torch files


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARKER}",)


def hostile_zip(path: Path) -> None:
    torch.save({"backbone.embedding.weight": torch.zeros(3), "x": Hostile()}, path)


def hostile_legacy(path: Path) -> None:
    torch.save({"x": Hostile()}, path, _use_new_zipfile_serialization=False)


def hostile_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"x": Hostile()}))


@pytest.mark.parametrize("write", [hostile_zip, hostile_legacy, hostile_pickle])
@pytest.mark.parametrize("beside_config", [False, True])
def test_code_in_a_pickle_never_runs(
    write: Callable[[Path], None], beside_config: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if beside_config:
        make_statespaces(tmp_path)
    write(tmp_path / "pytorch_model.bin")
    refused(tmp_path, CheckpointError, "would run code", ".system")
    assert not (tmp_path / MARKER).exists()


def test_whole_model_instead_of_a_state_dict(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    refused(tmp_path / "model.pt", CheckpointError, "would run code", "torch.nn.modules.linear.Linear")


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, -1, -200])
@pytest.mark.parametrize("container", ["bin", "bin-legacy"])
def test_truncated_torch_file(keep: int, container: str, tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path, container=container)
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, CheckpointError, "pytorch_model.bin")


def test_corrupted_torch_pickle(tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path)
    path = folder / "pytorch_model.bin"
    raw = bytearray(path.read_bytes())
    at = raw.index(b"data.pkl") + 100
    raw[at : at + 300] = bytes(range(50, 250)) + bytes(range(100))
    path.write_bytes(raw)
    refused(folder, CheckpointError, "pytorch_model.bin", "damaged")


def test_files_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    refused(path, CheckpointError, "text file")
    path.write_text("just a text\n" * 10)
    refused(path, CheckpointError, "not a torch file")
    path.write_bytes(b"GGUF" + bytes(100))
    refused(path, UnsupportedError, "GGUF")
    buffer = io.BytesIO()
    numpy.savez(buffer, a=numpy.zeros(3))
    path.write_bytes(buffer.getvalue())
    refused(path, CheckpointError, "not one of torch")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("script/data.pkl", b"")
        archive.writestr("script/constants.pkl", b"")
    refused(path, UnsupportedError, "TorchScript")


def test_torch_files_that_are_no_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for value, word in [([1, 2], "a list"), ({}, "an empty table"), ({"a": torch.zeros(2), "epoch": 3}, "'epoch'")]:
        torch.save(value, path)
        refused(path, CheckpointError, word)
    torch.save({"a": torch.zeros(2, 2).to_sparse()}, path)
    refused(path, UnsupportedError, "'a'", "sparse")
    torch.save({"a": torch.zeros(2, device="meta")}, path)
    refused(path, UnsupportedError, "'a'", "without values")


@pytest.mark.parametrize("container", ["bin", "bin-legacy", "safetensors"])
@pytest.mark.parametrize("seed", range(40))
def test_random_damage_is_met_with_an_error_of_ours_or_not_at_all(container: str, seed: int, tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path, n_layer=1, container=container)
    path = folder / ("model.safetensors" if container == "safetensors" else "pytorch_model.bin")
    raw = bytearray(path.read_bytes())
    start = raw.index(b"data.pkl") if container == "bin" else 0
    source = random.Random(seed)
    for _ in range(source.choice((1, 2, 5, 20))):
        raw[start + source.randrange(2000)] = source.randrange(256)
    path.write_bytes(raw)
    met: list[MambaExportError] = []
    try:
        with open_checkpoint(folder) as checkpoint:
            for tensor in checkpoint.tensors.values():
                tensor.load()
    except MambaExportError as error:
        met.append(error)
    assert all("\n" not in str(error) and error.exit_code in (2, 3) for error in met)


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
