"""Layer by layer: how far a bundle's hidden states are from the checkpoint's, and how large the activations are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mamba_export.bundle import PREFILL, Bundle
from mamba_export.extras import require
from mamba_export.runtime.base import Ids
from mamba_export.states import to_float

if TYPE_CHECKING:
    import onnx

    from mamba_export.runtime.ort import OrtRunner
    from mamba_export.runtime.torch_runner import TorchRunner

_SKIP = "SkipSimplifiedLayerNormalization"  # its fourth output is the sum before the norm
_PASS_THROUGH = ("Cast", "DequantizeLinear", "Identity")


@dataclass(frozen=True)
class LayerError:
    """Relative errors of one layer: norm of the difference over norm of the checkpoint's values.

    Attributes:
        layer: its number.
        hidden: of the residual stream after it; None where the graph doesn't show it.
        block: of what the layer adds to the residual stream.
        conv_state, ssm_state: of its states after the last token.
    """

    layer: int
    hidden: float | None
    block: float | None
    conv_state: float | None
    ssm_state: float | None


@dataclass(frozen=True)
class Outliers:
    """Magnitudes of the input of one projection, in the checkpoint.

    Attributes:
        layer: its number.
        projection: ``in_proj``, ``x_proj``, ``out_proj``, …
        peak: the largest.
        p999: what 99.9 % stay below.
        rms: root of the mean square.
    """

    layer: int
    projection: str
    peak: float
    p999: float
    rms: float


@dataclass
class LayerReport:
    """Result of :func:`compare_layers`."""

    tokens: int
    errors: list[LayerError]
    outliers: list[Outliers]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def compare_layers(bundle: Bundle, runner: OrtRunner, reference: TorchRunner, input_ids: Ids) -> LayerReport:
    """Run ``input_ids`` [1, L] from zero states through both, and look inside.

    The bundle's prefill graph runs once more with its residual stream as additional outputs, so every runtime detail
    of the bundle, its quantized products included, is in the errors.
    """
    require("onnx", extra="export", purpose="a look inside a graph")
    states, stream = _run_bundle(bundle, runner, input_ids)
    with _watch(reference) as (totals, outliers):
        _, state = reference.prefill(input_ids, reference.initial_state(1))
    wanted_states = reference.state_to_numpy(state)
    found = _Stream(stream)
    wanted = _Stream([total.astype(np.float64) for total in totals])
    errors = []
    for layer in range(bundle.spec.n_layer):
        conv, ssm = f"conv_state_{layer}", f"ssm_state_{layer}"
        errors.append(
            LayerError(
                layer,
                _relative(found.after(layer), wanted.after(layer)),
                _relative(found.block(layer), wanted.block(layer)),
                _relative(states[conv], wanted_states[conv]),
                _relative(states[ssm], wanted_states[ssm]),
            )
        )
    return LayerReport(int(input_ids.shape[1]), errors, outliers)


def _relative(found: NDArray[Any] | None, wanted: NDArray[Any] | None) -> float | None:
    if found is None or wanted is None:
        return None
    wanted = wanted[:, -found.shape[1] :].astype(np.float64)  # graphs with the last logits end with one position
    if found.shape != wanted.shape:
        return None
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / max(float(np.linalg.norm(wanted)), 1e-30))


@dataclass(frozen=True)
class _Stream:
    """The residual stream before layer 0, 1, … and after the last; entries a graph doesn't show are None."""

    totals: list[NDArray[Any] | None] | list[NDArray[Any]]

    def after(self, layer: int) -> NDArray[Any] | None:
        return self.totals[layer + 1]

    def block(self, layer: int) -> NDArray[Any] | None:
        before, after = self.totals[layer], self.totals[layer + 1]
        return None if before is None or after is None else after - before[:, -after.shape[1] :]


def _run_bundle(
    bundle: Bundle, runner: OrtRunner, input_ids: Ids
) -> tuple[dict[str, NDArray[Any]], list[NDArray[Any] | None]]:
    """Present states by state name, and the residual stream."""
    import onnx

    from mamba_export.runtime.ort_session import make_session

    names: list[str | None] = []

    def with_stream(serialized: bytes) -> bytes:
        model = onnx.load_model_from_string(serialized)
        names.extend(residual_stream(model, bundle.spec.n_layer))
        known = {output.name for output in model.graph.output}
        for name in dict.fromkeys(names):
            if name is not None and name not in known:
                model.graph.output.append(onnx.ValueInfoProto(name=name))
        data: bytes = model.SerializeToString()
        return data

    session = make_session(bundle, PREFILL, runner.device, **runner.session_options, change=with_stream)
    feed: dict[str, NDArray[Any]] = {"input_ids": input_ids}
    if bundle.manifest.ragged:
        feed["seq_lens"] = np.full(1, input_ids.shape[1], np.int32)
    feed.update({name: np.array(value.numpy()) for name, value in runner.initial_state(1).items()})
    shown = [name for name in dict.fromkeys(names) if name is not None]
    outputs = session.run([*(state.present for state in bundle.states), *shown], feed)
    states = to_float({state.name: array for state, array in zip(bundle.states, outputs, strict=False)}, bundle.states)
    values = dict(zip(shown, outputs[len(bundle.states) :], strict=True))
    return states, [None if name is None else values[name].astype(np.float64) for name in names]


def residual_stream(model: onnx.ModelProto, n_layer: int) -> list[str | None]:
    """Names of the values before layer 0, 1, … and after the last layer, found by the norms' weights.

    A fused norm that doesn't give its sum is changed to give it. None where a norm has an unknown form.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    weights = [*(f"backbone.layers.{i}.norm.weight" for i in range(n_layer)), "backbone.norm_f.weight"]
    return [_before_norm(weight, producers, users) for weight in weights]


def _before_norm(
    weight: str, producers: dict[str, onnx.NodeProto], users: dict[str, list[onnx.NodeProto]]
) -> str | None:
    nodes = users.get(weight, [])
    while len(nodes) == 1 and nodes[0].op_type in _PASS_THROUGH:
        weight = nodes[0].output[0]
        nodes = users.get(weight, [])
    if len(nodes) != 1:
        return None
    node = nodes[0]
    if node.op_type == _SKIP:
        while len(node.output) < 4:
            node.output.append("")
        if not node.output[3]:
            node.output[3] = f"{weight}/sum"
        return str(node.output[3])
    if node.op_type == "Mul":  # (sum / root) * weight
        scaled = next((name for name in node.input if name != weight), "")
        divided = producers.get(scaled)
        if divided is None or divided.op_type != "Div":
            return None
        return _uncast(divided.input[0], producers)
    if node.op_type in ("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"):
        return _uncast(node.input[0], producers)
    return None


def _uncast(name: str, producers: dict[str, onnx.NodeProto]) -> str:
    node = producers.get(name)
    return str(node.input[0]) if node is not None and node.op_type == "Cast" else name


@contextlib.contextmanager
def _watch(reference: TorchRunner) -> Iterator[tuple[list[NDArray[np.float32]], list[Outliers]]]:
    """While it lasts, the prefill model notes its residual stream and the magnitudes that enter its projections."""
    from torch import nn

    totals: list[NDArray[np.float32]] = []
    outliers: list[Outliers] = []
    handles = []

    def note(layer: int, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            values = np.abs(args[0].float().numpy())
            rms = float(np.sqrt(np.square(values, dtype=np.float64).mean()))
            outliers.append(Outliers(layer, name, float(values.max()), float(np.quantile(values, 0.999)), rms))

        return hook

    backbone = reference.prefill_model.backbone
    norms: list[Any] = [*(layer.norm for layer in backbone.layers), backbone.norm_f]
    for norm in norms:
        handles.append(norm.register_forward_hook(lambda _, __, result: totals.append(result[1].float().numpy())))
    for index, layer in enumerate(backbone.layers):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith("dt_proj"):  # dt_proj is not called as a module
                handles.append(module.register_forward_pre_hook(note(index, name.rpartition(".")[2])))
    try:
        yield totals, outliers
    finally:
        for handle in handles:
            handle.remove()
