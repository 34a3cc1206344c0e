"""The Transformer of the comparison computes what its torch model computes, in pieces and by steps."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT


@pytest.mark.slow
def test_the_exported_model_is_the_torch_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import transformer

    shape = transformer.Shape(d_model=64, n_layer=3, n_head=4, vocab_size=101, positions=128)
    folder = transformer.export(tmp_path / "gpt", shape)
    model = transformer.Transformer(shape).eval()
    model.load_state_dict(transformer.make_weights(shape))
    for batch, pieces in ((1, (17, 20, 1, 1)), (2, (37, 1, 1, 1))):  # pieces of more than a row: ONNX Runtime has none
        ids = np.random.default_rng(1).integers(0, 101, (batch, 40))
        caches = [torch.zeros(batch, 4, 64, 16) for _ in range(6)]
        runner = transformer.CachedRunner(folder, shape, batch, 64)
        start = 0
        for length in pieces:
            piece, total = ids[:, start : start + length], start + length
            found = runner.run(np.ascontiguousarray(piece), start)
            last = torch.full((batch,), total - 1, dtype=torch.int32)
            with torch.inference_mode():
                wanted, *caches = model(torch.from_numpy(piece), caches, last, torch.tensor(total, dtype=torch.int32))
            np.testing.assert_allclose(found, wanted.numpy(), atol=2e-6)
            start = total
