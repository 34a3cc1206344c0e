"""Exact integer products in ONNX Runtime on CPUs whose fast ones are not.

Without VNNI an x86 CPU adds two products of an unsigned and a signed byte in 16 bits, which saturate: 255 x 127 twice
is more than they hold. ``session.x64quantprecision`` has ONNX Runtime multiply unsigned bytes instead, exactly. It
takes the fast instructions from CPUs with VNNI as well, so that it is set where this CPU was seen to saturate.
"""

from __future__ import annotations

import functools

import numpy as np

from mamba_export.bundle import Bundle

_ROWS, _DEPTH = 2, 4


def exact_products(bundle: Bundle, low_memory: bool = False) -> dict[str, str]:
    """Session entries with which this CPU computes what the bundle's graphs say.

    Graphs with ONNX Runtime's own ops are made for ``session.x64quantprecision``: int8 weights have the zero points
    that it moves. In standard Q/DQ it would leave a DequantizeLinear that can't run. There nothing is fused to integer
    products; weights become floats when the session is made, or with ``low_memory`` in every call.
    """
    if not bundle.integer_inputs or not saturates():
        return {}
    if bundle.target.contrib:
        return {"session.x64quantprecision": "1"}
    as_written = {"session.disable_quant_qdq": "1"}
    return {**as_written, "session.disable_qdq_constant_folding": "1"} if low_memory else as_written


@functools.cache
def saturates() -> bool:
    """Whether ONNX Runtime's integer products are wrong on this CPU: it is asked for a large one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(_probe(), options, providers=["CPUExecutionProvider"])
    a, b = np.full((_ROWS, _DEPTH), 255, np.uint8), np.full((_DEPTH, _ROWS), 127, np.int8)
    (found,) = session.run(None, {"a": a, "b": b})
    return bool(np.any(found != _DEPTH * 255 * 127))


def _probe() -> bytes:
    """A model that is ``y = MatMulInteger(a, b)``, in protobuf, for there may be no onnx package."""
    names = [_field(1, b"a"), _field(1, b"b"), _field(2, b"y"), _field(4, b"MatMulInteger")]
    values = [_value(11, b"a", _UINT8), _value(11, b"b", _INT8), _value(12, b"y", _INT32)]
    graph = _field(7, _field(1, *names), _field(2, b"probe"), *values)
    return b"\x08\x08" + graph + _field(8, b"\x10\x0a")  # IR version 8, opset 10


_UINT8, _INT8, _INT32 = 2, 3, 6  # TensorProto.DataType


def _value(number: int, name: bytes, kind: int) -> bytes:
    """A ValueInfoProto: a matrix of any size."""
    shape = _field(2, _field(1), _field(1))
    return _field(number, _field(1, name), _field(2, _field(1, bytes([8, kind]), shape)))


def _field(number: int, *parts: bytes) -> bytes:
    """A field that is a short message or text."""
    content = b"".join(parts)
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content
