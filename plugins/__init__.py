"""Adapters of the kernels to engines: TensorRT (tensorrt/) and ONNX Runtime (onnxruntime/)."""
