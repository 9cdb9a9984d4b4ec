"""How the Hopper kernels of ``csrc`` are compiled and launched: a plan for each shape, which ``cuda`` runs on tensors.

A plan is all that a call needs and that its pointers do not change. The arguments of a launch are written into it, so
each thread has its own; and so that each thread has made the device's context its own before it launches.
"""

import ctypes
import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import compile, launch, layout, reference, schedule
from .launch import POINTER, Launch, TensorMap
from .schedule import CLUSTER, TILE_COLUMNS, TILE_ROWS

ELEMENTS = {torch.bfloat16: '"bf16"', torch.float16: '"f16"'}
_THREADS = 256  # a block of all kernels but the matmuls
_WARPS = _THREADS // 32
# of the matmuls, tiles.cuh
MATMUL_THREADS = 512
MATMUL_STARTS_WITH = 128  # registers: see there
K = 64  # columns of A and B in a stage
# RUN: columns that four threads hold a quarter each of; A_COLUMNS: of A in a stage, as it is stored; A_MN, B_MN: is A,
# is B MN-major; GROUP: so many rows of K come together though they are a stride apart; TRANSPOSED: the result is stored
# [N, M]
_SPARSE = {"STAGES": 5, "RUN": 32, "A_COLUMNS": 32, "A_MN": 0, "B_MN": 0, "GROUP": 1, "TRANSPOSED": 0}
_DENSE = {"STAGES": 4, "RUN": 64, "A_COLUMNS": 64, "A_MN": 0, "B_MN": 0, "GROUP": 1}
_WISE = {**_SPARSE, "A_MN": 1, "B_MN": 1}
DEFINES = {
    "sparse_mm": _SPARSE,  # RUN 32: eight columns a thread, two of which fill a sector
    "sparse_mm_mn": {**_SPARSE, "B_MN": 1},
    "feature_wise_mm": {**_WISE, "GROUP": 4},
    "feature_wise_mm_transposed": {**_WISE, "GROUP": 4, "TRANSPOSED": 1},
    "feature_wise_mm_in_order": _WISE,
    "feature_wise_mm_in_order_transposed": {**_WISE, "TRANSPOSED": 1},
    "sparse_mm_fp8": _SPARSE,  # two neighbouring e4m3 as one element of 16 bits
    "linear_relu2_sparsify": _DENSE,  # RUN 64: sixteen columns a thread, as many as it has metadata of
    "linear_relu2_sparsify_fp8": _DENSE,
    "grad_hidden": {**_DENSE, "B_MN": 1},
}


def source(name: str) -> str:
    """The kernel's file, and its name in it."""
    return "sparse_mm" if name.startswith(("sparse_mm_mn", "feature_wise_mm")) else name


Empty = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides and dtype of a tensor to allocate


def contiguous(shape: Sequence[int], dtype: torch.dtype) -> Empty:
    return tuple(shape), torch.empty(shape, device="meta").stride(), dtype


@dataclass(frozen=True)
class _Packing:
    packed: Empty
    metadata: Empty
    launch: Launch | None  # None: there is nothing to do


def _packing(shape: torch.Size, stride: int, aligned: bool, dtype: torch.dtype, index: int) -> _Packing:
    launch.set_current(index)
    *tokens, hidden_dim = shape
    height, width = layout.metadata_shape(shape)
    packed, metadata = contiguous((*tokens, hidden_dim // 2), dtype), contiguous((height, width), torch.uint8)
    if shape.numel() == 0:
        return _Packing(packed, metadata, None)
    count = shape.numel() // hidden_dim
    vectors = hidden_dim % 16 == 0 and aligned and (stride % 8 == 0 or count == 1)
    entry, columns, rows = ("relu2_sparsify", 16, 2) if vectors else ("relu2_sparsify_any", 8, 1)  # of a thread
    kernel = _simple_kernel("relu2_sparsify", entry, dtype, index)
    grid = -(-8 * width // (_THREADS * columns)), min(height // rows, 65535)
    # h, stride, packed, metadata, count, hidden_dim
    arguments = (POINTER, ctypes.c_int64(stride), POINTER, POINTER, ctypes.c_int64(count), ctypes.c_int64(hidden_dim))
    return _Packing(packed, metadata, Launch(index, kernel, grid, _THREADS, 0, arguments))


@dataclass(frozen=True)
class _Simple:
    outputs: tuple[Empty, ...]
    launch: Launch


def _packing_fp8(shape: torch.Size, stride: int, aligned: bool, dtype: torch.dtype, index: int) -> _Simple:
    launch.set_current(index)
    *tokens, hidden_dim = shape
    height, width = layout.metadata_shape(shape)
    outputs = (
        contiguous((*tokens, hidden_dim // 2), torch.float8_e4m3fn),
        contiguous((height, width), torch.uint8),
        contiguous(tokens, torch.float32),
    )
    count = shape.numel() // hidden_dim
    sixteens = width // 2  # of columns
    each = next((each for each in (1, 2, 4) if sixteens <= 512 * each), 0)  # of a thread, in registers
    if each and hidden_dim % 16 == 0 and aligned and (stride % 8 == 0 or count == 1):
        entry, threads, blocks = "relu2_sparsify_fp8", -(-sixteens // (32 * each)) * 32, height // 2
    else:
        entry, threads, blocks = "relu2_sparsify_fp8_any", _THREADS, height
    kernel = _simple_kernel("relu2_sparsify_fp8", entry, dtype, index, (("EACH", max(each, 1)),))
    # h, stride, packed, metadata, row_scale, count, hidden_dim
    sizes = ctypes.c_int64(count), ctypes.c_int64(hidden_dim)
    arguments = (POINTER, ctypes.c_int64(stride), *[POINTER] * 3, *sizes)
    return _Simple(outputs, Launch(index, kernel, (blocks, 1), threads, 0, arguments))


@dataclass(frozen=True)
class _Matmul:
    outputs: tuple[Empty, ...]
    a_maps: Sequence[TensorMap]  # by whole tiles, and by lower ones
    b_maps: Sequence[tuple[TensorMap, int]]  # and the bytes from which on they see B
    launch: Launch

    def run(self, a: Tensor, b: Tensor, *pointers: int) -> None:
        for a_map in self.a_maps:
            a_map.point_to(a.data_ptr())
        for b_map, begin in self.b_maps:
            b_map.point_to(b.data_ptr() + begin)
        self.launch(*pointers)


def _feature_wise(
    tokens: int, hidden_dim: int, permuted: bool, counted: bool, dtype: torch.dtype, index: int
) -> _Simple | None:
    whole = tokens // 4 * 4
    if hidden_dim % 64 or not whole * hidden_dim:
        return None
    launch.set_current(index)
    kernel = _simple_kernel("feature_wise", f"feature_wise_{'counts' if counted else 'sums'}", dtype, index)
    outputs = (
        contiguous((whole // 2, hidden_dim), dtype),
        contiguous(layout.metadata_shape((hidden_dim, whole)), torch.uint8),
        contiguous((-(-whole // 256), hidden_dim), torch.int32 if counted else torch.float32),  # totals of blocks
        contiguous((3, hidden_dim), dtype),
    )
    # packed, metadata, the outputs, groups, columns, strides
    strides = reference.group_strides(whole) if permuted else (0, 0)
    arguments = (*[POINTER] * 6, *map(ctypes.c_int64, (whole // 4, hidden_dim, *strides)))
    grid = -(-hidden_dim // 256), -(-whole // 256)
    return _Simple(outputs, Launch(index, kernel, grid, _THREADS, 0, arguments))


def _densest(features: int, chosen: int, index: int) -> _Simple:
    launch.set_current(index)
    kernel = _simple_kernel("densest", "densest", torch.bfloat16, index)
    outputs = contiguous((chosen,), torch.int64), contiguous((features,), torch.int32)
    # counts, the outputs, features, chosen
    arguments = (*[POINTER] * 3, ctypes.c_int64(features), ctypes.c_int64(chosen))
    return _Simple(outputs, Launch(index, kernel, (1, 1), 1024, 0, arguments))


def _unpack(tokens: torch.Size, hidden_dim: int, dtype: torch.dtype, index: int) -> _Simple:
    launch.set_current(index)
    kernel, rows = _simple_kernel("unpack", "unpack", dtype, index), tokens.numel()
    # packed, metadata, dense, rows, columns
    arguments = (*[POINTER] * 3, *map(ctypes.c_int64, (rows, hidden_dim)))
    grid = -(-hidden_dim // (16 * _THREADS)), min(rows, 65535)
    return _Simple((contiguous((*tokens, hidden_dim), dtype),), Launch(index, kernel, grid, _THREADS, 0, arguments))


def _columns(tokens: torch.Size, hidden_dim: int, chosen: int, dtype: torch.dtype, index: int) -> _Simple:
    launch.set_current(index)
    kernel, rows = _simple_kernel("unpack", "columns", dtype, index), tokens.numel()
    # packed, metadata, index, dense, rows, columns, chosen
    arguments = (*[POINTER] * 4, *map(ctypes.c_int64, (rows, hidden_dim, chosen)))
    grid = -(-chosen // _THREADS), min(-(-rows // 16), 65535)
    return _Simple((contiguous((*tokens, chosen), dtype),), Launch(index, kernel, grid, _THREADS, 0, arguments))


# Each of these gives None where the kernel does not take the sizes.
def _sparse_mm(
    packed: torch.Size, weight: torch.Size, transposed: bool, dtype: torch.dtype, index: int
) -> _Matmul | None:
    model_dim, hidden_dim = weight
    if packed.numel() == 0 or model_dim == 0 or hidden_dim % 64:
        return None
    outputs = (contiguous((*packed[:-1], model_dim), dtype),)
    name = "sparse_mm_mn" if transposed else "sparse_mm"
    # maps, metadata, bias, out, no exact rows, no slots, shape
    return _matmul(name, packed.numel() // packed[-1], model_dim, hidden_dim, dtype, index, outputs)


def _sparse_mm_fp8(packed: torch.Size, weight: torch.Size, dtype: torch.dtype, index: int) -> _Matmul | None:
    model_dim, hidden_dim = weight
    if packed.numel() == 0 or model_dim == 0 or hidden_dim % 64:
        return None
    outputs = (contiguous((*packed[:-1], model_dim), dtype),)
    # maps, metadata, bias, out, row_scale, weight_scale, shape
    return _matmul("sparse_mm_fp8", packed.numel() // packed[-1], model_dim, hidden_dim // 2, dtype, index, outputs)


def _linear_relu2_sparsify(x: torch.Size, weight: torch.Size, dtype: torch.dtype, index: int) -> _Matmul | None:
    hidden_dim, model_dim = weight
    if x.numel() == 0 or hidden_dim == 0 or hidden_dim % 64 or model_dim % 8:
        return None
    hidden = (*x[:-1], hidden_dim)
    outputs = (
        contiguous((*x[:-1], hidden_dim // 2), dtype),
        contiguous(layout.metadata_shape(hidden), torch.uint8),
    )
    # maps, bias, packed, metadata, shape
    name = "linear_relu2_sparsify"
    return _matmul(name, x.numel() // model_dim, hidden_dim, model_dim, dtype, index, outputs)


ACTIVE_TOKENS, ACTIVE_HIDDEN_DIM, ACTIVE_X = 16, 1 << 16, 1 << 16  # at most; of tokens times model_dim, too
# Of the rings in active.cu, first kernel and second. With 5 to 7 and 5 to 8: as fast; with 3: a tenth slower.
ACTIVE_STAGES = 6, 7
_STAGE = 16 * 64 * 2  # bytes of weights
_SHARED_BYTES = 225 << 10  # that a block can have, and some for what the kernels declare


@dataclass(frozen=True)
class Active:
    between: tuple[Empty, ...]  # y, the bits of the neurons that fire, and, in fp8, each block's largest relu(h)
    out: Empty
    first: Launch
    second: Launch


def _active_ffn(x: torch.Size, down: torch.Size, fp8: bool, dtype: torch.dtype, index: int) -> Active | None:
    *leading, model_dim = x
    columns, hidden_dim = down
    tokens, each = x.numel() // max(model_dim, 1), 2 if fp8 else 1  # of weights in an element of 16 bits
    if not 0 < tokens <= min(ACTIVE_TOKENS, ACTIVE_X // max(model_dim, 1)) or columns == 0:
        return None
    if model_dim % (64 * each) or columns % (64 * each) or hidden_dim % 64 or not 0 < hidden_dim <= ACTIVE_HIDDEN_DIM:
        return None
    launch.set_current(index)
    blocks = torch.cuda.get_device_properties(index).multi_processor_count
    in_dim, out_dim, eights = model_dim // each, columns // each, -(-tokens // 8)
    column_warps = next(warps for warps in (1, 2, 4, 8) if out_dim // 64 <= blocks * warps or warps == 8)
    slices = -(-out_dim // (64 * column_warps))
    x_bytes, parts = tokens * (2 * in_dim + 16), 8192 * eights
    up_stages = min(ACTIVE_STAGES[0], (_SHARED_BYTES - parts - x_bytes) // (_WARPS * _STAGE))
    down_stage = _WARPS * (_STAGE + 256 * eights)
    down_stages = min(ACTIVE_STAGES[1], (_SHARED_BYTES - 2 * hidden_dim) // down_stage)
    stages = ("UP_STAGES", up_stages), ("DOWN_STAGES", down_stages)
    defines = ("FP8", each - 1), ("EIGHTS", eights), ("COLUMN_WARPS", column_warps), *stages
    up_bytes, down_bytes = _WARPS * up_stages * _STAGE + x_bytes, down_stages * down_stage + 2 * hidden_dim
    first = _simple_kernel("active", "active_relu2", dtype, index, defines, up_bytes)
    second = _simple_kernel("active", "active_mm", dtype, index, defines, down_bytes)
    cluster, first_blocks = _cluster(second, slices, blocks, down_bytes, index), min(blocks, hidden_dim // 16)
    # x, up, bias, x_scale, up_scale, y, active, largest, sizes
    # y, active, largest, down, down_scale, bias, out, sizes
    arguments = (
        (*[POINTER] * 8, *map(ctypes.c_int, (tokens, in_dim, hidden_dim // 16))),
        (*[POINTER] * 7, *map(ctypes.c_int, (tokens, hidden_dim, out_dim, first_blocks))),
    )
    of_tokens = 8 * eights
    return Active(
        (
            contiguous((hidden_dim, of_tokens), dtype),
            contiguous((hidden_dim // 8,), torch.uint8),
            contiguous((first_blocks if fp8 else 0, of_tokens), torch.int16),
        ),
        contiguous((*leading, columns), dtype),
        Launch(index, first, (first_blocks, 1), _THREADS, up_bytes, arguments[0], early=True),
        Launch(index, second, (cluster * slices, 1), _THREADS, down_bytes, arguments[1], early=True, cluster=cluster),
    )


def _cluster(function: Any, clusters: int, blocks: int, shared_bytes: int, index: int) -> int:
    """The largest size of so many clusters that run all at a time, in so many blocks; clusters do not cross GPCs."""
    for size in range(min(8, blocks // clusters), 1, -1):
        config = launch.configuration((size * clusters, 1), _THREADS, shared_bytes, cluster=size)
        if launch.most_clusters(function, config, index) >= clusters:
            return size
    return 1


@dataclass(frozen=True)
class _Fp8:
    matmul: _Matmul
    squares: _Simple


def _linear_relu2_sparsify_fp8(x: torch.Size, weight: torch.Size, dtype: torch.dtype, index: int) -> _Fp8 | None:
    hidden_dim, model_dim = weight
    if x.numel() == 0 or hidden_dim == 0 or hidden_dim % 64 or model_dim % 16:
        return None
    packed, tokens = (*x[:-1], hidden_dim // 2), x.numel() // model_dim
    tiles = -(-hidden_dim // TILE_COLUMNS)
    outputs = (
        contiguous(packed, dtype),  # of relu(h)
        contiguous(layout.metadata_shape((*x[:-1], hidden_dim)), torch.uint8),
        contiguous((tokens, tiles), torch.int16),  # the largest of a row in a tile
    )
    # maps, bias, kept, metadata, x_scale, weight_scale, parts, shape
    name = "linear_relu2_sparsify_fp8"
    matmul = _matmul(name, tokens, hidden_dim, model_dim // 2, dtype, index, outputs)
    kernel = _simple_kernel("square_to_fp8", "square_to_fp8", dtype, index)
    threads = min(512, -(-hidden_dim // 1024) * 32)
    # kept, parts, packed, row_scale, width, tiles
    arguments = (*[POINTER] * 4, ctypes.c_int64(hidden_dim // 2), ctypes.c_int64(tiles))
    results = contiguous(packed, torch.float8_e4m3fn), contiguous(x[:-1], torch.float32)
    return _Fp8(matmul, _Simple(results, Launch(index, kernel, (tokens, 1), threads, 0, arguments)))


def _grad_hidden(grad: torch.Size, down: torch.Size, dtype: torch.dtype, index: int) -> _Matmul | None:
    model_dim, hidden_dim = down
    if grad.numel() == 0 or hidden_dim == 0 or hidden_dim % 64 or model_dim % 8:
        return None
    outputs = (contiguous((*grad[:-1], hidden_dim // 2), dtype),)
    # maps, packed, metadata, out, shape
    return _matmul("grad_hidden", grad.numel() // model_dim, hidden_dim, model_dim, dtype, index, outputs)


def _feature_wise_mm(
    packed: torch.Size, model_dim: int, permuted: bool, transposed: bool, dtype: torch.dtype, index: int
) -> _Matmul | None:
    kept, hidden_dim = packed
    if packed.numel() == 0 or model_dim == 0 or hidden_dim % 64 or model_dim % 64:
        return None
    outputs = (contiguous((model_dim, hidden_dim) if transposed else (hidden_dim, model_dim), dtype),)
    name = "feature_wise_mm" + "_in_order" * (not permuted) + "_transposed" * transposed
    # maps, metadata, no bias, out, exact, slots, shape
    return _matmul(name, hidden_dim, model_dim, 2 * kept, dtype, index, outputs)


class Plans(threading.local):
    def __init__(self) -> None:
        cached = functools.lru_cache(maxsize=1024)
        self.packing, self.sparse_mm = cached(_packing), cached(_sparse_mm)
        self.packing_fp8, self.sparse_mm_fp8 = cached(_packing_fp8), cached(_sparse_mm_fp8)
        self.linear_relu2_sparsify_fp8, self.active_ffn = cached(_linear_relu2_sparsify_fp8), cached(_active_ffn)
        self.linear_relu2_sparsify, self.grad_hidden = cached(_linear_relu2_sparsify), cached(_grad_hidden)
        self.feature_wise, self.feature_wise_mm = cached(_feature_wise), cached(_feature_wise_mm)
        self.densest, self.unpack, self.columns = cached(_densest), cached(_unpack), cached(_columns)


PLANS = Plans()


def _matmul(
    name: str,
    rows: int,
    columns: int,
    depth: int,
    dtype: torch.dtype,
    index: int,
    outputs: tuple[Empty, ...],
) -> _Matmul:
    """A of ``[rows, depth]`` and B of ``[columns, depth]``, as ``DEFINES[name]`` says, of 16 bits."""
    launch.set_current(index)
    kernel, clusters = _matmul_kernel(name, dtype, index)
    how = DEFINES[name]
    a_columns, run, group = how["A_COLUMNS"], how["RUN"], how["GROUP"]
    together = 1 if a_columns == K else 2 if name == "sparse_mm_fp8" else 4  # stages, by the blocks of metadata
    stages = -(-depth // (K * together)) * together
    first, last = reference.group_strides(depth) if group > 1 else (0, depth)
    shape, clusters = schedule.share_out(rows, columns, stages, clusters, first)
    stored, heights = depth * a_columns // K, (3, shape.lower_height)
    if how["A_MN"]:
        size, strides = (64, stored, rows // 64), (2 * rows, 128)
        a_maps = [TensorMap(dtype, size, strides, (64, a_columns, height)) for height in heights]
    else:
        size, strides = (stored, rows, 1), (2 * stored, 2 * stored)
        a_maps = [TensorMap(dtype, size, strides, (a_columns, 64 * height, 1)) for height in heights]
    per_block = TILE_COLUMNS // CLUSTER
    if how["B_MN"]:  # by 64 columns; of every group of rows of K one after the other
        b_maps = []
        for apart, begin in ((first, 0), (last, group * first)):
            b_size = 64, group, apart, columns // 64, 1
            b_strides = 2 * columns * apart, 2 * columns, 128, 2 * columns * depth
            if apart:  # else there are none, and the other one stands for it
                box = 64, group, K // group, per_block // 64, 1
                b_maps.append((TensorMap(dtype, b_size, b_strides, box), 2 * columns * begin))
    else:  # in the order of tiles.cuh: of every RUN rows, row RUN / 4 * q + 2 a + b comes to lie at 8 a + 2 q + b
        b_size = depth, 2, 4, run // 8, columns // run
        b_strides = 2 * depth, 2 * depth * (run // 4), 4 * depth, 2 * depth * run
        b_maps = [(TensorMap(dtype, b_size, b_strides, (K, 2, 4, run // 8, per_block // run)), 0)]
    pointers = 6 if name == "linear_relu2_sparsify_fp8" else 5 if a_columns < K else 3
    maps = (*a_maps, b_maps[0][0])
    if source(name) == "sparse_mm":  # uses the last one with a GROUP only
        maps = (*maps, b_maps[-1][0])
    arguments = (*(each.words for each in maps), *[POINTER] * pointers, shape)
    ready = Launch(index, kernel, (CLUSTER * clusters, 1), MATMUL_THREADS, _shared_bytes(name), arguments)
    return _Matmul(outputs, a_maps, b_maps, ready)


@functools.cache
def _simple_kernel(
    source: str,
    entry: str,
    dtype: torch.dtype,
    index: int,
    more: tuple[tuple[str, int], ...] = (),
    shared_bytes: int = 0,
) -> Any:
    defines: dict[str, int | str] = {"ELEMENT": ELEMENTS[dtype], **dict(more)}
    return _function(compile.kernel(source, entry, defines, index, shared_bytes), index)


@functools.cache
def _matmul_kernel(name: str, dtype: torch.dtype, index: int) -> tuple[Any, int]:
    """The kernel, and how many of its clusters the device holds at a time."""
    entry, shared_bytes = source(name), _shared_bytes(name)
    loaded = compile.kernel(entry, entry, matmul_defines(name, dtype), index, shared_bytes, MATMUL_STARTS_WITH)
    blocks = torch.cuda.get_device_properties(index).multi_processor_count // CLUSTER * CLUSTER
    function = _function(loaded, index)
    clusters = launch.most_clusters(function, launch.configuration((blocks, 1), MATMUL_THREADS, shared_bytes), index)
    return function, min(clusters, blocks // CLUSTER)


def matmul_defines(name: str, dtype: torch.dtype) -> dict[str, int | str]:
    return {"ELEMENT": ELEMENTS[dtype], "CLUSTER": CLUSTER, **DEFINES[name]}


def _shared_bytes(name: str) -> int:
    stage = 2 * (TILE_ROWS * DEFINES[name]["A_COLUMNS"] + TILE_COLUMNS * K)
    return DEFINES[name]["STAGES"] * stage + 1024  # to align the first one


def _function(kernel: Any, index: int) -> Any:
    """``kernel`` as device ``index`` runs it."""
    with torch.cuda.device(index):
        return launch.checked("cuKernelGetFunction", launch.driver().cuKernelGetFunction(kernel.handle))[1]
