"""Launching a kernel through the CUDA driver: arguments that are put together once, and tensor maps."""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch

POINTER = None  # in the arguments of a launch: a pointer, which each call brings


class Launch:
    """A launch on torch's current stream that is ready but for the stream and the pointers.

    ``arguments`` are in the kernel's order: ctypes objects, and ``POINTER``. ``early``: the kernel may start before
    the one launched before it has ended, for whose end it waits itself. ``cluster``: so many blocks along x.
    """

    def __init__(
        self,
        index: int,
        kernel: Any,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Any],
        early: bool = False,
        cluster: int = 1,
    ) -> None:
        self._index, self._kept = index, arguments
        self._pointers = (ctypes.c_uint64 * arguments.count(POINTER))()
        slots = (ctypes.addressof(self._pointers) + 8 * slot for slot in range(len(self._pointers)))
        addresses = [next(slots) if argument is POINTER else ctypes.addressof(argument) for argument in arguments]
        self._addresses = (ctypes.c_void_p * len(addresses))(*addresses)
        self._config = configuration(grid, threads, shared_bytes, cluster, early)
        self._rest = kernel, ctypes.addressof(self._addresses), 0
        self._launch = driver().cuLaunchKernelEx
        if early:  # a multiprocessor that has to part its memory anew ends all that it runs first
            carveout = driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            checked("cuFuncSetAttribute", driver().cuFuncSetAttribute(kernel, carveout, 100))  # per cent

    def __call__(self, *pointers: int) -> None:
        self._pointers[:] = pointers  # type: ignore[call-overload]  # any sequence will do
        self._config.hStream = torch._C._cuda_getCurrentRawStream(self._index)
        checked("cuLaunchKernelEx", self._launch(self._config, *self._rest))


def configuration(grid: tuple[int, int], threads: int, shared_bytes: int, cluster: int = 1, early: bool = False) -> Any:
    """A ``CUlaunchConfig``, but for the stream; arguments as of ``Launch``."""
    api, attributes = driver(), []

    def attribute(kind: str) -> Any:
        attributes.append(api.CUlaunchAttribute())
        attributes[-1].id = getattr(api.CUlaunchAttributeID, f"CU_LAUNCH_ATTRIBUTE_{kind}")
        return attributes[-1].value

    if early:
        attribute("PROGRAMMATIC_STREAM_SERIALIZATION").programmaticStreamSerializationAllowed = 1
    if cluster > 1:
        size = attribute("CLUSTER_DIMENSION").clusterDim
        size.x, size.y, size.z = cluster, 1, 1
    config = api.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.attrs, config.numAttrs = shared_bytes, attributes, len(attributes)
    return config


def most_clusters(kernel: Any, config: Any, index: int) -> int:
    """How many clusters of such a launch the device runs at a time."""
    with torch.cuda.device(index):
        return int(checked("cuOccupancyMaxActiveClusters", driver().cuOccupancyMaxActiveClusters(kernel, config))[1])


def set_current(index: int) -> None:
    """Make the device's context the calling thread's: the driver needs one, and torch makes it current late."""
    from cuda.core import Device

    Device(index).set_current()


@functools.cache
def driver() -> Any:
    from cuda.bindings import driver as bindings

    return bindings


def checked(call: str, result: tuple[Any, ...]) -> tuple[Any, ...]:
    if int(result[0]) != 0:
        raise RuntimeError(f"{call} failed: {result[0].name}")
    return result


class TensorMap:
    """What a bulk tensor copy needs of a matrix in memory, to bring in boxes of it, rows swizzled by their length.

    ``sizes``, innermost first, of the array that the matrix is taken as: a row or a part of one, then as many
    dimensions as it takes to put all in order; ``strides`` of these in bytes, multiples of 16; ``box`` as ``sizes``.
    """

    def __init__(self, dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> None:
        api = driver()
        types, swizzles = api.CUtensorMapDataType, api.CUtensorMapSwizzle
        bfloat16, float16 = types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
        result = api.cuTensorMapEncodeTiled(
            bfloat16 if dtype == torch.bfloat16 else float16,
            len(sizes),
            256,  # any address: the real one comes with each call
            [api.cuuint64_t(size) for size in sizes],
            [api.cuuint64_t(stride) for stride in strides],
            [api.cuuint32_t(size) for size in box],
            [api.cuuint32_t(1)] * len(sizes),
            api.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzles.CU_TENSOR_MAP_SWIZZLE_128B if box[0] == 64 else swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
            api.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            api.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        _, encoded = checked("cuTensorMapEncodeTiled", result)
        memory = ctypes.create_string_buffer(128 + 64)
        offset = -ctypes.addressof(memory) % 64  # the driver asks for it
        self.words = (ctypes.c_uint64 * 16).from_buffer(memory, offset)
        self.words[:] = [int(word) for word in encoded.opaque]
        self._map = api.CUtensorMap(_ptr=ctypes.addressof(self.words))
        self._replace = api.cuTensorMapReplaceAddress

    def point_to(self, pointer: int) -> None:
        checked("cuTensorMapReplaceAddress", self._replace(self._map, pointer))
