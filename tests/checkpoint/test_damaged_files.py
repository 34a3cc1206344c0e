"""Truncated, corrupted and hostile weight files: each ends in one clear line with a hint, and no code runs."""

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

from mamba_export.checkpoint import open_checkpoint
from mamba_export.errors import CheckpointError, MambaExportError, UnsupportedError
from tests.checkpoint.refusal import MARKER, Hostile, hostile_zip, refused
from tests.make_checkpoints import make_huggingface, make_statespaces

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
