"""Whether a fused step can hold what a recipe makes: found out before anything is rounded."""

from __future__ import annotations

from mamba_export.kernels.library import KernelError
from mamba_export.kernels.packed_weights import common_format, format_for, told_apart, width_step

from mamba_export.errors import UsageError
from mamba_export.fused_step import unsupported
from mamba_export.spec import ModelSpec

from .recipes import LAYERS, Recipe, Weights
from .rounding import group_of

_INSTEAD = "use a recipe like w8a16 or w4a16, or leave --fuse-step out"


def check_fused(recipe: Recipe, spec: ModelSpec, dtype: str) -> None:
    """Nothing, or the first thing that keeps a fused step from being what the recipe's unfused step is.

    Args:
        recipe: as it is for targets that keep plugin nodes.
        spec: of the checkpoint.
        dtype: of the bundle.

    Raises:
        UsageError: naming what a fused step has no place for.
    """
    reason = unsupported(spec)
    if reason is not None:
        raise UsageError(f"--fuse-step does not cover models with {reason}", "export without --fuse-step")
    if recipe.state != "fp32":
        raise UsageError(f"a fused step has no {recipe.state} state", "leave --state (the recipe's state) at fp32")
    _check_layers(recipe, spec)
    schemes = _packable(recipe, spec)
    floats = [name for name, (scheme, _) in schemes.items() if scheme.type == "float"]
    if len(floats) == len(schemes):
        return
    if floats:
        other = next(name for name in schemes if name not in floats)
        raise UsageError(
            f"a fused step takes all of its matrices quantized or none: {floats[0]} is float, {other} is not", _INSTEAD
        )
    _check_formats(recipe, schemes)
    if dtype == "fp32":
        raise UsageError("a fused step of integer weights has no fp32", "use --dtype fp16 or bf16")


def _check_layers(recipe: Recipe, spec: ModelSpec) -> None:
    """What happens to inputs is nothing that the node does."""
    for i in range(spec.n_layer):
        for kind in LAYERS:
            layer = recipe.layer(f"backbone.layers.{i}.mixer.{kind}")
            if layer.inputs.type != "float":
                raise UsageError(
                    f"a fused step multiplies float activations, the recipe {recipe.name} quantizes the inputs of "
                    f"{kind} to {layer.inputs.type}",
                    _INSTEAD,
                )
            if layer.rotate:
                raise UsageError(f"a fused step rotates no inputs, the recipe {recipe.name} those of {kind}", _INSTEAD)


def _packable(recipe: Recipe, spec: ModelSpec) -> dict[str, tuple[Weights, int]]:
    """How the matrices are quantized that a fused step takes packed, and their columns."""
    found = {"head": (recipe.head, spec.d_model)}
    for i in range(spec.n_layer):
        for kind, columns in (("in_proj", spec.d_model), ("out_proj", spec.d_inner)):
            found[f"layers.{i}.{kind}"] = (recipe.layer(f"backbone.layers.{i}.mixer.{kind}").weights, columns)
    return found


def _check_formats(recipe: Recipe, schemes: dict[str, tuple[Weights, int]]) -> None:
    formats = {}
    for name, (scheme, columns) in schemes.items():
        try:
            formats[name] = format_for(scheme.type, columns, group_of(scheme, columns), scheme.zeros)
        except KernelError as error:
            reason = f"a fused step can't hold {name} of the recipe {recipe.name}: {error}"
            raise UsageError(reason, error.hint or _INSTEAD) from error
    model = common_format(formats.values())
    for name, form in formats.items():
        columns, promoted = schemes[name][1], recipe.promote.bits and name != "head"
        if columns % width_step(model.bits):
            reason = f"a fused step of int{model.bits} has no rows of {columns} values ({name})"
            hint = f"widths are multiples of {width_step(model.bits)}; w8a16 takes those of {width_step(8)}"
            raise UsageError(reason, hint)
        if (form.bits == 8 or promoted) and not told_apart(model, columns):
            raise UsageError(
                f"a fused step can't tell int8 rows of {columns} values from int4 ({name} of the recipe {recipe.name})",
                "use w8a16, or a recipe of your own with one type of integers",
            )
