"""A stand-in for TensorRT's Python module on a machine without a GPU: engines run in ONNX Runtime, on host memory.

It has the names and signatures of the real module, as far as this project uses them (a test compares them with the
real ``tensorrt_rtx``), and it is stricter: what the real one answers with a crash or with garbage is an error here.
"Building" keeps the ONNX graph as the engine; "device" memory is that of the stand-in for CUDA (``cuda.c``).
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

__version__ = "11.4.1.7"
MAGIC = b"STANDIN ENGINE\n"

failures: list[str] = []
"""What went wrong inside a replayed graph, where nothing can be raised."""


DataType = enum.IntEnum("DataType", ["FLOAT", "HALF", "BF16", "INT8", "INT32", "INT64", "BOOL", "UINT8"], start=0)
TensorIOMode = enum.IntEnum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"], start=0)
ProfilingVerbosity = enum.IntEnum("ProfilingVerbosity", ["LAYER_NAMES_ONLY", "NONE", "DETAILED"], start=0)
MemoryPoolType = enum.IntEnum("MemoryPoolType", ["WORKSPACE"], start=0)
LayerInformationFormat = enum.IntEnum("LayerInformationFormat", ["ONELINE", "JSON"], start=0)
NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1})
ExecutionContextAllocationStrategy = enum.IntEnum(
    "ExecutionContextAllocationStrategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"], start=0
)

_STORAGE = {
    DataType.FLOAT: np.float32,
    DataType.HALF: np.float16,
    DataType.INT8: np.int8,
    DataType.INT32: np.int32,
    DataType.INT64: np.int64,
}
_ONNX_TYPES = {1: DataType.FLOAT, 10: DataType.HALF, 16: DataType.BF16, 3: DataType.INT8}
_ONNX_TYPES |= {6: DataType.INT32, 7: DataType.INT64}
_libraries: list[str] = []


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        pass

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    def __init__(self) -> None:
        pass


class IPluginRegistry:
    def load_library(self, plugin_path: str) -> object | None:
        _libraries.append(plugin_path)
        return object()


def get_plugin_registry() -> IPluginRegistry:
    return IPluginRegistry()


# -- building -------------------------------------------------------------------------------------------------------


class _Tensor:
    def __init__(self, value: Any) -> None:
        self.name = value.name
        self.dtype = _ONNX_TYPES[value.type.tensor_type.elem_type]
        self.shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim)


class INetworkDefinition:
    def __init__(self, flags: int) -> None:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED, "networks are strongly typed"
        self._onnx: Any = None
        self._data, self._folder = b"", ""

    @property
    def num_inputs(self) -> int:
        return len(self._onnx.graph.input)

    @property
    def num_layers(self) -> int:
        return len(self._onnx.graph.node)

    def get_input(self, index: int) -> Any:
        return _Tensor(self._onnx.graph.input[index])

    def get_layer(self, index: int) -> Any:
        node = self._onnx.graph.node[index]
        plugin = node.domain == "mamba" and bool(_libraries)

        class Layer:
            class type:
                name = "PLUGIN_V3" if plugin else node.op_type.upper()

        return Layer()


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self.num_errors = network, 0

    def parse(self, model: bytes, path: str | None = None) -> bool:
        import onnx

        assert path is not None
        self._network._onnx = onnx.load_from_string(model)
        self._network._data, self._network._folder = bytes(model), str(Path(path).resolve().parent)
        return True

    def get_error(self, index: int) -> Any:
        raise IndexError(index)


class IOptimizationProfile:
    def __init__(self) -> None:
        self._ranges: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        assert all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True))
        self._ranges[input] = [list(min), list(opt), list(max)]


class ITimingCache:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialize(self) -> bytes:
        return self._data or b"timings"


class IBuilderConfig:
    def __init__(self) -> None:
        self._profiles: list[IOptimizationProfile] = []
        self.progress_monitor: Any = None
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.builder_optimization_level = 3
        self._cache: ITimingCache | None = None

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        pass


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        config.progress_monitor.phase_start("build", None, 1)
        if not config.progress_monitor.step_complete("build", 0):
            return None
        config.progress_monitor.phase_finish("build")
        header = {"folder": network._folder, "version": __version__, "profiles": [p._ranges for p in config._profiles]}
        header["plugins"] = bool(_libraries)
        return MAGIC + json.dumps(header).encode() + b"\n" + network._data


# -- running --------------------------------------------------------------------------------------------------------


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        data = bytes(serialized_engine)
        why = ""
        if not data.startswith(MAGIC):
            why = "magic tag does not match"
        else:
            header = json.loads(data[len(MAGIC) :].split(b"\n", 1)[0])
            if header["version"] != __version__:
                why = f"engine plan file is of version {header['version']}, expecting {__version__}"
            elif header["plugins"] and not _libraries:
                why = "getPluginCreator could not find plugin MambaSelectiveScan version 1"
        if why:
            self._logger.log(ILogger.Severity.ERROR, why)
            return None
        return ICudaEngine(header, data[len(MAGIC) :].split(b"\n", 1)[1])


class ICudaEngine:
    def __init__(self, header: dict[str, Any], model: bytes) -> None:
        import onnx

        graph = onnx.load_from_string(model).graph
        self._header, self._model, self._opened = header, model, None
        self._tensors = {t.name: t for t in map(_Tensor, [*graph.input, *graph.output])}
        self._inputs = [value.name for value in graph.input]
        self._outputs = [value.name for value in graph.output]
        self.num_layers, self.num_optimization_profiles = len(graph.node), len(header["profiles"])
        self.num_io_tensors = len(self._tensors)
        self.device_memory_size_v2 = 1 << 20

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self._tensors[name].dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any:
        return [tuple(shape) for shape in self._header["profiles"][profile_index][name]]

    def create_execution_context(self, strategy: Any = ExecutionContextAllocationStrategy.STATIC) -> IExecutionContext:
        return IExecutionContext(self)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector()

    def _session(self) -> Any:
        """The graph in ONNX Runtime, opened once."""
        if self._opened is None:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 3, 1
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", self._header["folder"]
            )
            self._opened = onnxruntime.InferenceSession(self._model, options, providers=["CPUExecutionProvider"])
        return self._opened


class EngineInspector:
    def get_engine_information(self, format: Any) -> str:
        return json.dumps({"Layers": ["stand-in"]})


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._cuda = ctypes.CDLL(os.environ.get("STANDIN_CUDART", "libcudart.so"))
        self._cuda.stub_owns.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profile, self._ran = -1, False
        self._recorded: list[Any] = []

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if profile_index >= self._engine.num_optimization_profiles or not stream_handle:
            return False
        self._profile, self._shapes, self._ran = profile_index, {}, False
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        if len(low) != len(shape) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return False
        self._shapes[name], self._ran = tuple(shape), False
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        batch, seq = self._shapes["input_ids"]
        declared = self._engine.get_tensor_shape(name)
        return tuple((batch if i == 0 else seq) if size < 0 else size for i, size in enumerate(declared))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory % 256 == 0, f"{name} is not aligned"
        self._addresses[name] = memory
        return name in self._engine._tensors

    def is_stream_capturable(self, stream: int) -> bool:
        return self._ran

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle
        inputs, outputs = self._engine._inputs, self._engine._outputs
        missing = [n for n in inputs if n not in self._shapes]
        missing += [n for n in (*inputs, *outputs) if n not in self._addresses]
        assert not missing, f"no shape or address: {missing}"
        bound = dict(self._addresses)
        assert not {bound[n] for n in inputs} & {bound[n] for n in outputs}, "an output lies on an input"
        shapes = {name: self.get_tensor_shape(name) for name in bound}
        if not self._cuda.stub_capturing():
            self._run(bound, shapes)
            self._ran = True
            return True
        assert self._ran, "the first run in new shapes can't be captured"

        def replay(_: int) -> None:
            try:
                self._run(bound, shapes)
            except Exception as error:
                failures.append(str(error))

        self._recorded.append(ctypes.CFUNCTYPE(None, ctypes.c_long)(replay))
        return bool(self._cuda.stub_record(self._recorded[-1], ctypes.c_long(0)) == 0)

    def _run(self, bound: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        arrays = {name: self._view(name, bound[name], shapes[name]) for name in bound}
        feed = {name: np.array(arrays[name]) for name in self._engine._inputs}
        for name in self._engine._outputs:
            view = arrays[name].reshape(-1).view(np.uint8)
            view[:] = 0xFF  # an engine may write at any time: outputs that lie on inputs would be noticed
        found = self._engine._session().run(self._engine._outputs, feed)
        for name, value in zip(self._engine._outputs, found, strict=True):
            assert value.shape == shapes[name], f"{name} is {value.shape}, {shapes[name]} was expected"
            arrays[name][...] = value

    def _view(self, name: str, address: int, shape: tuple[int, ...]) -> Any:
        dtype = np.dtype(_STORAGE[self._engine.get_tensor_dtype(name)])
        nbytes = int(np.prod(shape)) * dtype.itemsize
        assert self._cuda.stub_owns(address, nbytes), f"{name} of {nbytes} bytes lies outside of allocated memory"
        return np.frombuffer((ctypes.c_byte * nbytes).from_address(address), dtype).reshape(shape)
