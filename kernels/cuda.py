"""The Hopper kernels of ``csrc`` on torch tensors: fast forms of ``reference``, bit for bit where they pack.

Plain functions of tensors on one CUDA device; ``why_not`` says for which devices and dtypes. They launch on torch's
current stream, allocate with torch's allocator, never wait for the GPU, and can be captured in a CUDA graph.
"""

import ctypes
import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from . import compile, layout, reference, schedule
from .schedule import CLUSTER, TILE_COLUMNS, TILE_ROWS

ELEMENTS = {torch.bfloat16: '"bf16"', torch.float16: '"f16"'}
_THREADS = 256  # a block of the packing kernels
# of the matmuls, tiles.cuh
MATMUL_THREADS = 512
MATMUL_STARTS_WITH = 128  # registers: see there
K = 64  # columns of A and B in a stage
# RUN: columns that four threads hold a quarter each of; A_COLUMNS: of A in a stage, as it is stored
DEFINES = {
    "sparse_mm": {"STAGES": 5, "RUN": 32, "A_COLUMNS": 32},  # with 8 columns, two threads fill a sector of memory
    "linear_relu2_sparsify": {"STAGES": 4, "RUN": 64, "A_COLUMNS": 64},  # 16: as many as a thread stores metadata of
}


@torch.compiler.assume_constant_result
def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Why there is no fast kernel for tensors of ``dtype`` on ``device``; empty if there is."""
    if device.type != "cuda":
        return f"there is no 2:4 kernel for {device.type}"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _why_not_gpu(index) or (
        "" if dtype in ELEMENTS else f"the 2:4 kernels take bfloat16 and float16, got {dtype}"
    )


@functools.cache
def _why_not_gpu(index: int) -> str:
    capability = torch.cuda.get_device_capability(index)
    if capability != (9, 0):
        name = torch.cuda.get_device_name(index)
        return (
            f"the 2:4 kernels need a Hopper GPU (compute capability 9.0), got {name} ({capability[0]}.{capability[1]})"
        )
    return compile.missing()


def relu2_sparsify(h: Tensor) -> tuple[Tensor, Tensor]:
    """As ``reference.relu2_sparsify``, bit for bit. Reads ``h`` once; rows may be strided."""
    index = h.get_device()
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return relu2_sparsify(h)
    rows, stride = h, h.shape[-1]
    if not h.is_contiguous():
        rows = (h if h.stride(-1) == 1 else h.contiguous()).reshape(-1, stride)
        stride = rows.stride(0)
    pointer = rows.data_ptr()
    plan = _plans.packing(h.shape, stride, pointer % 16 == 0, h.dtype, index)
    packed, metadata = _empty(*plan.packed), _empty(*plan.metadata)
    if plan.launch:
        plan.launch(pointer, packed.data_ptr(), metadata.data_ptr())
    return packed, metadata


def linear_relu2_sparsify(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``relu2_sparsify(linear(x, weight, bias))`` in one kernel: fp32 accumulation, rounded once, deterministic.

    The kernel takes D divisible by 8 and H by 64; else two kernels do it.
    """
    index = x.get_device()
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return linear_relu2_sparsify(x, weight, bias)
    plan = _plans.linear_relu2_sparsify(x.shape, weight.shape, x.dtype, index)
    if plan is None:
        return relu2_sparsify(linear(x, weight, bias))
    packed, metadata = (_empty(*shape) for shape in plan.outputs)
    bias = None if bias is None else _aligned(bias)
    plan.run(
        _aligned(x), _aligned(weight), 0 if bias is None else bias.data_ptr(), packed.data_ptr(), metadata.data_ptr()
    )
    return packed, metadata


def sparse_mm(packed: Tensor, metadata: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``reference.sparse_mm``: fp32 accumulation, rounded once. Deterministic.

    The kernel takes H and D divisible by 64. For another D the weight is copied into a larger one; for another H this
    unpacks and multiplies dense.
    """
    index = packed.get_device()
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return sparse_mm(packed, metadata, weight, bias)
    if weight.shape[0] % 64:
        more = -weight.shape[0] % 64
        weight, bias = pad(weight, (0, 0, 0, more)), None if bias is None else pad(bias, (0, more))
        return sparse_mm(packed, metadata, weight, bias)[..., :-more].contiguous()
    plan = _plans.sparse_mm(packed.shape, weight.shape, packed.dtype, index)
    if plan is None:
        return linear(reference.unpack(packed, metadata), weight, bias)
    metadata = _aligned(metadata)
    bias = None if bias is None else _aligned(bias)
    (out,) = (_empty(*shape) for shape in plan.outputs)
    plan.run(
        _aligned(packed), _aligned(weight), metadata.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr()
    )
    return out


# Shape, strides and dtype of a tensor to allocate on the current device, as Inductor's generated code does it: a plain
# function, past torch's dispatcher, in less than half of ``new_empty``'s time.
_Empty = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
_empty = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]


def _contiguous(shape: Sequence[int], dtype: torch.dtype) -> _Empty:
    return tuple(shape), torch.empty(shape, device="meta").stride(), dtype


# A plan is all that a call needs and that its pointers do not change. The arguments of a launch are written into it, so
# each thread has its own; and so that each thread has made the device's context its own before it launches.
@dataclass(frozen=True)
class _Packing:
    packed: _Empty
    metadata: _Empty
    launch: "_Launch | None"  # None: there is nothing to do


def _packing(shape: torch.Size, stride: int, aligned: bool, dtype: torch.dtype, index: int) -> _Packing:
    _set_current(index)
    *tokens, hidden_dim = shape
    height, width = layout.metadata_shape(shape)
    packed, metadata = _contiguous((*tokens, hidden_dim // 2), dtype), _contiguous((height, width), torch.uint8)
    if shape.numel() == 0:
        return _Packing(packed, metadata, None)
    count = shape.numel() // hidden_dim
    vectors = hidden_dim % 16 == 0 and aligned and (stride % 8 == 0 or count == 1)
    entry, columns, rows = ("relu2_sparsify", 16, 2) if vectors else ("relu2_sparsify_any", 8, 1)  # of a thread
    kernel = _packing_kernel(entry, dtype, index)
    grid = -(-8 * width // (_THREADS * columns)), min(height // rows, 65535)
    # h, stride, packed, metadata, count, hidden_dim
    arguments = (POINTER, ctypes.c_int64(stride), POINTER, POINTER, ctypes.c_int64(count), ctypes.c_int64(hidden_dim))
    return _Packing(packed, metadata, _Launch(index, kernel, grid, _THREADS, 0, arguments))


@dataclass(frozen=True)
class _Matmul:
    outputs: tuple[_Empty, ...]
    a_maps: Sequence["_TensorMap"]  # by whole tiles, and by lower ones
    weight_map: "_TensorMap"
    launch: "_Launch"

    def run(self, a: Tensor, weight: Tensor, *pointers: int) -> None:
        for a_map in self.a_maps:
            a_map.point_to(a.data_ptr())
        self.weight_map.point_to(weight.data_ptr())
        self.launch(*pointers)


def _sparse_mm(packed: torch.Size, weight: torch.Size, dtype: torch.dtype, index: int) -> _Matmul | None:
    """None where the kernel does not take these sizes."""
    model_dim, hidden_dim = weight
    if packed.numel() == 0 or model_dim == 0 or hidden_dim % 64:
        return None
    _set_current(index)
    tokens = packed.numel() // packed[-1]
    outputs = (_contiguous((*packed[:-1], model_dim), dtype),)
    # maps, metadata, bias, out, shape
    return _matmul("sparse_mm", tokens, model_dim, hidden_dim, dtype, index, outputs)


def _linear_relu2_sparsify(x: torch.Size, weight: torch.Size, dtype: torch.dtype, index: int) -> _Matmul | None:
    """None where the kernel does not take these sizes."""
    hidden_dim, model_dim = weight
    if x.numel() == 0 or hidden_dim == 0 or hidden_dim % 64 or model_dim % 8:
        return None
    _set_current(index)
    tokens = x.numel() // model_dim
    hidden = (*x[:-1], hidden_dim)
    outputs = (
        _contiguous((*x[:-1], hidden_dim // 2), dtype),
        _contiguous(layout.metadata_shape(hidden), torch.uint8),
    )
    # maps, bias, packed, metadata, shape
    return _matmul("linear_relu2_sparsify", tokens, hidden_dim, model_dim, dtype, index, outputs)


class _Plans(threading.local):
    def __init__(self) -> None:
        cached = functools.lru_cache(maxsize=1024)
        self.packing, self.sparse_mm = cached(_packing), cached(_sparse_mm)
        self.linear_relu2_sparsify = cached(_linear_relu2_sparsify)


_plans = _Plans()


def _matmul(
    name: str, tokens: int, columns: int, depth: int, dtype: torch.dtype, index: int, outputs: tuple[_Empty, ...]
) -> _Matmul:
    kernel, clusters = _matmul_kernel(name, dtype, index)
    stages = -(-depth // 256) * 4 if name == "sparse_mm" else -(-depth // K)  # metadata comes by four stages
    shape, clusters = schedule.share_out(tokens, columns, stages, clusters)
    a_columns, run = DEFINES[name]["A_COLUMNS"], DEFINES[name]["RUN"]
    a_size = depth * a_columns // K, tokens
    a_maps = [_TensorMap(dtype, a_size, (1,), (a_columns, 64 * height)) for height in (3, shape.lower_height)]
    # In the order of tiles.cuh: of every RUN rows, row RUN / 4 * q + 2 a + b comes to lie at 8 a + 2 q + b.
    weight_box = K, 2, 4, run // 8, TILE_COLUMNS // CLUSTER // run
    weight_map = _TensorMap(dtype, (depth, 2, 4, run // 8, columns // run), (1, run // 4, 2, run), weight_box)
    arguments = (*(each.words for each in (*a_maps, weight_map)), *[POINTER] * 3, shape)
    launch = _Launch(index, kernel, (CLUSTER * clusters, 1), MATMUL_THREADS, _shared_bytes(name), arguments)
    return _Matmul(outputs, a_maps, weight_map, launch)


@functools.cache
def _packing_kernel(entry: str, dtype: torch.dtype, index: int) -> Any:
    kernel = compile.kernel("relu2_sparsify", entry, {"ELEMENT": ELEMENTS[dtype]}, index)
    return _function(kernel, index)


@functools.cache
def _matmul_kernel(name: str, dtype: torch.dtype, index: int) -> tuple[Any, int]:
    """The kernel, and how many of its clusters the device holds at a time."""
    driver, shared_bytes = _driver(), _shared_bytes(name)
    loaded = compile.kernel(name, name, matmul_defines(name, dtype), index, shared_bytes, MATMUL_STARTS_WITH)
    blocks = torch.cuda.get_device_properties(index).multi_processor_count // CLUSTER * CLUSTER
    config = driver.CUlaunchConfig()
    config.gridDimX, config.blockDimX, config.sharedMemBytes = blocks, MATMUL_THREADS, shared_bytes
    config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
    function = _function(loaded, index)
    with torch.cuda.device(index):
        _, clusters = _checked("cuOccupancyMaxActiveClusters", driver.cuOccupancyMaxActiveClusters(function, config))
    return function, min(clusters, blocks // CLUSTER)


def matmul_defines(name: str, dtype: torch.dtype) -> dict[str, int | str]:
    return {"ELEMENT": ELEMENTS[dtype], "CLUSTER": CLUSTER, **DEFINES[name]}


def _shared_bytes(name: str) -> int:
    stage = 2 * (TILE_ROWS * DEFINES[name]["A_COLUMNS"] + TILE_COLUMNS * K)
    return DEFINES[name]["STAGES"] * stage + 1024  # to align the first one


def _function(kernel: Any, index: int) -> Any:
    """``kernel`` as device ``index`` runs it."""
    with torch.cuda.device(index):
        return _checked("cuKernelGetFunction", _driver().cuKernelGetFunction(kernel.handle))[1]


class _TensorMap:
    """What a bulk tensor copy needs of a matrix in memory, to bring in boxes of it, rows swizzled by their length.

    ``sizes``, innermost first, of the array that the matrix is taken as: columns, then rows, in as many dimensions as
    it takes to put them in order; ``strides`` of these in rows; ``box`` as ``sizes``.
    """

    def __init__(self, dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> None:
        driver = _driver()
        types, swizzles = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
        bfloat16, float16 = types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
        result = driver.cuTensorMapEncodeTiled(
            bfloat16 if dtype == torch.bfloat16 else float16,
            len(sizes),
            256,  # any address: the real one comes with each call
            [driver.cuuint64_t(size) for size in sizes],
            [driver.cuuint64_t(2 * sizes[0] * stride) for stride in strides],
            [driver.cuuint32_t(size) for size in box],
            [driver.cuuint32_t(1)] * len(sizes),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzles.CU_TENSOR_MAP_SWIZZLE_128B if box[0] == 64 else swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        _, encoded = _checked("cuTensorMapEncodeTiled", result)
        memory = ctypes.create_string_buffer(128 + 64)
        offset = -ctypes.addressof(memory) % 64  # the driver asks for it
        self.words = (ctypes.c_uint64 * 16).from_buffer(memory, offset)
        self.words[:] = [int(word) for word in encoded.opaque]
        self._map = driver.CUtensorMap(_ptr=ctypes.addressof(self.words))
        self._replace = driver.cuTensorMapReplaceAddress

    def point_to(self, pointer: int) -> None:
        _checked("cuTensorMapReplaceAddress", self._replace(self._map, pointer))


def _aligned(tensor: Tensor) -> Tensor:
    """``tensor`` row after row from a multiple of 16 bytes on, as the copy engine needs it; copied if it must be."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


POINTER = None  # in the arguments of a launch: a pointer, which each call brings


class _Launch:
    """A launch on torch's current stream that is ready but for the stream and the pointers.

    ``arguments`` are in the kernel's order: ctypes objects, and ``POINTER``.
    """

    def __init__(
        self, index: int, kernel: Any, grid: tuple[int, int], threads: int, shared_bytes: int, arguments: Sequence[Any]
    ) -> None:
        self._index, self._kept = index, arguments
        self._pointers = (ctypes.c_uint64 * arguments.count(POINTER))()
        slots = (ctypes.addressof(self._pointers) + 8 * slot for slot in range(len(self._pointers)))
        addresses = [next(slots) if argument is POINTER else ctypes.addressof(argument) for argument in arguments]
        self._addresses = (ctypes.c_void_p * len(addresses))(*addresses)
        self._start = kernel, *grid, 1, threads, 1, 1, shared_bytes
        self._end = ctypes.addressof(self._addresses), 0
        self._driver = _driver()

    def __call__(self, *pointers: int) -> None:
        self._pointers[:] = pointers  # type: ignore[call-overload]  # any sequence will do
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        _checked("cuLaunchKernel", self._driver.cuLaunchKernel(*self._start, stream, *self._end))


def _set_current(index: int) -> None:
    """Make the device's context the calling thread's: the driver needs one, and torch makes it current late."""
    from cuda.core import Device

    Device(index).set_current()


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _checked(call: str, result: tuple[Any, ...]) -> tuple[Any, ...]:
    if int(result[0]) != 0:
        raise RuntimeError(f"{call} failed: {result[0].name}")
    return result
