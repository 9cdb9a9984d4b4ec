"""The Hopper kernels of ``csrc`` on torch tensors: fast forms of ``reference``, bit for bit where they pack.

Plain functions of tensors on one CUDA device; ``why_not`` says for which devices and dtypes. They launch on torch's
current stream, allocate with torch's allocator, never wait for the GPU, and can be captured in a CUDA graph.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import compile, layout, reference, schedule
from .schedule import CLUSTER, MAX_CLUSTERS, TILE_COLUMNS, TILE_ROWS

ELEMENTS = {torch.bfloat16: '"bf16"', torch.float16: '"f16"'}
_THREADS = 256  # a block of the packing kernels
# of sparse_mm.cu
MATMUL_STARTS_WITH = 128  # registers: see there
_STAGES = 5
_MATMUL_THREADS = 512
_MATMUL_SHARED_BYTES = _STAGES * 64 * (TILE_ROWS + 2 * TILE_COLUMNS) + 1024  # 1024: to align the first stage


@torch.compiler.assume_constant_result
def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Why there is no fast kernel for tensors of ``dtype`` on ``device``; empty if there is."""
    if device.type != "cuda":
        return f"there is no 2:4 kernel for {device.type}"
    return _why_not_gpu(device.index or 0) or (
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
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        return "the 2:4 kernels are compiled through cuda-core, which is missing: pip install 'ao_act24[cuda]'"
    return ""


def relu2_sparsify(h: Tensor) -> tuple[Tensor, Tensor]:
    """As ``reference.relu2_sparsify``, bit for bit. Reads ``h`` once; rows may be strided."""
    hidden_dim = h.shape[-1]
    packed = h.new_empty((*h.shape[:-1], hidden_dim // 2))
    metadata = h.new_empty(layout.metadata_shape(h.shape), dtype=torch.uint8)
    if h.numel() == 0:
        return packed, metadata
    rows = (h if h.stride(-1) == 1 else h.contiguous()).reshape(-1, hidden_dim)
    count, stride = rows.shape[0], rows.stride(0)
    vectors = hidden_dim % 16 == 0 and rows.data_ptr() % 16 == 0 and (stride % 8 == 0 or count == 1)
    entry, columns, at_once = ("relu2_sparsify", 16, 2) if vectors else ("relu2_sparsify_any", 8, 1)
    grid = -(-8 * metadata.shape[1] // (_THREADS * columns)), min(metadata.shape[0] // at_once, 65535)
    kernel = _packing_kernel(entry, h.dtype, h.device.index)
    values = (ctypes.c_int64 * 6)(rows.data_ptr(), stride, packed.data_ptr(), metadata.data_ptr(), count, hidden_dim)
    _launch(h.device.index, kernel, grid, _THREADS, 0, _addresses(values))
    return packed, metadata


def sparse_mm(packed: Tensor, metadata: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``reference.sparse_mm``: fp32 accumulation, rounded once. Deterministic.

    The kernel takes H divisible by 64 and D by 8; else this unpacks and multiplies dense.
    """
    model_dim, hidden_dim = weight.shape
    out = packed.new_empty((*packed.shape[:-1], model_dim))
    tokens = out.numel() // model_dim if model_dim else 0
    if tokens == 0 or hidden_dim == 0 or hidden_dim % 64 or model_dim % 8:
        return torch.nn.functional.linear(reference.unpack(packed, metadata), weight, bias)
    packed, metadata, weight = map(_aligned, (packed, metadata, weight))
    bias = None if bias is None else _aligned(bias)
    plan = _plan(tokens, model_dim, hidden_dim, packed.dtype, packed.device.index)
    pointers = (ctypes.c_int64 * 5)(metadata.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr())
    if plan.partial_floats:
        partial = packed.new_empty(plan.partial_floats, dtype=torch.float32)
        flags = packed.new_zeros(plan.blocks, dtype=torch.int32)
        pointers[3], pointers[4] = partial.data_ptr(), flags.data_ptr()
    packed_map = _tensor_map(packed.data_ptr(), packed.dtype, tokens, hidden_dim // 2, TILE_ROWS, 32)
    weight_map = _tensor_map(weight.data_ptr(), weight.dtype, model_dim, hidden_dim, TILE_COLUMNS // CLUSTER, 64)
    arguments = (*map(ctypes.addressof, (packed_map, weight_map)), *_addresses(pointers), ctypes.addressof(plan.shape))
    _launch(packed.device.index, plan.kernel, (plan.blocks, 1), _MATMUL_THREADS, _MATMUL_SHARED_BYTES, arguments)
    return out


@dataclass(frozen=True)
class _Plan:
    kernel: Any
    shape: schedule.Shape
    blocks: int
    partial_floats: int


@functools.lru_cache(maxsize=1024)
def _plan(tokens: int, model_dim: int, hidden_dim: int, dtype: torch.dtype, index: int) -> _Plan:
    kernel, clusters = _matmul_kernel(dtype, index)
    shape, at_work = schedule.share_out(tokens, model_dim, hidden_dim, clusters)
    blocks = CLUSTER * at_work
    return _Plan(kernel, shape, blocks, blocks * TILE_ROWS * TILE_COLUMNS if schedule.is_cut(shape) else 0)


@functools.cache
def _packing_kernel(entry: str, dtype: torch.dtype, index: int) -> Any:
    kernel = compile.kernel("relu2_sparsify", entry, {"ELEMENT": ELEMENTS[dtype]}, index)
    return _function(kernel, index)


@functools.cache
def _matmul_kernel(dtype: torch.dtype, index: int) -> tuple[Any, int]:
    """The kernel, and how many of its clusters the device holds at a time."""
    driver = _driver()
    loaded = compile.kernel(
        "sparse_mm", "sparse_mm", matmul_defines(dtype), index, _MATMUL_SHARED_BYTES, MATMUL_STARTS_WITH
    )
    blocks = torch.cuda.get_device_properties(index).multi_processor_count // CLUSTER * CLUSTER
    config = driver.CUlaunchConfig()
    config.gridDimX, config.blockDimX, config.sharedMemBytes = blocks, _MATMUL_THREADS, _MATMUL_SHARED_BYTES
    config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
    function = _function(loaded, index)
    with torch.cuda.device(index):
        _, clusters = _checked("cuOccupancyMaxActiveClusters", driver.cuOccupancyMaxActiveClusters(function, config))
    return function, min(clusters, blocks // CLUSTER, MAX_CLUSTERS)


def matmul_defines(dtype: torch.dtype) -> dict[str, int | str]:
    return {"ELEMENT": ELEMENTS[dtype], "CLUSTER": CLUSTER, "STAGES": _STAGES}


def _function(kernel: Any, index: int) -> Any:
    """``kernel`` as device ``index`` runs it."""
    with torch.cuda.device(index):
        return _checked("cuKernelGetFunction", _driver().cuKernelGetFunction(kernel.handle))[1]


@functools.lru_cache(maxsize=1024)
def _tensor_map(pointer: int, dtype: torch.dtype, rows: int, columns: int, box_rows: int, box_columns: int) -> Any:
    """What a bulk tensor copy needs of a contiguous matrix: it copies boxes whose rows are swizzled by their length."""
    driver = _driver()
    types = driver.CUtensorMapDataType
    swizzles = driver.CUtensorMapSwizzle
    result = driver.cuTensorMapEncodeTiled(
        types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if dtype == torch.bfloat16 else types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        2,
        pointer,
        [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
        [driver.cuuint64_t(2 * columns)],
        [driver.cuuint32_t(box_columns), driver.cuuint32_t(box_rows)],
        [driver.cuuint32_t(1), driver.cuuint32_t(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzles.CU_TENSOR_MAP_SWIZZLE_128B if box_columns == 64 else swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    _, encoded = _checked("cuTensorMapEncodeTiled", result)
    return (ctypes.c_uint64 * 16)(*(int(word) for word in encoded.opaque))


def _aligned(tensor: Tensor) -> Tensor:
    """``tensor`` row after row from a multiple of 16 bytes on, as the copy engine needs it; copied if it must be."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _checked(call: str, result: tuple[Any, ...]) -> tuple[Any, ...]:
    if int(result[0]) != 0:
        raise RuntimeError(f"{call} failed: {result[0].name}")
    return result


def _addresses(values: "ctypes.Array[ctypes.c_int64]") -> range:
    start = ctypes.addressof(values)
    return range(start, start + 8 * len(values), 8)


def _launch(
    index: int, kernel: Any, grid: tuple[int, int], threads: int, shared_bytes: int, arguments: Sequence[int]
) -> None:
    """On torch's current stream of device ``index``. ``arguments``: their addresses."""
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return _launch(index, kernel, grid, threads, shared_bytes, arguments)
    stream = torch._C._cuda_getCurrentRawStream(index)
    addresses = (ctypes.c_void_p * len(arguments))(*arguments)
    result = _driver().cuLaunchKernel(
        kernel, *grid, 1, threads, 1, 1, shared_bytes, stream, ctypes.addressof(addresses), 0
    )
    _checked("cuLaunchKernel", result)
