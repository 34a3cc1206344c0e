"""Hub ids: recognized, downloaded sparingly, and every failure explained. No test touches the network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from mamba_export.checkpoint import open_checkpoint
from mamba_export.checkpoint.hub import looks_like_hub_id, wanted_files
from mamba_export.errors import CheckpointError, EnvironmentProblem, MissingExtraError, UsageError
from tests.make_checkpoints import make_statespaces

ID = "someone/mamba-of-theirs"


@pytest.mark.parametrize("path", ["state-spaces/mamba-130m", "a/b", "tiiuae/falcon-mamba-7b", "x_y/m.0"])
def test_hub_ids(path: str) -> None:
    assert looks_like_hub_id(path)


@pytest.mark.parametrize(
    "path", ["a", "/a/b", "./a/b", "a/b/c", "../a", "a/model.pt", "a/x.safetensors", "~/a", "a b/c"]
)
def test_paths_that_are_no_hub_ids(path: str) -> None:
    assert not looks_like_hub_id(path)
    assert not looks_like_hub_id(Path(path))


def test_only_one_set_of_weights_is_downloaded() -> None:
    small = ["config.json", "tokenizer.json", "generation_config.json"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    others = ["README.md", "pytorch_model.bin", "onnx/model.onnx", "training_args.bin", "consolidated.safetensors"]
    assert sorted(wanted_files([*small, *shards, *others])) == sorted([*small, *shards])
    assert wanted_files(["config.json", "pytorch_model.bin", "x.md"]) == ["config.json", "pytorch_model.bin"]
    assert wanted_files(["params.json", "consolidated.safetensors"]) == ["params.json", "consolidated.safetensors"]
    assert wanted_files(["README.md"]) == []


class Hub:
    """Stands in for the hub: a list of files, a folder to hand out, or errors to raise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.folder: Path | None = None
        self.error: Exception | None = None
        self.patterns: Any = None
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=self._info))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self._download)

    def _info(self, repo_id: str, timeout: float) -> Any:
        assert repo_id == ID and timeout < 60
        if self.error:
            raise self.error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names])

    def _download(self, repo_id: str, *, allow_patterns: Any = None, local_files_only: bool = False) -> str:
        self.patterns = allow_patterns
        if self.folder is None:
            raise LocalEntryNotFoundError("not in the cache")
        return str(self.folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    monkeypatch.chdir(tmp_path)
    return Hub(monkeypatch)


def test_download(hub: Hub, tmp_path: Path) -> None:
    hub.folder = make_statespaces(tmp_path / "snapshot")
    hub.names = ["config.json", "pytorch_model.bin", "README.md"]
    with open_checkpoint(ID) as checkpoint:
        assert checkpoint.format == "state-spaces"
        assert checkpoint.path == hub.folder
    assert hub.patterns == ["config.json", "pytorch_model.bin"]


def test_a_folder_of_that_name_comes_first(hub: Hub, tmp_path: Path) -> None:
    make_statespaces(tmp_path / ID)
    hub.error = AssertionError("the hub was asked")
    assert open_checkpoint(ID).format == "state-spaces"


def test_the_cache_serves_without_a_network(hub: Hub, tmp_path: Path) -> None:
    hub.error = ConnectionError("offline")
    hub.folder = make_statespaces(tmp_path / "snapshot")
    assert open_checkpoint(ID).format == "state-spaces"


def test_no_network(hub: Hub) -> None:
    hub.error = ConnectionError("Name or service not known\nmany\nlines")
    with pytest.raises(EnvironmentProblem) as caught:
        open_checkpoint(ID)
    assert str(caught.value).endswith("the hub cannot be reached: Name or service not known")
    assert caught.value.exit_code == 5 and caught.value.hint


def test_no_such_repository(hub: Hub) -> None:
    hub.error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    with pytest.raises(EnvironmentProblem, match="no hub repository of that name"):
        open_checkpoint(ID)


def test_repository_without_a_checkpoint(hub: Hub) -> None:
    hub.names = ["README.md"]
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(ID)


def test_without_the_client(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match="huggingface_hub"):
        open_checkpoint(ID)


def test_a_missing_path_with_a_slash_is_not_asked_for(hub: Hub) -> None:
    hub.error = AssertionError("the hub was asked")
    with pytest.raises(UsageError):
        open_checkpoint("./someone/mamba")
    with pytest.raises(UsageError):
        open_checkpoint("models/mamba.safetensors")
