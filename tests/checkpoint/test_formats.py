"""Every format round trip: what was written is what is read, lazily, under canonical names."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file

from mamba_export.checkpoint import FORMATS, Checkpoint, expected_tensors, open_checkpoint
from mamba_export.checkpoint.storage import open_weights
from mamba_export.errors import CheckpointError
from tests.make_checkpoints import (
    CASES,
    MAMBA2,
    make_bare,
    make_codestral,
    make_huggingface,
    make_statespaces,
    random_weights,
    save_weights,
    to_huggingface_names,
    write_json,
)

SHARED = Path(__file__).parents[3] / "shared" / "checkpoints"


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors in all weight files of a folder or in one file, by the libraries that wrote them."""
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    result: dict[str, torch.Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            result.update(load_file(file))
        elif file.suffix in (".bin", ".pt"):
            loaded = torch.load(file, weights_only=True)
            result.update(loaded.get("state_dict", loaded))
    return result


def plain_name(name: str) -> str:
    name = name.removeprefix("module.").removeprefix("model.")
    if name.startswith(("embeddings.", "layers.", "norm_f.")):
        name = "backbone." + name
    return name.replace("backbone.embeddings.", "backbone.embedding.")


def assert_same_values(checkpoint: Checkpoint, written: dict[str, torch.Tensor]) -> None:
    written = {plain_name(name): value for name, value in written.items()}
    if checkpoint.spec.tie_embeddings:
        written.pop("lm_head.weight", None)
    assert set(checkpoint.tensors) == set(written)
    for name, tensor in checkpoint.tensors.items():
        value = tensor.load()
        assert tensor.name == name
        assert tensor.shape == tuple(value.shape) == tuple(written[name].shape)
        assert value.dtype == written[name].dtype == getattr(torch, tensor.dtype)
        assert tensor.nbytes == value.numel() * value.element_size()
        assert value.is_contiguous()
        assert torch.equal(value, written[name])


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case: str, tmp_path: Path) -> None:
    path = CASES[case](tmp_path / "model")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format in FORMATS
        assert list(checkpoint.tensors) == list(expected_tensors(checkpoint.spec))
        assert_same_values(checkpoint, read_all(path))
        assert checkpoint.n_parameters == sum(tensor.numel for tensor in checkpoint.tensors.values())
        assert checkpoint.nbytes == sum(tensor.nbytes for tensor in checkpoint.tensors.values())


@pytest.mark.parametrize("container", ["bin", "bin-legacy", "safetensors", "bin-sharded", "safetensors-sharded"])
def test_containers(container: str, tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path, container=container, dtype=torch.float16)
    with open_checkpoint(folder) as checkpoint:
        assert_same_values(checkpoint, read_all(folder))
        assert checkpoint.dtype == "fp16"
        assert [file.suffix for file in checkpoint.files] == [f".{container.split('-')[0]}"] * len(checkpoint.files)
        assert len(checkpoint.files) == (2 if "sharded" in container else 1)


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba", "mamba2"])
@pytest.mark.parametrize("head", [True, False])
def test_transformers_with_and_without_head(model_type: str, head: bool, tmp_path: Path) -> None:
    folder = make_huggingface(tmp_path, model_type, head=head, tie_word_embeddings=True)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.format == "huggingface"
        assert checkpoint.spec.tie_embeddings
        assert_same_values(checkpoint, read_all(folder))


def test_transformers_sharded(tmp_path: Path) -> None:
    folder = make_huggingface(tmp_path, "mamba2", max_shard_size="20KB", dtype=torch.bfloat16)
    with open_checkpoint(folder) as checkpoint:
        assert len(checkpoint.files) > 1
        assert checkpoint.dtype == "bf16"
        assert_same_values(checkpoint, read_all(folder))
    with open_checkpoint(checkpoint.files[0]) as again:
        assert again.files == checkpoint.files, "a shard stands for its checkpoint"


def test_transformers_spec(tmp_path: Path) -> None:
    spec = open_checkpoint(CASES["hf-mamba2-odd"](tmp_path / "m2")).spec
    assert (spec.family, spec.d_inner, spec.nheads, spec.headdim, spec.ngroups) == ("mamba2", 72, 6, 12, 3)
    assert (spec.gated_norm_group_size, spec.gated_norm_eps, spec.norm_eps) == (24, 1e-3, 1e-3)
    assert spec.dt_limit == (0.01, 0.2)
    assert not spec.norm_before_gate and not spec.conv_bias and spec.proj_bias and spec.tie_embeddings
    spec = open_checkpoint(CASES["hf-falcon"](tmp_path / "falcon")).spec
    assert (spec.family, spec.bcdt_norm_eps, spec.dt_rank) == ("mamba1", 1e-4, 2)


def test_hub_shards_without_an_index(tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path, container="safetensors-sharded")
    (folder / "model.safetensors.index.json").unlink()
    with open_checkpoint(folder) as checkpoint:
        assert_same_values(checkpoint, read_all(folder))


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_codestral(prefix: str, tmp_path: Path) -> None:
    folder = make_codestral(tmp_path, prefix=prefix)
    with open_checkpoint(folder) as checkpoint:
        spec = checkpoint.spec
        assert checkpoint.format == "codestral"
        assert (spec.family, spec.d_model, spec.ngroups, spec.headdim, spec.d_state) == ("mamba2", 64, 2, 64, 128)
        assert (spec.d_inner, spec.gated_norm_group_size, spec.vocab_size, spec.padded_vocab_size) == (128, 64, 50, 50)
        assert not spec.tie_embeddings
        assert checkpoint.tensors["lm_head.weight"].source_name == prefix + "lm_head.weight"
        assert checkpoint.config["dim"] == 64


def test_codestral_beside_huggingface_files(tmp_path: Path) -> None:
    """Codestral's own repository holds both; the format can be chosen, and a named file decides."""
    make_codestral(tmp_path, dim=32, head_dim=8, d_state=8)
    make_huggingface(tmp_path, "mamba2")
    assert open_checkpoint(tmp_path).format == "huggingface"
    assert open_checkpoint(tmp_path, format="codestral").format == "codestral"
    assert open_checkpoint(tmp_path / "consolidated.safetensors").format == "codestral"
    assert open_checkpoint(tmp_path / "model.safetensors").format == "huggingface"


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "model."])
def test_bare_wrappers(wrapper: str | None, prefix: str, tmp_path: Path) -> None:
    path = make_bare(tmp_path / "model.pt", wrapper=wrapper, prefix=prefix)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "bare"
        assert checkpoint.config == {} and checkpoint.eos_token_ids == ()
        assert checkpoint.spec.dt_rank == 2
        assert checkpoint.tensors["backbone.norm_f.weight"].source_name == prefix + "backbone.norm_f.weight"


def test_bare_keeps_an_equal_head_tied_and_another_one_not(tmp_path: Path) -> None:
    path = make_bare(tmp_path / "model.pt")
    weights = torch.load(path, weights_only=True)
    weights["lm_head.weight"] = weights["backbone.embedding.weight"].clone()
    torch.save(weights, path)
    assert open_checkpoint(path).spec.tie_embeddings
    weights["lm_head.weight"][-1, -1] += 1
    torch.save(weights, path)
    assert not open_checkpoint(path).spec.tie_embeddings


def test_bare_mamba2_says_what_it_assumes(tmp_path: Path) -> None:
    path = make_bare(tmp_path / "model.safetensors", ssm_cfg={**MAMBA2, "ngroups": 2})
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.spec.ngroups, checkpoint.spec.d_state) == (1, 32)
        assert any("ngroups 1 with d_state 32" in assumption for assumption in checkpoint.assumptions)


def test_a_file_beside_its_config_is_read_with_it(tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path, ssm_cfg={**MAMBA2, "ngroups": 2})
    with open_checkpoint(folder / "pytorch_model.bin") as checkpoint:
        assert checkpoint.format == "state-spaces"
        assert (checkpoint.spec.ngroups, checkpoint.spec.d_state) == (2, 16)
        assert not checkpoint.assumptions
    with open_checkpoint(folder / "pytorch_model.bin", format="bare") as checkpoint:
        assert (checkpoint.spec.ngroups, checkpoint.spec.d_state) == (1, 32)
    write_json(folder / "config.json", {"learning_rate": 1e-3})
    assert open_checkpoint(folder / "pytorch_model.bin").format == "bare", "another program's config is no config"


def test_a_bare_file_in_transformers_naming_without_head(tmp_path: Path) -> None:
    folder = make_huggingface(tmp_path, "mamba", head=False)
    (folder / "config.json").unlink()
    assert open_checkpoint(folder).spec.d_inner == 64
    assert open_checkpoint(folder).format == "bare"


def test_only_the_head_of_a_tied_pair_was_saved(tmp_path: Path) -> None:
    """safetensors cannot hold shared tensors, and some writers keep the head instead of the embedding."""
    folder = make_statespaces(tmp_path, container="safetensors")
    weights = load_file(folder / "model.safetensors")
    del weights["backbone.embedding.weight"]
    save_weights(folder, weights, "safetensors")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tensors["backbone.embedding.weight"].source_name == "lm_head.weight"


def test_old_falcon_checkpoints_may_hold_weights_of_one_for_their_weightless_norms(tmp_path: Path) -> None:
    folder = make_huggingface(tmp_path, "falcon_mamba")
    weights = load_file(folder / "model.safetensors")
    weights["backbone.layers.0.mixer.b_layernorm.weight"] = torch.ones(8)
    weights["backbone.layers.1.mixer.dt_rms"] = torch.ones(64)
    save_weights(folder, weights, "safetensors")
    assert len(open_checkpoint(folder).tensors) == len(weights) - 2
    with pytest.raises(CheckpointError, match="b_layernorm"):  # without a config nothing says how to norm
        open_checkpoint(folder / "model.safetensors", format="bare")


def test_tokenizer_and_end_of_text(tmp_path: Path) -> None:
    folder = make_huggingface(tmp_path, "mamba2", eos_token_id=[2, 7])
    assert open_checkpoint(folder).eos_token_ids == (2, 7)
    assert open_checkpoint(folder).tokenizer is None
    (folder / "tokenizer.json").write_text("{}")
    write_json(folder / "generation_config.json", {"eos_token_id": 5})
    assert open_checkpoint(folder).eos_token_ids == (5,)
    assert open_checkpoint(folder).tokenizer == folder / "tokenizer.json"


def test_sha256_is_over_the_files_and_says_how_far_it_is(tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path, container="safetensors-sharded")
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    content = b"".join(file.read_bytes() for file in files)
    steps: list[int] = []
    checkpoint = open_checkpoint(folder)
    assert checkpoint.sha256(steps.append) == hashlib.sha256(content).hexdigest()
    assert sum(steps) == len(content)
    (folder / "config.json").write_text("changed")
    assert checkpoint.sha256() == hashlib.sha256(content).hexdigest(), "computed once"


@pytest.mark.parametrize("container", ["bin", "safetensors"])
def test_closing(container: str, tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path, container=container)
    with open_checkpoint(folder) as checkpoint:
        kept = checkpoint.tensors["backbone.embedding.weight"].load()
        copy = kept.clone()
    assert torch.equal(kept, copy), "a loaded tensor outlives its checkpoint"
    assert checkpoint.spec.n_layer == 2
    with pytest.raises(ValueError, match="closed"):
        checkpoint.tensors["backbone.embedding.weight"].load()


def test_large_tensors_are_mapped_and_the_file_is_never_written(tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path, d_model=512, vocab_size=1024, n_layer=1, container="safetensors")
    before = (folder / "model.safetensors").read_bytes()
    with open_checkpoint(folder) as checkpoint:
        embedding = checkpoint.tensors["backbone.embedding.weight"]
        assert embedding.nbytes >= 1 << 20
        value = embedding.load()
        assert torch.equal(value, load_file(folder / "model.safetensors")["backbone.embedding.weight"])
        value.zero_()
        assert bool(embedding.load().any())
    assert (folder / "model.safetensors").read_bytes() == before


def test_torch_file_with_the_state_of_an_optimizer(tmp_path: Path) -> None:
    """Its storages repeat the sizes of the model's, whole pages apart, so that one set could be taken for the other."""
    first, weights, last = ({f"w{i}": torch.randn(1024) for i in range(64)} for _ in range(3))
    torch.save({"exp_avg": first, "model": weights, "exp_avg_sq": last}, tmp_path / "model.pt")
    with open_weights([tmp_path / "model.pt"]) as opened:
        assert all(torch.equal(opened.tensors[name].load(), weights[name]) for name in weights)


@pytest.mark.parametrize("container", ["bin", "safetensors"])
def test_pages_go_with_the_tensor(container: str, tmp_path: Path) -> None:
    """Streaming through a checkpoint needs the memory of its largest tensor, not of all."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("needs /proc")
    folder = make_statespaces(tmp_path, d_model=1024, vocab_size=1024, n_layer=4, container=container)

    def resident() -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS"))

    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.nbytes > 100 << 20
        before = resident()
        for tensor in checkpoint.tensors.values():
            tensor.load().sum()
        assert (resident() - before) << 10 < checkpoint.nbytes // 3


def test_safetensors_needs_no_torch_until_values_are_asked_for(tmp_path: Path) -> None:
    folder = make_huggingface(tmp_path, "mamba2")
    script = f"""
import sys
sys.modules["torch"] = None  # any import of torch fails now
sys.modules["safetensors"] = None
from mamba_export.checkpoint import open_checkpoint
from mamba_export.errors import MissingExtraError
checkpoint = open_checkpoint({str(folder)!r})
print(checkpoint.n_parameters, len(checkpoint.tensors), checkpoint.dtype)
try:
    checkpoint.tensors["backbone.norm_f.weight"].load()
except MissingExtraError as error:
    print(error, "|", error.hint, error.exit_code)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=_root())
    first, second = result.stdout.splitlines()
    assert first.endswith(" fp32")
    assert second.startswith("reading a checkpoint needs the package 'torch'")
    assert second.endswith("5")


def _root() -> Path:
    return Path(__file__).parents[2]


def test_paths_of_several_kinds(tmp_path: Path) -> None:
    folder = make_statespaces(tmp_path, container="safetensors-sharded")
    for path in (str(folder), folder, folder / "config.json", folder / "model.safetensors.index.json"):
        assert open_checkpoint(path).format == "state-spaces"


@pytest.mark.parametrize("name", ["mamba1-tiny", "mamba1-small", "mamba2-small"])
def test_shared_checkpoints(name: str) -> None:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"THE TRAINED CHECKPOINT {name} IS NOT THERE; looked in ../shared/checkpoints")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.format == "state-spaces"
        assert checkpoint.dtype == "fp16"
        assert checkpoint.spec.tie_embeddings
        assert checkpoint.tokenizer == folder / "tokenizer.json"
        assert checkpoint.config == json.loads((folder / "config.json").read_text())
        assert checkpoint.spec.padded_vocab_size == numpy.load(folder / "golden.npz")["logits_last64"].shape[-1]
        assert_same_values(checkpoint, read_all(folder))


def test_random_weights_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    spec = open_checkpoint(make_statespaces(tmp_path)).spec
    first, second = random_weights(spec), random_weights(spec)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "backbone.embeddings.weight" in to_huggingface_names(first)
