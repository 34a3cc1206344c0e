"""Find out what a path is, and open it with the reader of its format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba_export.checkpoint import bare, codestral, huggingface, statespaces
from mamba_export.checkpoint.base import FORMATS, Checkpoint
from mamba_export.checkpoint.config import read_json
from mamba_export.checkpoint.hub import download, looks_like_hub_id
from mamba_export.checkpoint.layout import account, canonical, common_prefix
from mamba_export.checkpoint.storage import (
    WEIGHT_SUFFIXES,
    Weights,
    complete_shards,
    open_index,
    open_weights,
)
from mamba_export.errors import CheckpointError, MambaExportError, UnsupportedError, UsageError
from mamba_export.spec import ModelSpec

CONFIG = "config.json"
PARAMS = "params.json"
_CONFIG_NAMES = {"state-spaces": CONFIG, "huggingface": CONFIG, "codestral": PARAMS, "bare": None}
_CODESTRAL_KEYS = {"dim", "n_layers"}
_WEIGHT_NAMES = {
    "codestral": ("consolidated.safetensors", "consolidated.safetensors.index.json"),
    "other": (
        *("model.safetensors", "model.safetensors.index.json"),
        *("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ),
}
_SUPPORTED = "supported: folders of state-spaces, Hugging Face or Codestral Mamba, or a .pt, .bin or .safetensors file"


@dataclass(frozen=True)
class Source:
    """What was found: a format, its config and where the weights lie."""

    path: Path
    folder: Path
    format: str
    config: dict[str, Any]
    config_path: Path | None
    file: Path | None
    """The weight file that was named, None when the folder decides."""


def open_checkpoint(path: str | Path, format: str | None = None) -> Checkpoint:
    """Open a checkpoint. Nothing but headers and configs is read here.

    Args:
        path: a folder, a ``.pt``/``.pth``/``.bin``/``.safetensors`` file, or a hub id such as
            ``state-spaces/mamba-130m``.
        format: one of :data:`FORMATS`; detected when None.

    Raises:
        UsageError: no such path, or an unknown format.
        CheckpointError: damaged, incomplete or contradicting itself.
        UnsupportedError: sound, but of a kind this version does not export.
        EnvironmentProblem: the hub cannot be reached, or a package is missing.
    """
    if format is not None and format not in FORMATS:
        raise UsageError(f"unknown checkpoint format '{format}'", f"formats: {', '.join(FORMATS)}")
    if not str(path):
        raise UsageError("the path of the checkpoint is empty", "give a folder, a weight file or a hub id (org/name)")
    place = Path(path).expanduser()
    try:
        exists = place.exists()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    if not exists:
        if not looks_like_hub_id(path):
            raise UsageError(f"no such file or folder: {path}", "give a folder, a weight file or a hub id (org/name)")
        place = download(str(path))
    return _open(detect(place, format))


def _open(source: Source) -> Checkpoint:
    assumptions: list[str] = []
    spec = _spec(source, assumptions)  # first, so that an unsupported model is named before its weights are touched
    weights = _weights(source)
    try:
        return _read(source, spec, weights, assumptions)
    except BaseException:
        weights.close()
        raise


def _spec(source: Source, assumptions: list[str]) -> ModelSpec | None:
    if source.config_path is None:
        return None
    where = source.config_path.name
    if source.format == "state-spaces":
        return statespaces.spec_from_config(source.config, where)
    if source.format == "codestral":
        return codestral.spec_from_params(source.config, where)
    return huggingface.spec_from_config(source.config, where, assumptions)


def _read(source: Source, spec: ModelSpec | None, weights: Weights, assumptions: list[str]) -> Checkpoint:
    described_by = source.config_path.name if source.config_path else weights.where
    if source.format in ("state-spaces", "codestral"):
        found = canonical(weights)
    else:
        found = canonical(weights, huggingface.rename)
    if source.format == "huggingface":
        found = huggingface.drop_weightless(found)
    if spec is None:
        spec = bare.spec_from_shapes(found, weights.where, assumptions)
    prefix = common_prefix(weights.tensors)
    spell = huggingface.spell if source.format == "huggingface" else str
    tensors = account(spec, found, weights.where, described_by, lambda name: prefix + spell(name))
    tokenizer = source.folder / "tokenizer.json"
    return Checkpoint(
        path=source.path,
        format=source.format,
        spec=spec,
        tensors=tensors,
        weights=weights,
        config=source.config,
        config_path=source.config_path,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        eos_token_ids=_eos_token_ids(source),
        assumptions=assumptions,
    )


def detect(path: Path, format: str | None = None) -> Source:
    """The format of a folder or file, its config and its weight file.

    Raises:
        UsageError: ``path`` is a bundle.
        CheckpointError: there is no checkpoint here.
    """
    folder, file = (path, None) if path.is_dir() else (path.parent, path)
    if file is None:
        _refuse_others(folder)
    elif file.name == CONFIG or file.name == PARAMS or file.name.endswith(".index.json"):
        folder, file = path.parent, None
    elif _shard_of_index(file):
        file = None
    found = _format(folder, file) if format is None else (format, _CONFIG_NAMES[format])
    return _source(path, folder, *found, file)


def _source(path: Path, folder: Path, format: str, config_name: str | None, file: Path | None) -> Source:
    if config_name is None:
        return Source(path, folder, format, {}, None, file)
    config_path = folder / config_name
    if not config_path.is_file():
        raise CheckpointError(
            f"{folder} has no {config_name}, which a {format} checkpoint needs", f"formats: {', '.join(FORMATS)}"
        )
    return Source(path, folder, format, read_json(config_path), config_path, file)


def _format(folder: Path, file: Path | None) -> tuple[str, str | None]:
    """The format, and the name of the config that says so."""
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    params = read_json(folder / PARAMS) if (folder / PARAMS).is_file() else {}
    if _CODESTRAL_KEYS.issubset(params):
        consolidated = file.name in _WEIGHT_NAMES["codestral"] if file else bool(_first(folder, "codestral"))
        # Codestral's repository holds the Hugging Face files as well; a folder with both is read as those.
        if not config or (consolidated and (file or not _first(folder, "other"))):
            return "codestral", PARAMS
    if _CODESTRAL_KEYS.issubset(config):
        return "codestral", CONFIG
    if "hidden_size" in config or ("model_type" in config and not {"d_model", "n_layer"} <= set(config)):
        return "huggingface", CONFIG
    if {"d_model", "n_layer", "ssm_cfg"} & set(config):
        return "state-spaces", CONFIG
    if file is None and (folder / CONFIG).is_file():
        raise UnsupportedError(f"{folder / CONFIG} is not the config of a model known here", _SUPPORTED)
    if file is None and (folder / PARAMS).is_file():
        raise UnsupportedError(f"{folder / PARAMS} is not the config of a model known here", _SUPPORTED)
    return "bare", None


def _first(folder: Path, kind: str) -> Path | None:
    return next((folder / name for name in _WEIGHT_NAMES[kind] if (folder / name).is_file()), None)


def _shard_of_index(file: Path) -> bool:
    for index in file.parent.glob("*.index.json"):
        try:
            listed = read_json(index).get("weight_map")
        except MambaExportError:
            continue
        if isinstance(listed, dict) and file.name in listed.values():
            return True
    return False


def _weights(source: Source) -> Weights:
    if source.file is not None:
        return open_weights([source.file])
    folder = source.folder
    named = _first(folder, "codestral" if source.format == "codestral" else "other")
    if named is not None:
        return open_index(named) if named.name.endswith(".index.json") else open_weights([named])
    candidates = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES and path.is_file())
    candidates = [path for path in candidates if path.name not in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
    safe = [path for path in candidates if path.suffix == ".safetensors"]
    for group in (safe, candidates):
        shards = complete_shards(group)
        if shards:
            return open_weights(shards)
        if len(group) == 1:
            return open_weights(group)
    if not candidates:
        raise CheckpointError(f"{folder} holds no weights", f"expected one of: {', '.join(_WEIGHT_NAMES['other'])}")
    raise CheckpointError(
        f"{folder} holds {len(candidates)} weight files: {', '.join(path.name for path in candidates[:4])}",
        "name the file instead of the folder",
    )


def _refuse_others(folder: Path) -> None:
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise UsageError(f"cannot read {folder}: {error.strerror or error}") from error
    if not names:
        raise CheckpointError(f"{folder} is an empty folder", _SUPPORTED)
    if "manifest.json" in names and "prefill.onnx" in names:
        raise UsageError(f"{folder} is a bundle, not a checkpoint", "give the checkpoint it was exported from")
    if "adapter_config.json" in names and CONFIG not in names:
        raise UnsupportedError(f"{folder} holds an adapter (LoRA), not a model", "merge it into its base model first")
    if any(name.endswith(".distcp") or name.startswith("mp_rank_") for name in names):
        raise UnsupportedError(f"{folder} holds a tensor-parallel or distributed checkpoint", "merge it into one first")
    if not any(name in (CONFIG, PARAMS) or name.endswith(WEIGHT_SUFFIXES) for name in names):
        if any(name.endswith(".gguf") for name in names):
            raise UnsupportedError(f"{folder} holds a GGUF file", "export from the original checkpoint instead")
        raise CheckpointError(f"{folder} holds neither a config nor weights", _SUPPORTED)


def _eos_token_ids(source: Source) -> tuple[int, ...]:
    generation = source.folder / "generation_config.json"
    configs = [source.config]
    if source.format != "bare" and generation.is_file():
        configs.insert(0, read_json(generation))
    for config in configs:
        value = config.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if ids and all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            return tuple(ids)
    return ()
