"""The peer's whole language model: mamba-ssm from its source package, over the extensions that the harness builds."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

from .harness import Context, peer_source


def load_peer_model(ctx: Context) -> Any:
    """The module ``mamba_ssm.models.mixer_seq_simple``; the package around it, which imports more, is left out."""
    for name in ("selective_scan", "causal_conv1d"):
        sys.modules[f"{name}_cuda"] = ctx.peer(name)
    sys.path.insert(0, str(peer_source(ctx.sources, "causal_conv1d")))
    root = peer_source(ctx.sources, "mamba_ssm") / "mamba_ssm"
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [str(root)]
    sys.modules["mamba_ssm"] = package
    return importlib.import_module("mamba_ssm.models.mixer_seq_simple")


def make_peer(ctx: Context, d_model: int, n_layer: int, vocab_size: int, layer: str, dtype: Any) -> Any:
    """A model of random weights, as the peer initializes them, on the GPU."""
    import torch

    module = load_peer_model(ctx)
    config = importlib.import_module("mamba_ssm.models.config_mamba").MambaConfig(
        d_model=d_model, n_layer=n_layer, vocab_size=vocab_size, ssm_cfg={"layer": layer}
    )
    torch.manual_seed(0)
    return module.MambaLMHeadModel(config, device="cuda", dtype=dtype).eval()


def graph_of(model: Any, max_length: int) -> Any:
    """Its own CUDA graph of one step at batch 1: ``run(input_ids, position_ids, seqlen)`` gives the logits."""
    generation = importlib.import_module("mamba_ssm.utils.generation")
    cache = generation.update_graph_cache(model, None, 1, 1, max_length)
    return cache.run
