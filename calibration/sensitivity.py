"""How much the model's predictions suffer from an error in a linear layer: Fisher information, factor by factor.

The KL divergence between the predictions of the model and of one whose weight W is off by E is, to second order and a
token, ``½ E[(gᵀ E x)²]`` with x the layer's input and g the gradient at its output of the log probability of a token
that the model itself draws. A Kronecker product stands for that: ``½ tr(G E H Eᵀ) / trace`` with ``G = Σ |x|² g gᵀ``
and ``H = Σ |g|² x xᵀ`` (Tseng et al. 2025, YAQA, sketch A). This pass makes G, and the weights |g|² of H, whose inputs
come later, from the quantized blocks before.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_export.models.lm import MambaLM
from mamba_export.progress import Progress, silent
from mamba_export.states import state_table

from .scans import fast_scans

ROWS = 1024
"""Rows of a diagonal block of G, at most: errors of rows further apart are taken as independent."""
_TOKENS = 2048


@dataclass
class Sensitivity:
    """Of one linear layer.

    Attributes:
        blocks: diagonal blocks of G, float32 [r, r], that cover the rows in order.
        tokens: float32 [windows, length], |g|² of every calibration token, 1 on average.
        scale: ``scale * tr(G E H Eᵀ)`` is the divergence in nats a token, with H weighted by ``tokens``.
    """

    blocks: list[Tensor] = field(default_factory=list)
    tokens: Tensor = field(default_factory=lambda: torch.zeros(0))
    scale: float = 0.0

    def divergence(self, error: Tensor, hessian: Tensor) -> float:
        """What an error [rows, columns] costs, in nats a token; ``hessian`` [columns, columns] weighted as above."""
        parts = error.split([len(block) for block in self.blocks])
        pairs = zip(self.blocks, parts, strict=True)
        return self.scale * sum(float(((g.to(part) @ part @ hessian) * part).sum()) for g, part in pairs)


class _Sums:
    """Sums over the batches so far, of one layer."""

    def __init__(self, rows: int, device: torch.device) -> None:
        count = -(-rows // ROWS)
        sizes = [rows // count + (i < rows % count) for i in range(count)]
        self.blocks = [torch.zeros(size, size, device=device) for size in sizes]
        self.tokens: list[Tensor] = []
        self.trace = 0.0

    def add(self, x: Tensor, g: Tensor) -> None:
        """Inputs [B, L, columns] and output gradients [B, L, rows]."""
        squares, weights = x.square().sum(-1), g.square().sum(-1)
        self.tokens.append(weights.cpu())
        self.trace += float((squares * weights).sum())
        flat = g.flatten(0, 1)
        scaled = flat * squares.flatten()[:, None]
        sizes = [len(block) for block in self.blocks]
        for block, left, right in zip(self.blocks, scaled.split(sizes, 1), flat.split(sizes, 1), strict=True):
            block.addmm_(left.T, right)

    def result(self) -> Sensitivity:
        tokens = torch.cat(self.tokens)
        mean = float(tokens.mean())
        if not mean > 0 or not self.trace > 0:
            return Sensitivity(self.blocks, torch.ones_like(tokens), 0.0)
        # Σ over tokens ≈ G ⊗ H / trace with H weighted by |g|² itself; here H is weighted by |g|² / mean.
        return Sensitivity(self.blocks, tokens / mean, 0.5 * mean / (self.trace * tokens.numel()))


def measure_sensitivity(model: MambaLM, ids: Tensor, progress: Progress = silent) -> dict[str, Sensitivity]:
    """Sensitivities of the linear layers of all blocks, by module path; those that are not called are left out.

    Blocks are run again for their gradients, so that the activations of only one are held at a time.

    Args:
        model: with the checkpoint's weights.
        ids: int64 [windows, length].
        progress: gets told what is being done.
    """
    device = model.backbone.embedding.weight.device
    sums: dict[str, _Sums] = {}
    inputs: dict[str, Tensor] = {}
    handles = [handle for name, module in _linears(model) for handle in _hooks(name, module, inputs, sums)]
    generator = torch.Generator(device=device).manual_seed(0)
    rows = max(1, _TOKENS // ids.shape[1])
    try:
        # Gradients flow to activations alone: parameters need none.
        with torch.enable_grad(), fast_scans(), progress.stage("sensitivity", total=ids.shape[0]) as tick:
            for part in ids.split(rows):
                _pass(model, part.to(device), generator)
                tick(part.shape[0])
    finally:
        for handle in handles:
            handle.remove()
    return {name: found.result() for name, found in sums.items()}


def _linears(model: MambaLM) -> list[tuple[str, nn.Linear]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("backbone.layers.")
    ]


def _hooks(name: str, module: nn.Linear, inputs: dict[str, Tensor], sums: dict[str, _Sums]):  # type: ignore[no-untyped-def]
    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[name] = args[0].detach()

    def after(layer: nn.Module, _: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...]) -> None:
        if grads[0] is not None:
            if name not in sums:
                sums[name] = _Sums(module.out_features, grads[0].device)
            sums[name].add(inputs.pop(name), grads[0])

    yield module.register_forward_pre_hook(before)
    yield module.register_full_backward_hook(after)


def _pass(model: MambaLM, ids: Tensor, generator: torch.Generator) -> None:
    """One batch: forward, tokens drawn from the predictions, and backward block by block."""
    layers = model.backbone.layers
    table = state_table(model.spec, "fp32")
    states = [torch.zeros(ids.shape[0], *s.shape, device=ids.device) for s in table]
    with torch.no_grad():
        entries: list[tuple[Tensor, Tensor | None]] = [(model.backbone.embedding(ids), None)]
        for i, layer in enumerate(layers):
            x, residual, *_ = layer(*entries[-1], states[2 * i], states[2 * i + 1], None)
            entries.append((x, residual))
    x, residual = _leaves(entries.pop())
    logits = model.lm_head(model.backbone.norm_f(x, residual)[0]).flatten(0, 1)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    F.cross_entropy(logits, drawn, reduction="sum").backward()
    grads = [x.grad, None if residual is None else residual.grad]
    for i in reversed(range(len(layers))):
        x, residual = _leaves(entries.pop())
        outputs = layers[i](x, residual, states[2 * i], states[2 * i + 1], None)[:2]
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
        torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
        grads = [x.grad, None if residual is None else residual.grad]


def _leaves(entry: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    x, residual = (None if t is None else t.detach().requires_grad_() for t in entry)
    assert x is not None
    return x, residual
