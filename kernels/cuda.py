"""The Hopper kernels of ``csrc`` on torch tensors: fast forms of ``reference``, bit for bit where they pack.

Plain functions of tensors on one CUDA device; ``why_not`` says for which devices and dtypes. They launch on torch's
current stream, allocate with torch's allocator, never wait for the GPU, and can be captured in a CUDA graph.
"""

import ctypes
import functools
import importlib.util
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import compile, layout, reference

ELEMENTS = {torch.bfloat16: '"bf16"', torch.float16: '"f16"'}
_THREADS = 256  # a block of the packing kernels
_TILE_COLUMNS = 256  # of sparse_mm.cu


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
    index = h.get_device()
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return relu2_sparsify(h)
    rows, stride = h, h.shape[-1]
    if not h.is_contiguous():
        rows = (h if h.stride(-1) == 1 else h.contiguous()).reshape(-1, stride)
        stride = rows.stride(0)
    pointer = rows.data_ptr()
    plan = _packing(h.shape, stride, pointer % 16 == 0, h.dtype, index, threading.get_ident())
    packed, metadata = _empty(*plan.packed), _empty(*plan.metadata)
    if plan.launch:
        plan.launch(pointer, packed.data_ptr(), metadata.data_ptr())
    return packed, metadata


def sparse_mm(packed: Tensor, metadata: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``reference.sparse_mm``: fp32 accumulation, rounded once. Deterministic.

    The kernel takes H divisible by 64, D by 8 and less than 4 GB of metadata; else this unpacks and multiplies dense.
    """
    index = packed.get_device()
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return sparse_mm(packed, metadata, weight, bias)
    plan = _matmul(packed.shape, metadata.shape, weight.shape, packed.dtype, index, threading.get_ident())
    if plan is None:
        return torch.nn.functional.linear(reference.unpack(packed, metadata), weight, bias)
    packed, metadata, weight = _aligned(packed), _aligned(metadata), _aligned(weight)
    bias = None if bias is None else _aligned(bias)
    out = _empty(*plan.out)
    partial = flags = 0
    if plan.partial_floats:
        scratch = _empty(*plan.scratch)
        partial = scratch.data_ptr()
        flags = partial + 4 * plan.partial_floats
        plan.launch.zero(flags, plan.blocks)
    plan.packed_map.point_to(packed.data_ptr())
    plan.weight_map.point_to(weight.data_ptr())
    plan.launch(metadata.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(), partial, flags)
    return out


@dataclass(frozen=True)
class Tile:
    """How ``sparse_mm.cu`` is compiled: see there."""

    warpgroups: int
    cluster: int
    stages: int
    band: int

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    @property
    def shared_bytes(self) -> int:
        return self.stages * 64 * (64 * self.warpgroups + 2 * _TILE_COLUMNS) + 1024  # 1024: to align the first stage

    def defines(self, dtype: torch.dtype) -> dict[str, int | str]:
        return {
            "ELEMENT": ELEMENTS[dtype],
            "WARPGROUPS": self.warpgroups,
            "CLUSTER": self.cluster,
            "STAGES": self.stages,
        }


TALL, SHORT = Tile(3, 2, 5, band=11), Tile(2, 2, 5, band=16)


def choose_tile(tokens: int) -> Tile:
    """The tall tile multiplies about 6 % faster; the short one wins where the tall one would compute more padding."""
    padded = {
        tile: -(-tokens // (64 * tile.warpgroups * tile.cluster)) * 64 * tile.warpgroups for tile in (TALL, SHORT)
    }
    return TALL if padded[TALL] <= 1.06 * padded[SHORT] else SHORT


class _Shape(ctypes.Structure):
    """``Shape`` in ``sparse_mm.cu``."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "tokens", "model_dim", "groups", "row_clusters", "column_tiles", "band", "metadata_stride", "rounds",
            "streamed", "streamers",
        )
    ]  # fmt: skip


# Shape, strides and dtype of a tensor to allocate on the current device, as Inductor's generated code does it: a plain
# function, past torch's dispatcher, in less than half of ``new_empty``'s time.
_Empty = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
_empty = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]


def _contiguous(shape: Sequence[int], dtype: torch.dtype) -> _Empty:
    return tuple(shape), torch.empty(shape, device="meta").stride(), dtype


# A plan is all that a call needs and that its pointers do not change. The arguments of a launch are written into it, so
# each thread has its own.
@dataclass(frozen=True)
class _Packing:
    packed: _Empty
    metadata: _Empty
    launch: "_Launch | None"  # None: there is nothing to do


@functools.lru_cache(maxsize=1024)
def _packing(shape: torch.Size, stride: int, aligned: bool, dtype: torch.dtype, index: int, thread: int) -> _Packing:
    *tokens, hidden_dim = shape
    packed = _contiguous((*tokens, hidden_dim // 2), dtype)
    metadata = _contiguous((*tokens, layout.metadata_bytes(hidden_dim)), torch.uint8)
    if shape.numel() == 0:
        return _Packing(packed, metadata, None)
    count = shape.numel() // hidden_dim
    vectors = hidden_dim % 16 == 0 and aligned and (stride % 8 == 0 or count == 1)
    if vectors and stride == hidden_dim:  # one long row
        count, hidden_dim = 1, shape.numel()
    kernel = _packing_kernel("relu2_sparsify" if vectors else "relu2_sparsify_any", dtype, index)
    blocks = -(-hidden_dim // (_THREADS * (16 if vectors else 8)))
    # h, stride, packed, metadata, count, hidden_dim
    arguments = (POINTER, ctypes.c_int64(stride), POINTER, POINTER, ctypes.c_int64(count), ctypes.c_int64(hidden_dim))
    return _Packing(packed, metadata, _Launch(index, kernel, (blocks, min(count, 65535)), _THREADS, 0, arguments))


@dataclass(frozen=True)
class _Matmul:
    out: _Empty
    scratch: _Empty  # partial sums, and behind them a flag for each block
    partial_floats: int
    blocks: int
    packed_map: "_TensorMap"
    weight_map: "_TensorMap"
    launch: "_Launch"


@functools.lru_cache(maxsize=1024)
def _matmul(
    packed: torch.Size, metadata: torch.Size, weight: torch.Size, dtype: torch.dtype, index: int, thread: int
) -> _Matmul | None:
    """None where the kernel does not take these sizes."""
    model_dim, hidden_dim = weight
    if packed.numel() == 0 or model_dim == 0 or hidden_dim % 64 or model_dim % 8 or metadata.numel() >> 32:
        return None
    tokens = packed.numel() // packed[-1]
    tile = choose_tile(tokens)
    kernel, clusters = _matmul_kernel(tile, dtype, index)
    row_clusters = -(-tokens // (64 * tile.warpgroups * tile.cluster))
    column_tiles, groups = -(-model_dim // _TILE_COLUMNS), -(-hidden_dim // 256)
    rounds, streamed = divmod(row_clusters * column_tiles, clusters)
    streamers = max(1, min(clusters, 8 * streamed, streamed * groups))  # no tile is cut into many more than 8 pieces
    shape = _Shape(
        tokens, model_dim, groups, row_clusters, column_tiles, tile.band, hidden_dim // 8, rounds, streamed, streamers
    )
    blocks = tile.cluster * (clusters if rounds else streamers)
    partial = blocks * 64 * tile.warpgroups * _TILE_COLUMNS if streamed else 0
    packed_map = _TensorMap(dtype, tokens, hidden_dim // 2, 64 * tile.warpgroups, 32)
    weight_map = _TensorMap(dtype, model_dim, hidden_dim, _TILE_COLUMNS // tile.cluster, 64)
    # packed, weight, metadata, bias, out, partial, flags, shape
    arguments = (packed_map.words, weight_map.words, POINTER, POINTER, POINTER, POINTER, POINTER, shape)
    launch = _Launch(index, kernel, (blocks, 1), tile.threads, tile.shared_bytes, arguments)
    out = _contiguous((*packed[:-1], model_dim), dtype)
    scratch = _contiguous((partial + blocks,), torch.float32)
    return _Matmul(out, scratch, partial, blocks, packed_map, weight_map, launch)


@functools.cache
def _packing_kernel(entry: str, dtype: torch.dtype, index: int) -> Any:
    kernel = compile.kernel("relu2_sparsify", entry, {"ELEMENT": ELEMENTS[dtype]}, index)
    return _function(kernel, index)


@functools.cache
def _matmul_kernel(tile: Tile, dtype: torch.dtype, index: int) -> tuple[Any, int]:
    """The kernel, and how many of its clusters the device holds at a time."""
    driver = _driver()
    starts_with = 128 if tile.warpgroups == 3 else None
    loaded = compile.kernel("sparse_mm", "sparse_mm", tile.defines(dtype), index, tile.shared_bytes, starts_with)
    blocks = torch.cuda.get_device_properties(index).multi_processor_count // tile.cluster * tile.cluster
    config = driver.CUlaunchConfig()
    config.gridDimX, config.blockDimX, config.sharedMemBytes = blocks, tile.threads, tile.shared_bytes
    config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
    function = _function(loaded, index)
    with torch.cuda.device(index):
        _, clusters = _checked("cuOccupancyMaxActiveClusters", driver.cuOccupancyMaxActiveClusters(function, config))
    return function, min(clusters, blocks // tile.cluster)


def _function(kernel: Any, index: int) -> Any:
    """``kernel`` as device ``index`` runs it."""
    with torch.cuda.device(index):
        return _checked("cuKernelGetFunction", _driver().cuKernelGetFunction(kernel.handle))[1]


class _TensorMap:
    """What a bulk tensor copy needs of a contiguous matrix: it copies boxes whose rows are swizzled by their length."""

    def __init__(self, dtype: torch.dtype, rows: int, columns: int, box_rows: int, box_columns: int) -> None:
        driver = _driver()
        types, swizzles = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
        bfloat16, float16 = types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
        result = driver.cuTensorMapEncodeTiled(
            bfloat16 if dtype == torch.bfloat16 else float16,
            2,
            256,  # any address: the real one comes with each call
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
        memory = ctypes.create_string_buffer(128 + 64)
        self.words = (ctypes.c_uint64 * 16).from_buffer(
            memory, -ctypes.addressof(memory) % 64
        )  # the driver asks for it
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

    def zero(self, pointer: int, words: int) -> None:
        """Zero ``words`` 32-bit words before the launch."""
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        _checked("cuMemsetD32Async", self._driver.cuMemsetD32Async(pointer, 0, words, stream))


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _checked(call: str, result: tuple[Any, ...]) -> tuple[Any, ...]:
    if int(result[0]) != 0:
        raise RuntimeError(f"{call} failed: {result[0].name}")
    return result
