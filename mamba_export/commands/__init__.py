"""The commands, one short file each: they parse arguments, call the function of the same name, and print."""

# Name → (module, one-line help). The modules are imported when their command runs, so that --help stays fast.
COMMANDS: dict[str, tuple[str, str]] = {
    "onnx": ("onnx", "Export a checkpoint to a bundle of ONNX graphs: the main job."),
    "inspect": ("inspect", "Show what a checkpoint, bundle or engine holds."),
    "verify": ("verify", "Compare a bundle with its checkpoint, output by output."),
    "generate": ("generate", "Write text with a bundle."),
    "perplexity": ("perplexity", "Measure perplexity of a bundle on a token file."),
    "calibrate": ("calibrate", "Collect activation statistics for quantization."),
    "quantize": ("quantize", "Quantize a checkpoint to a bundle."),
    "build": ("build", "Build TensorRT engines of a bundle."),
    "plugin": ("plugin", "Build the TensorRT plugin library."),
    "bench": ("bench", "Measure prefill and decode speed, and memory."),
    "plan": ("plan", "Show what a model takes on a device, before anything runs."),
    "kit": ("kit", "Collect all that a device needs in a folder."),
    "doctor": ("doctor", "Show versions, devices and what is missing."),
    "completion": ("completion", "Print a shell completion script."),
}
