"""Edits and facts of a serialized ONNX model that need no onnx package, so that they work on a bare device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mamba_export.errors import BundleError

# Field numbers: ModelProto.functions and .graph, GraphProto.initializer, TensorProto.external_data.
_FUNCTIONS, _GRAPH, _INITIALIZER, _EXTERNAL = 25, 7, 5, 13
_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5  # protobuf wire types


def without_functions(model: bytes) -> bytes:
    """The model without its model-local functions; all else byte for byte.

    Raises:
        BundleError: ``model`` is not a serialized protobuf message.
    """
    with _reading():
        return b"".join(model[start:end] for tag, start, _, end in _fields(model) if tag >> 3 != _FUNCTIONS)


def external_bytes(model: bytes) -> int:
    """Bytes of the files beside the model that its initializers refer to; what two share counts once.

    Raises:
        BundleError: ``model`` is not a serialized protobuf message.
    """
    spans = set()
    with _reading():
        for graph in _messages(model, _GRAPH):
            for tensor in _messages(graph, _INITIALIZER):
                entries = {}
                for entry in _messages(tensor, _EXTERNAL):
                    key, value = (next(_messages(entry, field), b"").decode() for field in (1, 2))
                    entries[key] = value
                if "length" in entries:
                    spans.add((entries.get("location", ""), int(entries.get("offset", 0)), int(entries["length"])))
    return sum(length for _, _, length in spans)


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except (ValueError, IndexError) as error:
        raise BundleError(f"the graph is not an ONNX model: {error}", "export the bundle again") from error


def _messages(data: bytes, field: int) -> Iterator[bytes]:
    """The values of a field that is a message or text."""
    return (data[body:end] for tag, _, body, end in _fields(data) if tag == field << 3 | _LEN)


def _fields(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Of every field of a message: tag, where it starts, where its value does (behind a length), and its end."""
    at = 0
    while at < len(data):
        start = at
        tag, at = _varint(data, at)
        body = _varint(data, at)[1] if tag & 7 == _LEN else at
        at = _skip(data, at, tag & 7)
        if at > len(data):
            raise ValueError("truncated")
        yield tag, start, body, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _skip(data: bytes, at: int, wire_type: int) -> int:
    if wire_type == _VARINT:
        return _varint(data, at)[1]
    if wire_type == _LEN:
        length, at = _varint(data, at)
        return at + length
    if wire_type in (_I64, _I32):
        return at + (8 if wire_type == _I64 else 4)
    raise ValueError(f"wire type {wire_type}")
