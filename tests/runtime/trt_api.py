"""The parts of TensorRT's Python bindings that rsedge uses, or must not use, and the versions that have them.

Read from the bindings themselves (``tensorrt-cu12-bindings`` 10.3.0 and 10.16.1, ``tensorrt-cu13-bindings`` 11.4.0);
``test_trt_api.py`` compares the table with whatever bindings are installed. The stand-in in ``tests/fake_tensorrt.py``
offers exactly the names its version has here.
"""

from __future__ import annotations

VERSIONS = ("10.3.0", "10.16.1.11", "11.4.0.106")

ALL = VERSIONS
TEN = VERSIONS[:2]
FROM_10_16 = VERSIONS[1:]

API: dict[str, dict[str, tuple[str, ...]]] = {
    "Builder": {
        "create_network": ALL,
        "create_builder_config": ALL,
        "create_optimization_profile": ALL,
        "build_serialized_network": ALL,
        "platform_has_fast_fp16": TEN,
    },
    "INetworkDefinition": {"num_inputs": ALL, "get_input": ALL},
    "ITensor": {"name": ALL, "is_shape_tensor": ALL},
    "IBuilderConfig": {
        "builder_optimization_level": ALL,
        "set_memory_pool_limit": ALL,
        "clear_flag": ALL,
        "add_optimization_profile": ALL,
        "create_timing_cache": ALL,
        "set_timing_cache": ALL,
        "get_timing_cache": ALL,
        "progress_monitor": ALL,
    },
    "IOptimizationProfile": {"set_shape": ALL, "set_shape_input": ALL},
    "OnnxParser": {
        "parse_from_file": ALL,
        "num_errors": ALL,
        "get_error": ALL,
        "supports_model": TEN,
    },
    "ParserError": {"node": ALL, "node_name": ALL, "node_operator": ALL, "desc": ALL},
    "Runtime": {"deserialize_cuda_engine": ALL},
    "ICudaEngine": {
        "create_execution_context": ALL,
        "create_execution_context_without_device_memory": TEN,
        "create_runtime_config": FROM_10_16,
        "device_memory_size": TEN,
        "device_memory_size_v2": ALL,
        "num_io_tensors": ALL,
        "get_tensor_name": ALL,
        "get_tensor_mode": ALL,
        "get_tensor_dtype": ALL,
        "get_tensor_location": ALL,
    },
    "IExecutionContext": {
        "set_device_memory": ALL,
        "set_optimization_profile_async": ALL,
        "set_input_shape": ALL,
        "set_tensor_address": ALL,
        "infer_shapes": ALL,
        "get_tensor_shape": ALL,
        "execute_async_v3": ALL,
    },
    "ITimingCache": {"serialize": ALL},
    "ILogger": {"log": ALL, "Severity": ALL},
    "IProgressMonitor": {"phase_start": ALL, "step_complete": ALL, "phase_finish": ALL},
    "NetworkDefinitionCreationFlag": {"STRONGLY_TYPED": ALL, "EXPLICIT_BATCH": TEN},
    "BuilderFlag": {"TF32": ALL, "FP16": TEN, "EDITABLE_TIMING_CACHE": FROM_10_16},
    "MemoryPoolType": {"WORKSPACE": ALL},
    "ExecutionContextAllocationStrategy": {"STATIC": ALL, "USER_MANAGED": ALL},
    "TensorIOMode": {"INPUT": ALL, "OUTPUT": ALL},
    "TensorLocation": {"HOST": ALL, "DEVICE": ALL},
    "DataType": {"FLOAT": ALL, "HALF": ALL, "INT64": ALL, "INT32": ALL, "UINT8": ALL, "INT8": ALL, "BOOL": ALL},
}
"""Class → member → versions."""

SIGNATURES = {
    "Builder.create_network": ("flags",),
    "Builder.build_serialized_network": ("network", "config"),
    "IBuilderConfig.set_memory_pool_limit": ("pool", "pool_size"),
    "IBuilderConfig.clear_flag": ("flag",),
    "IBuilderConfig.add_optimization_profile": ("profile",),
    "IBuilderConfig.create_timing_cache": ("serialized_timing_cache",),
    "IBuilderConfig.set_timing_cache": ("cache", "ignore_mismatch"),
    "IOptimizationProfile.set_shape": ("input", "min", "opt", "max"),
    "IOptimizationProfile.set_shape_input": ("input", "min", "opt", "max"),
    "OnnxParser.__init__": ("network", "logger"),
    "OnnxParser.parse_from_file": ("model",),
    "OnnxParser.get_error": ("index",),
    "Runtime.__init__": ("logger",),
    "Runtime.deserialize_cuda_engine": ("serialized_engine",),
    "ICudaEngine.create_execution_context": ("strategy",),
    "ICudaEngine.get_tensor_name": ("index",),
    "ICudaEngine.get_tensor_mode": ("name",),
    "ICudaEngine.get_tensor_dtype": ("name",),
    "ICudaEngine.get_tensor_location": ("name",),
    "IExecutionContext.set_device_memory": ("memory", "size"),
    "IExecutionContext.set_optimization_profile_async": ("profile_index", "stream_handle"),
    "IExecutionContext.set_input_shape": ("name", "shape"),
    "IExecutionContext.set_tensor_address": ("name", "memory"),
    "IExecutionContext.get_tensor_shape": ("name",),
    "IExecutionContext.execute_async_v3": ("stream_handle",),
    "ILogger.log": ("severity", "msg"),
    "IProgressMonitor.phase_start": ("phase_name", "parent_phase", "num_steps"),
    "IProgressMonitor.step_complete": ("phase_name", "step"),
    "IProgressMonitor.phase_finish": ("phase_name",),
}
"""Arguments that rsedge passes, in order: one documented overload must begin with them."""

CUDA = (
    "cudaGetDeviceCount", "cudaGetDeviceProperties", "cudaSetDevice", "cudaMalloc", "cudaFree", "cudaMallocHost",
    "cudaFreeHost", "cudaMemcpyAsync", "cudaStreamCreateWithFlags", "cudaStreamDestroy", "cudaStreamSynchronize",
    "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphLaunch",
    "cudaGraphExecDestroy", "cudaGraphDestroy", "cudaGetLastError", "cudaGetErrorString",
)  # fmt: skip
"""Functions of cuda-python's runtime module."""
CUDA_VALUES = {
    "cudaMemcpyKind": ("cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost", "cudaMemcpyDeviceToDevice"),
    "cudaStreamCaptureMode": ("cudaStreamCaptureModeThreadLocal",),
    "cudaDeviceProp": ("name", "major", "minor", "totalGlobalMem", "integrated", "multiProcessorCount"),
}
