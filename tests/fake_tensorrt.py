"""TensorRT's Python bindings played with ONNX Runtime: it enforces the call protocol and really computes.

A version has exactly the names that ``tests/runtime/trt_api.py`` gives it. What the real bindings answer with undefined
behaviour is an AssertionError here: executing before every address is set, shapes outside the profile, too little
device memory, changing a context that a captured graph was made from, making a ``Runtime`` without a device.
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import json
import struct
import threading
import types
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime

from tests.runtime.trt_api import API
from tests.runtime.trt_operators import PARSER_OPERATORS

if TYPE_CHECKING:
    from tests.fake_cuda import FakeCuda

MAGIC = b"fakeplan"
_DTYPES = {1: "FLOAT", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF"}
_NUMPY = {
    "FLOAT": np.float32, "UINT8": np.uint8, "INT8": np.int8, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_,
    "HALF": np.float16,
}  # fmt: skip


class FakeTensorRT(types.ModuleType):
    """The module ``tensorrt`` of one version, on one fake driver.

    Args:
        version: One of ``VERSIONS``.
        cuda: The driver; it says whether there is a device and runs captured work.

    Attributes:
        builds: Paths of the ONNX files that were built, in order.
        problem: A message with which every build fails, or empty.
        refuse: A message with which plans are refused when deserialised, or empty; the first ``accepts`` are not.
        refuse_runtime: Whether a ``Runtime`` cannot be made.
        enqueue_problem: A message with which executions are refused, or empty.
        memory: Bytes of activation memory that engines built from now on want beside the usual.
        slow: Called in every step of a build, from the builder's thread.
    """

    def __init__(self, version: str, cuda: FakeCuda) -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.cuda = cuda
        self.builds: list[str] = []
        self.contexts = 0
        self.problem, self.refuse, self.refuse_runtime, self.enqueue_problem = "", "", False, ""
        self.memory = self.accepts = 0
        self.slow: Any = lambda: None
        self.levels: list[int] = []
        self.tf32: list[bool] = []
        self.timing_given: list[bytes] = []
        for name, value in _classes(self, version).items():
            setattr(self, name, value)

    @staticmethod
    def nptype(kind: Any) -> Any:
        return _NUMPY[kind.name]


def _members(cls: str, version: str) -> list[str]:
    return [member for member, versions in API[cls].items() if version in versions]


def _classes(module: FakeTensorRT, version: str) -> dict[str, Any]:
    cuda = module.cuda
    made: dict[str, Any] = {
        name: enum.Enum(name, {member: index for index, member in enumerate(_members(name, version))})
        for name in ("BuilderFlag", "MemoryPoolType", "ExecutionContextAllocationStrategy", "TensorIOMode",
                     "TensorLocation", "DataType")
    }  # fmt: skip
    flags = enum.IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 0 if version.startswith("11") else 1})
    severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])

    class ILogger:
        Severity = severity

        def __init__(self) -> None:
            self.initialised = True

        def log(self, severity: Any, msg: str) -> None:
            raise NotImplementedError

    class IProgressMonitor:
        def __init__(self) -> None:
            self.initialised = True

    def check_logger(logger: Any) -> None:
        assert isinstance(logger, ILogger)
        assert getattr(logger, "initialised", False), "ILogger.__init__ was not called"

    class ITensor:
        def __init__(self, value: Any, is_shape_tensor: bool) -> None:
            self.name, self.is_shape_tensor = value.name, is_shape_tensor
            self._shape = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

    class INetworkDefinition:
        def __init__(self) -> None:
            self._inputs: list[ITensor] = []
            self._model: onnx.ModelProto | None = None
            self._path = ""

        @property
        def num_inputs(self) -> int:
            return len(self._inputs)

        def get_input(self, index: int) -> ITensor:
            return self._inputs[index]

    class ParserError:
        def __init__(self, index: int, node: Any) -> None:
            self._index, self._node = index, node

        def node(self) -> int:
            return self._index

        def node_name(self) -> str:
            return str(self._node.name)

        def node_operator(self) -> str:
            return str(self._node.op_type)

        def desc(self) -> str:
            return "No importer registered for op"

    class OnnxParser:
        def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
            check_logger(logger)
            self._network = network
            self._errors: list[ParserError] = []

        def parse_from_file(self, model: str) -> bool:
            assert isinstance(model, str)
            proto = onnx.load(model)
            known = PARSER_OPERATORS["10.3" if version.startswith("10.3") else "10.15"]
            self._errors = [
                ParserError(index, node)
                for index, node in enumerate(proto.graph.node)
                if node.domain or node.op_type not in known
            ]
            wanted = _shape_inputs(proto.graph)
            self._network._inputs = [ITensor(value, value.name in wanted) for value in proto.graph.input]
            self._network._model, self._network._path = proto, model
            return not self._errors

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> ParserError:
            return self._errors[index]

    class IOptimizationProfile:
        def __init__(self) -> None:
            self._ranges: dict[str, list[list[int]]] = {}
            self._values: dict[str, list[list[int]]] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002
            self._set(self._ranges, input, min, opt, max)

        def set_shape_input(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002
            self._set(self._values, input, min, opt, max)

        @staticmethod
        def _set(target: dict[str, list[list[int]]], name: str, low: Any, opt: Any, high: Any) -> None:
            assert len(low) == len(opt) == len(high)
            if not all(0 <= a <= b <= c for a, b, c in zip(low, opt, high, strict=True)):
                raise ValueError(f"inconsistent range of {name}: {low} {opt} {high}")
            target[name] = [list(low), list(opt), list(high)]

    class ITimingCache:
        def __init__(self, data: bytes) -> None:
            self._data = data

        def serialize(self) -> bytes:
            return self._data or b"timings"

    class IBuilderConfig:
        def __init__(self) -> None:
            self._profiles: list[IOptimizationProfile] = []
            self._cache: ITimingCache | None = None
            self._tf32 = True
            self.builder_optimization_level = 3
            self.progress_monitor: Any = None

        def __setattr__(self, name: str, value: Any) -> None:
            assert name.startswith("_") or name in API["IBuilderConfig"], f"IBuilderConfig has no {name}"
            super().__setattr__(name, value)

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            assert isinstance(pool, made["MemoryPoolType"])
            assert isinstance(pool_size, int)

        def clear_flag(self, flag: Any) -> None:
            assert flag is made["BuilderFlag"].TF32
            self._tf32 = False

        def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
            self._profiles.append(profile)
            return len(self._profiles) - 1

        def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
            module.timing_given.append(bytes(serialized_timing_cache))
            if serialized_timing_cache == b"garbage":
                return None
            return ITimingCache(bytes(serialized_timing_cache))

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            assert isinstance(cache, ITimingCache)
            assert ignore_mismatch is False
            self._cache = cache
            return cache._data in (b"", b"timings")

        def get_timing_cache(self) -> ITimingCache | None:
            return self._cache

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            check_logger(logger)
            assert bool(cuda.devices) > bool(cuda.error), "a Builder without a device takes the process down"
            self._logger = logger

        def create_network(self, flags: int = 0) -> INetworkDefinition:
            assert flags == 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            return INetworkDefinition()

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
            assert network._model is not None, "nothing was parsed"
            assert config._profiles, "dynamic inputs need a profile"
            for profile in config._profiles:
                dynamic = {tensor.name for tensor in network._inputs if any(isinstance(s, str) for s in tensor._shape)}
                shapes = {tensor.name for tensor in network._inputs if tensor.is_shape_tensor}
                assert dynamic <= set(profile._ranges), f"no range for {dynamic - set(profile._ranges)}"
                assert set(profile._values) == shapes, "value ranges are for shape tensors, and all of them"
                _check_ranges(network._inputs, profile._ranges)
            module.levels.append(config.builder_optimization_level)
            module.tf32.append(config._tf32)
            if not _progress(config.progress_monitor, module):
                return None
            if module.problem:
                self._logger.log(severity.ERROR, module.problem)
                return None
            module.builds.append(network._path)
            header = {
                "version": version,
                "gpu": cuda.properties.name.decode(),
                "profiles": [[profile._ranges, profile._values] for profile in config._profiles],
                "shape_inputs": sorted(_shape_inputs(network._model.graph)),
                "memory": module.memory + 4096 + len(network._model.graph.node),
            }
            text, model = json.dumps(header).encode(), network._model.SerializeToString()
            return MAGIC + struct.pack("<I", len(text)) + text + model

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            check_logger(logger)
            assert bool(cuda.devices) > bool(cuda.error), "a Runtime without a device takes the process down"
            if module.refuse_runtime:
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
            data = bytes(serialized_engine)
            size = struct.unpack("<I", data[8:12])[0] if data[:8] == MAGIC else 0
            header = json.loads(data[12 : 12 + size]) if size else {}
            module.accepts -= 1
            refused = module.refuse and module.accepts < 0
            if refused or (header.get("version"), header.get("gpu")) != (version, cuda.properties.name.decode()):
                self._logger.log(severity.ERROR, module.refuse or "Serialization assertion failed: version mismatch")
                return None
            return ICudaEngine(header, data[12 + size :], self._logger)

    class ICudaEngine:
        def __init__(self, header: dict[str, Any], model: bytes, logger: ILogger) -> None:
            self._header, self._logger = header, logger
            self._session = _session(model)
            self._io = [*self._session.get_inputs(), *self._session.get_outputs()]
            self._inputs = [value.name for value in self._session.get_inputs()]
            graph = onnx.load_from_string(model).graph
            self._types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}

        @property
        def num_io_tensors(self) -> int:
            return len(self._io)

        @property
        def device_memory_size_v2(self) -> int:
            return int(self._header["memory"])

        def get_tensor_name(self, index: int) -> str:
            return str(self._io[index].name)

        def get_tensor_mode(self, name: str) -> Any:
            mode = made["TensorIOMode"]
            return mode.INPUT if name in self._inputs else mode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            return made["DataType"][_DTYPES[self._types[name]]]

        def get_tensor_location(self, name: str) -> Any:
            location = made["TensorLocation"]
            return location.HOST if name in self._header["shape_inputs"] else location.DEVICE

        def create_execution_context(self, strategy: Any) -> IExecutionContext:
            assert strategy is made["ExecutionContextAllocationStrategy"].USER_MANAGED
            module.contexts += 1
            return IExecutionContext(self)

    class IExecutionContext:
        def __init__(self, engine: ICudaEngine) -> None:
            self._engine = engine
            self._memory = (0, 0)
            self._profile: int | None = None
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._frozen = False  # a captured graph was made from it
            self._settled: Any = None

        def _change(self) -> None:
            assert not self._frozen, "a context that a graph was captured from must not change"

        def set_device_memory(self, memory: int, size: int) -> None:
            self._change()
            assert memory % 256 == 0
            assert size >= self._engine.device_memory_size_v2
            assert cuda.owns(memory, size)
            self._memory = (memory, size)

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            self._change()
            assert stream_handle in cuda.streams
            if profile_index >= len(self._engine._header["profiles"]):
                return False
            self._profile, self._shapes = profile_index, {}
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            self._change()
            assert isinstance(shape, tuple)
            assert self._profile is not None, "choose a profile first"
            if name not in self._engine._inputs:
                return False
            low, _, high = self._engine._header["profiles"][self._profile][0].get(name, (shape, shape, shape))
            self._shapes[name] = shape
            return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._change()
            assert memory, f"null address for {name}"
            self._addresses[name] = memory
            return any(value.name == name for value in self._engine._io)

        def infer_shapes(self) -> list[str]:
            wanted = self._engine._header["shape_inputs"]
            missing = [name for name in self._engine._inputs if name not in self._shapes]
            missing += [name for name in wanted if name not in self._addresses]
            if not missing and self._profile is not None:
                for name, (low, _, high) in self._engine._header["profiles"][self._profile][1].items():
                    assert low[0] <= self._value(name) <= high[0], f"{name} is outside the profile"
            return missing

        def _value(self, name: str) -> int:
            assert not cuda.owns(self._addresses[name], 8), f"{name} must be in host memory"
            return int(ctypes.c_int64.from_address(self._addresses[name]).value)

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            if name in self._shapes:
                return self._shapes[name]
            known: dict[str, int] = {}
            for value in self._engine._session.get_inputs():
                known |= {
                    d: s for d, s in zip(value.shape, self._shapes[value.name], strict=True) if isinstance(d, str)
                }
            for wanted in self._engine._header["shape_inputs"]:
                known[wanted] = self._value(wanted)
            if "grow" in known:
                known["wide"] = known["columns"] + known["grow"]
            symbolic = next(value.shape for value in self._engine._session.get_outputs() if value.name == name)
            return tuple(known[size] if isinstance(size, str) else size for size in symbolic)

        def execute_async_v3(self, stream_handle: int) -> bool:
            assert stream_handle in cuda.streams
            assert not cuda.last_error, "TensorRT would take an earlier failure for one of its kernels'"
            assert self._memory[0] in cuda.device, "no device memory was given, or it was freed"
            if module.enqueue_problem:
                self._engine._logger.log(severity.ERROR, module.enqueue_problem)
                return False
            assert not self.infer_shapes(), f"unset: {self.infer_shapes()}"
            engine = self._engine
            shapes = {value.name: self.get_tensor_shape(value.name) for value in engine._io}
            dtypes = {name: np.dtype(_NUMPY[_DTYPES[kind]]) for name, kind in engine._types.items()}
            host = set(engine._header["shape_inputs"])
            for name, shape in shapes.items():
                assert name in self._addresses, f"no address for {name}"
                size = int(np.prod(shape)) * dtypes[name].itemsize
                assert name in host or cuda.owns(self._addresses[name], max(size, 1)), f"{name} is not on the device"
            state = (tuple(shapes.items()), tuple(self._value(name) for name in sorted(host)))
            capturing = cuda.recording is not None
            if capturing:
                assert self._settled == state, "after a change of shapes run once before capturing"
                self._frozen = True
            self._settled = state
            addresses = dict(self._addresses)
            sizes = {name: np.array([self._value(name)], np.int64) for name in host}

            def work() -> None:
                feeds = {
                    name: sizes[name] if name in host else _view(addresses[name], shapes[name], dtypes[name])
                    for name in engine._inputs
                }
                names = [value.name for value in engine._session.get_outputs()]
                for name, result in zip(names, engine._session.run(names, feeds), strict=True):
                    assert result.shape == shapes[name], f"{name}: {result.shape}, announced {shapes[name]}"
                    _view(addresses[name], shapes[name], dtypes[name])[...] = result

            cuda.enqueue(stream_handle, work)
            return True

    local = [
        Builder, INetworkDefinition, ITensor, IBuilderConfig, IOptimizationProfile, OnnxParser, ParserError, Runtime,
        ICudaEngine, IExecutionContext, ITimingCache, ILogger, IProgressMonitor,
    ]  # fmt: skip
    for cls in local:
        offered = {name for name in vars(cls) if not name.startswith("_")}
        assert offered <= set(_members(cls.__name__, version)), f"{cls.__name__} offers more than {version} has"
    return made | {cls.__name__: cls for cls in local} | {"NetworkDefinitionCreationFlag": flags}


def _shape_inputs(graph: onnx.GraphProto) -> set[str]:
    """Inputs that shapes depend on: K of TopK, and pads of Pad through a Concat."""
    sources = {name for node in graph.node if node.op_type in ("TopK", "Pad") for name in node.input[1:2]}
    for node in graph.node:
        if node.op_type == "Concat" and set(node.output) & sources:
            sources |= set(node.input)
    return {value.name for value in graph.input if value.name in sources}


def _check_ranges(inputs: list[Any], ranges: dict[str, list[list[int]]]) -> None:
    """Static sizes stay; one name has one range in all inputs."""
    seen: dict[str, tuple[int, ...]] = {}
    for tensor in inputs:
        for axis, size in enumerate(tensor._shape):
            if tensor.name in ranges:
                mine = tuple(each[axis] for each in ranges[tensor.name])
                expected = seen.setdefault(size, mine) if isinstance(size, str) else (size,) * 3
                assert mine == expected, f"{tensor.name}: {mine} for {size}, expected {expected}"


def _progress(monitor: Any, module: FakeTensorRT) -> bool:
    """Report phases from the builder's own thread, as TensorRT does; False where the monitor ends the build."""
    if monitor is None:
        return True
    assert monitor.initialised, "IProgressMonitor.__init__ was not called"
    going: list[bool] = []

    def work() -> None:
        monitor.phase_start("Building Engine", None, 2)
        monitor.phase_start("Tactics", "Building Engine", 5)
        module.slow()
        going.append(monitor.step_complete("Tactics", 0))
        monitor.phase_finish("Tactics")
        going.append(monitor.step_complete("Building Engine", 0))
        monitor.phase_finish("Building Engine")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return all(going)


_SESSIONS: dict[str, Any] = {}


def _session(model: bytes) -> Any:
    key = hashlib.sha256(model).hexdigest()
    if key not in _SESSIONS:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        _SESSIONS[key] = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return _SESSIONS[key]


def _view(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    size = int(np.prod(shape)) * dtype.itemsize
    if not size:
        return np.zeros(shape, dtype)
    return np.frombuffer((ctypes.c_byte * size).from_address(address), dtype).reshape(shape)
