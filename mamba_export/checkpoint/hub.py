"""Checkpoints from the Hugging Face hub, by id."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from mamba_export.errors import CheckpointError, EnvironmentProblem, MissingExtraError

_HUB_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$")
_FILE_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".onnx", ".json", ".ckpt", ".gguf")
_SMALL = ("config.json", "params.json", "generation_config.json", "tokenizer.json")
_TIMEOUT = 10.0  # seconds to wait for the list of files
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
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "export", f"downloading {hub_id}") from error
    try:
        siblings = huggingface_hub.HfApi().model_info(hub_id, timeout=_TIMEOUT).siblings or []
        wanted = wanted_files(file.rfilename for file in siblings)
        if not wanted:
            raise CheckpointError(f"the hub repository {hub_id} holds no checkpoint", "look at its list of files")
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=wanted))
    except CheckpointError:
        raise
    except GatedRepoError as error:
        raise EnvironmentProblem(
            f"the hub repository {hub_id} asks for permission",
            "accept its terms on the hub, then log in: hf auth login",
        ) from error
    except RepositoryNotFoundError as error:
        raise EnvironmentProblem(
            f"there is no folder '{hub_id}' here and no hub repository of that name", "check the spelling"
        ) from error
    except Exception as error:  # each version of the client raises its own kind
        cached = _cached(hub_id)
        if cached is not None:
            return cached
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise EnvironmentProblem(
            f"there is no folder '{hub_id}' here, and the hub cannot be reached: {reason}", _OFFLINE
        ) from error


def _cached(hub_id: str) -> Path | None:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, local_files_only=True))
    except (OSError, ValueError):
        return None
