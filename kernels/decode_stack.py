"""decode_stack: whole-model decode at batch 1 in one kernel launch, or layer by layer as a chain of kernels.

:class:`DecodeStack` holds a model's weights and states on the GPU and runs tokens through it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mamba_export.quantized import EMBEDDING, HEAD

from .library import KernelError, dtype_code, launch, params_struct, tactics
from .packed_weights import Format, common_format, format_of, pack

if TYPE_CHECKING:
    from torch import Tensor

    from mamba_export.quantized import Matrix
    from mamba_export.spec import ModelSpec

__all__ = ["TACTICS", "DecodeStack"]

TACTICS = {"auto": -1, "chain": 0, "fused": 1}
WEIGHTS = (
    "norm in_proj conv_weight conv_bias x_proj dt_proj out_proj gated_norm dt_bias A D"
    " conv_state_in conv_state_out ssm_state_in ssm_state_out"
)
LAYER = params_struct("DecodeLayer", f"ptr {WEIGHTS}; i32 in_proj_bits out_proj_bits")
PARAMS = params_struct(
    "DecodeStackParams",
    "i32 dtype family batch n_layer d_model d_inner d_state d_conv dt_rank vocab_size nheads ngroups"
    " residual_fp32 n_forced n_steps tactic; f32 norm_eps gated_norm_eps;"
    "ptr layers embedding norm_f lm_head input_ids output_ids logits workspace; size workspace_size;"
    "i32 weight_bits group_size zero_points head_bits embedding_packed",
)
# Of one layer: field of the C struct -> name of the parameter below backbone.layers.{i}.
_BOTH = {
    "norm": "norm.weight",
    "in_proj": "mixer.in_proj.weight",
    "conv_weight": "mixer.conv1d.weight",
    "conv_bias": "mixer.conv1d.bias",
    "A": "mixer.A",
    "D": "mixer.D",
    "out_proj": "mixer.out_proj.weight",
}
NAMES = {
    "mamba1": {
        **_BOTH,
        "x_proj": "mixer.x_proj.weight",
        "dt_proj": "mixer.dt_proj.weight",
        "dt_bias": "mixer.dt_proj.bias",
    },
    "mamba2": {**_BOTH, "dt_bias": "mixer.dt_bias", "gated_norm": "mixer.norm.weight"},
}
FLOAT32 = ("dt_bias", "A", "D")


def _packed(weights: Mapping[str, Tensor | Matrix]) -> tuple[dict[str, Tensor], Format, dict[str, int]]:
    """The weights, quantized matrices packed; the format of those (0 bits where there are none); their bits by name."""
    from mamba_export.fused_step import PACKABLE

    like: Any = weights["backbone.norm_f.weight"]
    found: dict[str, Any] = {name: w for name, w in weights.items() if hasattr(w, "data_ptr")}
    matrices: dict[str, Any] = {name: w for name, w in weights.items() if name not in found}
    tied = matrices.pop(EMBEDDING, None)
    if tied is not None and tied is not matrices.get(HEAD):
        raise KernelError("decode_stack: a quantized embedding must be the head's matrix")
    for name in matrices:
        if not name.endswith(PACKABLE):
            raise KernelError(
                f"decode_stack: {name} cannot be quantized", hint="quantize in_proj, out_proj and lm_head"
            )
    if not matrices:
        return found, Format(0, 0, False), {}
    if HEAD not in matrices:
        raise KernelError("decode_stack: lm_head.weight must be quantized as the layers are")
    form = common_format(format_of(matrix) for matrix in matrices.values())
    for name, matrix in matrices.items():
        found[name] = pack(matrix, like.dtype, like.device, form)
    if tied is not None:
        found[EMBEDDING] = found[HEAD]
    return found, form, {name: format_of(matrix).bits for name, matrix in matrices.items()}


class DecodeStack:
    """A model on the GPU, ready to decode.

    Args:
        spec: the model.
        weights: its parameters under the names of :class:`mamba_export.models.MambaLM`, on the GPU, dense. They are
            used where they lie, not copied. The matrices of in_proj, out_proj and the head may all be quantized
            instead, to int8 or int4 or some to either; they are packed. A model with tied embeddings then has
            ``lm_head.weight`` too, and its embedding may be that very matrix.
        batch: rows; the fused kernel takes one.
    """

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Tensor | Matrix], batch: int = 1) -> None:
        import torch

        from mamba_export.fused_step import PACKABLE, unsupported
        from mamba_export.states import state_table

        reason = unsupported(spec)
        if reason is not None:
            raise KernelError(f"decode_stack does not cover models with {reason}")
        self.spec, self.batch = spec, batch
        floats, self.format, bits = _packed(weights)
        self.embedding = floats[EMBEDDING]
        self.norm_f = floats["backbone.norm_f.weight"]
        own_head = self.format.bits or not spec.tie_embeddings
        self.lm_head = floats[HEAD] if own_head else self.embedding
        self.dtype, self.device = self.norm_f.dtype, self.norm_f.device
        self._layers: list[dict[str, Tensor]] = []
        self.conv_states: list[Tensor] = []
        self.ssm_states: list[Tensor] = []
        for i in range(spec.n_layer):
            layer = {field: floats[f"backbone.layers.{i}.{name}"] for field, name in NAMES[spec.family].items()}
            for field, tensor in layer.items():
                wanted = torch.float32 if field in FLOAT32 else self.dtype
                if self.format.bits and NAMES[spec.family][field].endswith(PACKABLE):
                    wanted = torch.uint8
                if tensor.dtype != wanted or not tensor.is_contiguous() or tensor.device != self.device:
                    raise KernelError(f"decode_stack: {field} of layer {i} must be dense {wanted} on the GPU")
            self._layers.append(layer)
        for state in state_table(spec, "fp32"):
            dtype = self.dtype if state.kind == "conv" else torch.float32
            tensor = torch.zeros(batch, *state.shape, dtype=dtype, device=self.device)
            (self.conv_states if state.kind == "conv" else self.ssm_states).append(tensor)
        own = {name: count for name, count in bits.items() if count > self.format.bits}
        self._head_bits = own.get(HEAD, 0)
        self._pointers = (LAYER * spec.n_layer)()
        for i, layer in enumerate(self._layers):
            self._pointers[i] = LAYER(
                in_proj_bits=own.get(f"backbone.layers.{i}.{_BOTH['in_proj']}", 0),
                out_proj_bits=own.get(f"backbone.layers.{i}.{_BOTH['out_proj']}", 0),
                **{field: tensor.data_ptr() for field, tensor in layer.items()},
                **dict.fromkeys(("conv_state_in", "conv_state_out"), self.conv_states[i].data_ptr()),
                **dict.fromkeys(("ssm_state_in", "ssm_state_out"), self.ssm_states[i].data_ptr()),
            )

    def reset(self) -> None:
        """The states of an empty sequence."""
        for state in (*self.conv_states, *self.ssm_states):
            state.zero_()

    def _params(self, **fields: Any) -> Any:
        s = self.spec
        return PARAMS(
            dtype=dtype_code(self.dtype),
            family=1 if s.family == "mamba1" else 2,
            batch=self.batch,
            n_layer=s.n_layer,
            d_model=s.d_model,
            d_inner=s.d_inner,
            d_state=s.d_state,
            d_conv=s.d_conv,
            dt_rank=s.dt_rank,
            vocab_size=s.vocab_size,
            nheads=s.nheads,
            ngroups=s.ngroups,
            residual_fp32=s.residual_in_fp32,
            norm_eps=s.norm_eps,
            gated_norm_eps=s.gated_norm_eps,
            layers=ctypes.addressof(self._pointers),
            embedding=self.embedding.data_ptr(),
            norm_f=self.norm_f.data_ptr(),
            lm_head=self.lm_head.data_ptr(),
            weight_bits=self.format.bits,
            group_size=self.format.group,
            zero_points=self.format.zeros,
            head_bits=self._head_bits,
            embedding_packed=bool(self.format.bits) and self.embedding is self.lm_head,
            **fields,
        )

    def covers(self) -> list[str]:
        """The tactics that can run one step of this model here, the preferred one first."""
        params = self._params(n_forced=1, n_steps=1, tactic=-1, input_ids=self.embedding.data_ptr())
        names = {code: name for name, code in TACTICS.items()}
        return [names[code] for code in tactics("decode_stack", params)]

    def step(
        self, input_ids: Tensor, logits: Tensor | None = None, tactic: Literal["auto", "chain", "fused"] = "auto"
    ) -> Tensor:
        """One token a row: input_ids int64 [batch] on the GPU → float32 logits [batch, vocab_size]."""
        import torch

        if logits is None:
            logits = torch.empty(self.batch, self.spec.vocab_size, dtype=torch.float32, device=self.device)
        params = self._params(
            n_forced=1,
            n_steps=1,
            tactic=TACTICS[tactic],
            input_ids=input_ids.data_ptr(),
            logits=logits.data_ptr(),
        )
        launch("decode_stack", params, self.norm_f)
        return logits

    def generate(self, prompt: Tensor | Sequence[int], new_tokens: int, output: Tensor | None = None) -> Tensor:
        """Greedy continuation, in one launch of the fused kernel: prompt int64 [n] → int64 [new_tokens]."""
        import torch

        ids = torch.as_tensor(prompt, dtype=torch.int64, device=self.device)
        if output is None:
            output = torch.empty(new_tokens, dtype=torch.int64, device=self.device)
        params = self._params(
            n_forced=ids.numel(),
            n_steps=ids.numel() + new_tokens - 1,
            tactic=TACTICS["fused"],
            input_ids=ids.data_ptr(),
            output_ids=output.data_ptr(),
        )
        launch("decode_stack", params, self.norm_f)
        return output
