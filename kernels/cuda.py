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
    hidden_dim = h.shape[-1]
    packed = h.new_empty((*h.shape[:-1], hidden_dim // 2))
    metadata = h.new_empty((*h.shape[:-1], layout.metadata_bytes(hidden_dim)), dtype=torch.uint8)
    if h.numel() == 0:
        return packed, metadata
    rows = (h if h.stride(-1) == 1 else h.contiguous()).reshape(-1, hidden_dim)
    count, stride = rows.shape[0], rows.stride(0)
    vectors = hidden_dim % 16 == 0 and rows.data_ptr() % 16 == 0 and (stride % 8 == 0 or count == 1)
    if vectors and stride == hidden_dim:  # one long row
        count, hidden_dim = 1, rows.numel()
    entry = "relu2_sparsify" if vectors else "relu2_sparsify_any"
    blocks = -(-hidden_dim // (_THREADS * (16 if vectors else 8)))
    kernel = _packing_kernel(entry, h.dtype, h.device.index)
    values = (ctypes.c_int64 * 6)(rows.data_ptr(), stride, packed.data_ptr(), metadata.data_ptr(), count, hidden_dim)
    _launch(h.device.index, kernel, (blocks, min(count, 65535)), _THREADS, 0, _addresses(values))
    return packed, metadata


def sparse_mm(packed: Tensor, metadata: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``reference.sparse_mm``: fp32 accumulation, rounded once. Deterministic.

    The kernel takes H divisible by 64, D by 8 and less than 4 GB of metadata; else this unpacks and multiplies dense.
    """
    model_dim, hidden_dim = weight.shape
    out = packed.new_empty((*packed.shape[:-1], model_dim))
    tokens = out.numel() // model_dim if model_dim else 0
    if tokens == 0 or hidden_dim == 0 or hidden_dim % 64 or model_dim % 8 or metadata.numel() >> 32:
        return torch.nn.functional.linear(reference.unpack(packed, metadata), weight, bias)
    packed, metadata, weight = map(_aligned, (packed, metadata, weight))
    bias = None if bias is None else _aligned(bias)
    plan = _plan(tokens, model_dim, hidden_dim, packed.dtype, packed.device.index)
    tile = plan.tile
    pointers = (ctypes.c_int64 * 5)(metadata.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr())
    if plan.partial_floats:
        partial = packed.new_empty(plan.partial_floats, dtype=torch.float32)
        flags = packed.new_zeros(plan.blocks, dtype=torch.int32)
        pointers[3], pointers[4] = partial.data_ptr(), flags.data_ptr()
    packed_map = _tensor_map(packed.data_ptr(), packed.dtype, tokens, hidden_dim // 2, 64 * tile.warpgroups, 32)
    weight_map = _tensor_map(weight.data_ptr(), weight.dtype, model_dim, hidden_dim, _TILE_COLUMNS // tile.cluster, 64)
    arguments = (*map(ctypes.addressof, (packed_map, weight_map)), *_addresses(pointers), ctypes.addressof(plan.shape))
    _launch(packed.device.index, plan.kernel, (plan.blocks, 1), tile.threads, tile.shared_bytes, arguments)
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


@dataclass(frozen=True)
class _Plan:
    tile: Tile
    kernel: Any
    shape: _Shape
    blocks: int
    partial_floats: int


@functools.lru_cache(maxsize=1024)
def _plan(tokens: int, model_dim: int, hidden_dim: int, dtype: torch.dtype, index: int) -> _Plan:
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
    return _Plan(tile, kernel, shape, blocks, partial)


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
