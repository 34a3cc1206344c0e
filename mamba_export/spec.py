"""ModelSpec: every dimension and option of a model, read once, validated once, never guessed again."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from mamba_export.errors import CheckpointError

Family = Literal["mamba1", "mamba2"]

# Upper bounds that no real model reaches; above them a config is damaged, not large.
_LIMITS = {
    "d_model": 1 << 17,
    "n_layer": 4096,
    "vocab_size": 1 << 24,
    "padded_vocab_size": 1 << 24,
    "d_inner": 1 << 20,
    "d_state": 1 << 14,
    "d_conv": 256,
    "dt_rank": 1 << 17,
    "nheads": 1 << 17,
    "headdim": 1 << 14,
    "ngroups": 1 << 14,
    "d_ssm": 1 << 20,
    "d_intermediate": 1 << 20,
}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One language model of the Mamba family.

    Symbols used for shapes throughout the project: ``B`` batch, ``L`` sequence, ``d_model`` the residual width,
    ``d_inner = expand * d_model``, ``N = d_state``, ``K = d_conv``, ``R = dt_rank``, ``G = ngroups``,
    ``H = nheads``, ``P = headdim`` and ``d_ssm = H * P`` (Mamba-2).

    Raises:
        CheckpointError: from :meth:`__post_init__`, when a dimension is out of range or two contradict each other.
    """

    family: Family
    d_model: int
    n_layer: int
    vocab_size: int
    """Number of token ids; the logits have this many columns."""
    padded_vocab_size: int
    """Rows of the embedding matrix, ``>= vocab_size``."""
    d_inner: int
    d_state: int
    d_conv: int = 4
    ngroups: int = 1
    """Groups that share one B and one C."""

    dt_rank: int = 0
    """Mamba-1 only: width of the low-rank input of ``dt_proj``."""

    nheads: int = 0
    """Mamba-2 only."""
    headdim: int = 0
    """Mamba-2 only."""
    d_ssm: int = 0
    """Channels that go through the scan; Mamba-2 may have ``d_ssm < d_inner``, the rest is a gated MLP."""
    chunk_size: int = 256
    """Mamba-2 only: the chunk the model was trained with. Any chunk gives the same result."""

    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    proj_bias: bool = False
    """Bias in ``in_proj`` and ``out_proj``."""
    conv_bias: bool = True
    tie_embeddings: bool = True
    d_intermediate: int = 0
    """Hidden width of the gated MLP after each mixer, 0 for none."""

    bcdt_norm_eps: float | None = None
    """Falcon-Mamba: epsilon of the weightless RMSNorm on B, C and dt; None for none."""

    gated_norm: bool = True
    """Mamba-2: RMSNorm between scan and out_proj, gated by z. Without it z gates the scan's output."""
    norm_before_gate: bool = False
    gated_norm_group_size: int = 0
    gated_norm_eps: float = 1e-5
    D_has_hdim: bool = False
    """Mamba-2: D holds one value a channel instead of one a head."""
    dt_limit: tuple[float, float] = (0.0, math.inf)
    """Mamba-2: dt is clamped to this range after softplus."""

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0 or value > limit:
                raise CheckpointError(f"{name} = {value!r} is not an integer in 0..{limit}")
        required = ["d_model", "n_layer", "vocab_size", "padded_vocab_size", "d_inner", "d_state", "ngroups", "d_ssm"]
        required += ["dt_rank"] if self.family == "mamba1" else ["nheads", "headdim"]
        for name in required:
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.d_conv < 2:
            raise CheckpointError(f"d_conv = {self.d_conv} must be at least 2")
        if self.padded_vocab_size < self.vocab_size:
            raise CheckpointError(f"the embedding has {self.padded_vocab_size} rows for {self.vocab_size} tokens")
        for name in ("norm_eps", "gated_norm_eps"):
            value = getattr(self, name)
            if not (0.0 <= value < 1.0):
                raise CheckpointError(f"{name} = {value} is not in [0, 1)")
        if self.family == "mamba2":
            self._check_mamba2()
        elif self.d_ssm != self.d_inner or self.d_inner % self.ngroups:
            raise CheckpointError(f"d_ssm = {self.d_ssm} must equal d_inner = {self.d_inner}, a multiple of ngroups")

    def _check_mamba2(self) -> None:
        if self.nheads * self.headdim != self.d_ssm:
            raise CheckpointError(f"nheads * headdim = {self.nheads} * {self.headdim} is not d_ssm = {self.d_ssm}")
        if self.d_ssm > self.d_inner:
            raise CheckpointError(f"d_ssm = {self.d_ssm} is larger than d_inner = {self.d_inner}")
        if self.nheads % self.ngroups:
            raise CheckpointError(f"nheads = {self.nheads} is not a multiple of ngroups = {self.ngroups}")
        low, high = self.dt_limit
        if not (0.0 <= low <= high):
            raise CheckpointError(f"dt_limit = {self.dt_limit} is not a range of positive numbers")
        if self.gated_norm and (self.gated_norm_group_size < 1 or self.d_ssm % self.gated_norm_group_size):
            raise CheckpointError(
                f"gated_norm_group_size = {self.gated_norm_group_size} does not divide d_ssm = {self.d_ssm}"
            )

    @property
    def d_mlp(self) -> int:
        """Mamba-2: channels that bypass the scan through the mixer's own gated MLP."""
        return self.d_inner - self.d_ssm

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution."""
        return self.d_inner if self.family == "mamba1" else self.d_ssm + 2 * self.ngroups * self.d_state

    @property
    def d_in_proj(self) -> int:
        """Rows of ``in_proj``: [x, z] for Mamba-1, [z0, x0, z, x, B, C, dt] for Mamba-2."""
        if self.family == "mamba1":
            return 2 * self.d_inner
        return 2 * self.d_inner + 2 * self.ngroups * self.d_state + self.nheads

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; an infinite upper dt limit becomes None."""
        data = dataclasses.asdict(self)
        data["dt_limit"] = [self.dt_limit[0], None if math.isinf(self.dt_limit[1]) else self.dt_limit[1]]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelSpec:
        """The inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: when a field is unknown, missing or out of range.
        """
        data = dict(data)
        if "dt_limit" in data:
            low, high = data["dt_limit"]
            data["dt_limit"] = (float(low), math.inf if high is None else float(high))
        try:
            return cls(**data)
        except TypeError as error:
            raise CheckpointError(f"the model spec is not of this version: {error}") from error
