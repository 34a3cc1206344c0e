"""Which tensors a model has, and the strict accounting: nothing missing, nothing left over, nothing misshapen."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mamba_export.checkpoint.storage import WEIGHT_DTYPES, LazyTensor, Weights
from mamba_export.errors import CheckpointError, UnsupportedError
from mamba_export.spec import ModelSpec

EMBEDDING = "backbone.embedding.weight"
HEAD = "lm_head.weight"

_PREFIXES = ("module.", "_orig_mod.", "model.", "_forward_module.")


def expected_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every tensor of the model, in model order.

    The head is listed only when it is not tied to the embedding. This is the one truth of the accounting.
    """
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.padded_vocab_size, spec.d_model)}
    for i in range(spec.n_layer):
        layer = f"backbone.layers.{i}."
        shapes.update(_norm(spec, layer + "norm"))
        shapes.update({f"{layer}mixer.{name}": shape for name, shape in _mixer(spec).items()})
        if spec.d_intermediate:
            shapes.update(_norm(spec, layer + "norm2"))
            shapes[layer + "mlp.fc1.weight"] = (2 * spec.d_intermediate, spec.d_model)
            shapes[layer + "mlp.fc2.weight"] = (spec.d_model, spec.d_intermediate)
    shapes.update(_norm(spec, "backbone.norm_f"))
    if not spec.tie_embeddings:
        shapes[HEAD] = (spec.padded_vocab_size, spec.d_model)
    return shapes


def _norm(spec: ModelSpec, name: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (spec.d_model,)}
    if spec.norm == "layer":
        shapes[f"{name}.bias"] = (spec.d_model,)
    return shapes


def _mixer(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"in_proj.weight": (spec.d_in_proj, spec.d_model)}
    if spec.proj_bias:
        shapes["in_proj.bias"] = (spec.d_in_proj,)
    shapes["conv1d.weight"] = (spec.conv_dim, 1, spec.d_conv)
    if spec.conv_bias:
        shapes["conv1d.bias"] = (spec.conv_dim,)
    if spec.family == "mamba1":
        shapes["x_proj.weight"] = (spec.dt_rank + 2 * spec.d_state, spec.d_inner)
        shapes["dt_proj.weight"] = (spec.d_inner, spec.dt_rank)
        shapes["dt_proj.bias"] = (spec.d_inner,)
        shapes["A_log"] = (spec.d_inner, spec.d_state)
        shapes["D"] = (spec.d_inner,)
    else:
        shapes["dt_bias"] = (spec.nheads,)
        shapes["A_log"] = (spec.nheads,)
        shapes["D"] = (spec.d_ssm if spec.D_has_hdim else spec.nheads,)
        if spec.gated_norm:
            shapes["norm.weight"] = (spec.d_ssm,)
    shapes["out_proj.weight"] = (spec.d_model, spec.d_inner)
    if spec.proj_bias:
        shapes["out_proj.bias"] = (spec.d_model,)
    return shapes


def common_prefix(names: Iterable[str]) -> str:
    """The wrappers' prefix that all names share: ``module.``, ``model.``, ``_orig_mod.`` or several of them."""
    names = list(names)
    prefix = ""
    while names:
        for piece in _PREFIXES:
            if all(name.startswith(prefix + piece) for name in names):
                prefix += piece
                break
        else:
            return prefix
    return prefix


def canonical(weights: Weights, rename: Callable[[str], str] = str) -> dict[str, LazyTensor]:
    """All tensors under canonical names: the shared prefix of wrappers dropped, then ``rename`` applied."""
    prefix = common_prefix(weights.tensors)
    result: dict[str, LazyTensor] = {}
    for source, tensor in weights.tensors.items():
        name = rename(source[len(prefix) :])
        if name in result:
            raise CheckpointError(
                f"tensors '{result[name].source_name}' and '{source}' of {weights.where} are both '{name}'"
            )
        result[name] = tensor.renamed(name)
    return result


def account(
    spec: ModelSpec,
    found: dict[str, LazyTensor],
    where: str,
    described_by: str,
    spell: Callable[[str], str] = str,
) -> dict[str, LazyTensor]:
    """The tensors of the model in model order, each checked against :func:`expected_tensors`.

    Args:
        spec: what the config says.
        found: canonical names to tensors, as read.
        where: the weight file or index, for messages.
        described_by: where the spec comes from, for messages.
        spell: turns a canonical name into the name the file would use, for messages.

    Raises:
        CheckpointError: a tensor is missing, left over or misshapen, or a tied head differs from the embedding.
        UnsupportedError: a tensor has a dtype that is no float.
    """
    found = dict(found)
    if spec.tie_embeddings:
        found = _untwin(found)
    expected = expected_tensors(spec)
    for name, shape in expected.items():
        tensor = found.get(name)
        if tensor is None:
            missing = [other for other in expected if other not in found]
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(
                f"tensor '{spell(name)}' {list(shape)} is missing from {where}{more}",
                _missing_hint(name, described_by),
            )
        if tensor.shape != shape:
            raise CheckpointError(
                f"tensor '{tensor.source_name}' in {tensor.file.name} has shape {list(tensor.shape)}, "
                f"expected {list(shape)} by {described_by}",
                "the tensors of the file contradict each other"
                if described_by == where
                else f"the weights and {described_by} do not belong together",
            )
        if tensor.dtype not in WEIGHT_DTYPES:
            raise UnsupportedError(
                f"tensor '{tensor.source_name}' in {tensor.file.name} has dtype {tensor.dtype}",
                f"supported: {', '.join(WEIGHT_DTYPES)}; quantized checkpoints are not read",
            )
    left = [tensor for name, tensor in found.items() if name not in expected]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise CheckpointError(
            f"tensor '{left[0].source_name}' {list(left[0].shape)} in {left[0].file.name}{more} "
            f"has no place in the model that {described_by} describes",
            "a tensor that is not used would change the result silently; check the config's options",
        )
    return {name: found[name] for name in expected}


def _missing_hint(name: str, described_by: str) -> str:
    if name == HEAD:
        return "this is a model without a language-model head and without tied embeddings"
    return f"the checkpoint is incomplete, or {described_by} describes another model"


def _untwin(found: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Drop a tied head that repeats the embedding; take it as the embedding when only the head was saved."""
    head, embedding = found.get(HEAD), found.get(EMBEDDING)
    if head is None:
        return found
    del found[HEAD]
    if embedding is None:
        found[EMBEDDING] = head.renamed(EMBEDDING)
    elif not same_values(head, embedding):
        raise CheckpointError(
            f"the config ties the head to the embedding, but tensor '{head.source_name}' {list(head.shape)} in "
            f"{head.file.name} differs from '{embedding.source_name}' {list(embedding.shape)}",
            "if the model was trained with a separate head, say so in the config (tie_embeddings, tie_word_embeddings)",
        )
    return found


def same_values(a: LazyTensor, b: LazyTensor) -> bool:
    """True when both tensors hold the same bytes. Reads them only when they do not share their storage."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.storage_key and a.storage_key == b.storage_key:
        return True
    if not a.shape:
        return bool(a.load() == b.load())
    import torch

    left, right = a.load(), b.load()
    rows = max(1, (16 << 20) // max(1, a.nbytes // max(1, a.shape[0])))
    return all(
        torch.equal(left[i : i + rows].view(torch.uint8), right[i : i + rows].view(torch.uint8))
        for i in range(0, a.shape[0], rows)
    )
