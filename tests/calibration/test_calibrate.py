"""Calibration: data in three forms, provenance, resuming, and memory that does not grow with the data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mamba_export.calibration import collect
from mamba_export.calibration.statistics import load_statistics

from mamba_export import calibrate
from mamba_export.checkpoint import open_checkpoint
from mamba_export.errors import OutputExistsError, UsageError


def test_the_statistics_are_those_of_the_torch_model(
    tiny_checkpoint: Path, token_file: Path, statistics_file: Path
) -> None:
    from mamba_export.models.weights import load_model
    from mamba_export.states import state_table

    stats = load_statistics(statistics_file)
    with open_checkpoint(tiny_checkpoint) as checkpoint:
        model = load_model(checkpoint)
        seen: list[torch.Tensor] = []
        layer = model.get_submodule("backbone.layers.3.mixer.out_proj")
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        states = [torch.zeros(8, *s.shape) for s in state_table(checkpoint.spec, "fp32")]
        with torch.inference_mode():
            model(stats.ids, states)
        assert stats.provenance["checkpoint_sha256"] == checkpoint.sha256()
    observer = stats.inputs["backbone.layers.3.mixer.out_proj"]
    assert observer.tokens == 8 * 128
    torch.testing.assert_close(observer.peak, seen[0].abs().amax((0, 1)), rtol=1e-3, atol=1e-4)
    assert len(stats.inputs) == 3 * 6 + 1 and len(stats.states) == 6
    assert stats.provenance["data"] == "tokens.bin" and stats.provenance["windows"] == 8


def test_token_files_arrays_and_text_give_the_same(tiny_checkpoint: Path, token_file: Path, tmp_path: Path) -> None:
    from mamba_export.tokens import load_tokenizer

    ids = np.fromfile(token_file, "<u2")[:256].astype(np.int64)
    np.save(tmp_path / "ids.npy", ids)
    text = load_tokenizer(tiny_checkpoint / "tokenizer.json").decode(ids.tolist())
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    found = [
        calibrate(tiny_checkpoint, data, tmp_path / f"{i}.safetensors", windows=2, length=64)
        for i, data in enumerate((ids, tmp_path / "ids.npy", tmp_path / "text.txt"))
    ]
    assert all(torch.equal(f.ids, found[0].ids) for f in found)


def test_an_interrupted_calibration_continues(
    tiny_checkpoint: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = calibrate(tiny_checkpoint, token_file, tmp_path / "whole", windows=6, length=64)
    monkeypatch.setattr(collect, "_TOKENS", 64)
    monkeypatch.setattr(collect, "_SAVE_EVERY", 1)
    run, calls = collect.run, 0

    def interrupted(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return run(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(collect, "run", interrupted)
    out = tmp_path / "calib.safetensors"
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_checkpoint, token_file, out, windows=6, length=64)
    assert not out.exists() and (tmp_path / ".calib.safetensors.partial").exists()
    calls = 100
    again = calibrate(tiny_checkpoint, token_file, out, windows=6, length=64)
    assert calls == 100 + 3  # three windows were done
    assert not (tmp_path / ".calib.safetensors.partial").exists()
    for name, observer in whole.inputs.items():
        assert again.inputs[name].tokens == observer.tokens
        torch.testing.assert_close(again.inputs[name].squares, observer.squares, rtol=1e-4, atol=1e-6)


def test_an_existing_file_is_kept(tiny_checkpoint: Path, token_file: Path, statistics_file: Path) -> None:
    with pytest.raises(OutputExistsError):
        calibrate(tiny_checkpoint, token_file, statistics_file)


@pytest.mark.parametrize("values", ["zero", "nan"])
def test_activations_that_say_nothing_are_refused(
    tiny_checkpoint: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: str
) -> None:
    load = collect.load_model

    def damaged(*args: object, **kwargs: object) -> object:
        model = load(*args, **kwargs)  # type: ignore[arg-type]
        weight = model.get_parameter("backbone.layers.2.norm.weight")
        weight.data = torch.full_like(weight, 0.0 if values == "zero" else torch.nan)
        return model

    monkeypatch.setattr(collect, "load_model", damaged)
    said = "is zero on all" if values == "zero" else "is not finite"
    with pytest.raises(UsageError, match=rf"layers.2.mixer.in_proj {said}"):
        calibrate(tiny_checkpoint, token_file, tmp_path / "calib", windows=2, length=64)
    assert list(tmp_path.iterdir()) == []


def test_the_memory_of_the_statistics_does_not_depend_on_the_data(
    tiny_checkpoint: Path, token_file: Path, tmp_path: Path
) -> None:
    sizes = []
    for windows in (1, 8):
        stats = calibrate(tiny_checkpoint, token_file, tmp_path / str(windows), windows=windows, length=64)
        sizes.append((tmp_path / str(windows)).stat().st_size - stats.ids.numel() * 4)
    assert abs(sizes[0] - sizes[1]) < 2000
    assert json.loads(json.dumps(stats.provenance))["windows"] == 8
