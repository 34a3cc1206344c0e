"""From the torch model to ONNX: trace, lower to a target, place the weights."""
