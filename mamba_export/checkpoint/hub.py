"""Checkpoints from the Hugging Face hub, by id."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from mamba_export.errors import CheckpointError, EnvironmentProblem, MissingExtraError

_HUB_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$")
_FILE_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".onnx", ".json", ".ckpt", ".gguf")
_SMALL = ("config.json", "params.json", "generation_config.json", "tokenizer.json")
_OFFLINE = "check the network, or give a folder on this machine"


def looks_like_hub_id(path: str | Path) -> bool:
    """True for ``org/name``; false for anything that can only be a path."""
    return isinstance(path, str) and bool(_HUB_ID.match(path)) and not path.endswith(_FILE_SUFFIXES)


def wanted_files(names: Iterable[str]) -> list[str]:
    """Of a repository's files, those to download: configs, the tokenizer and one set of weights."""
    names = [name for name in names if "/" not in name]
    small = [name for name in names if name in _SMALL]
    for prefix, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin"), ("consolidated", ".safetensors")):
        weights = [n for n in names if n.startswith(prefix) and n.endswith((suffix, suffix + ".index.json"))]
        if weights:
            return small + weights
    return small + [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth"))]


def download(hub_id: str) -> Path:
    """The folder of a hub repository's snapshot, downloaded unless it is in the cache.

    Raises:
        EnvironmentProblem: no such repository, no permission, or the hub cannot be reached and the cache lacks it.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "export", f"downloading {hub_id}") from error
    try:
        names = huggingface_hub.HfApi().list_repo_files(hub_id)
        wanted = wanted_files(names)
        if not wanted:
            raise CheckpointError(f"the hub repository {hub_id} holds no checkpoint")
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=wanted))
    except GatedRepoError as error:
        raise EnvironmentProblem(
            f"the hub repository {hub_id} asks for permission", "accept its terms on the hub, then log in: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise EnvironmentProblem(
            f"there is no folder '{hub_id}' here and no hub repository of that name", "check the spelling"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:
        reason = error if isinstance(error, HfHubHTTPError) else type(error).__name__
        return _cached(hub_id, f"the hub cannot be reached for {hub_id} ({_first_line(reason)})", error)


def _cached(hub_id: str, message: str, cause: Exception) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, local_files_only=True))
    except Exception:
        raise EnvironmentProblem(f"no folder '{hub_id}' here, and {message}", _OFFLINE) from cause


def _first_line(reason: object) -> str:
    return (str(reason).strip().splitlines() or ["unknown reason"])[0][:160]
