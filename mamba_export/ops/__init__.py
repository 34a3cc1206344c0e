"""The ops of the ``mamba`` domain, one file each: torch op, reference, ONNX schema and bodies side by side.

To add an op: write a file that ends in ``OP = OpDef(...)`` and list it here. The tracer, the targets and the op
tests take it from this table.
"""

from __future__ import annotations

from mamba_export.ops import (
    causal_conv1d,
    rms_norm,
    selective_scan,
    selective_state_update,
    ssd_scan,
    ssd_state_update,
)
from mamba_export.ops.opdef import DOMAIN, VERSION, OpDef

OPS: dict[str, OpDef] = {
    op.op_type: op
    for op in (
        causal_conv1d.OP,
        selective_scan.OP,
        selective_state_update.OP,
        ssd_scan.OP,
        ssd_state_update.OP,
        rms_norm.OP,
    )
}

__all__ = ["DOMAIN", "OPS", "VERSION", "OpDef"]
