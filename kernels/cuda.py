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

from . import compile, launch, layout, reference, schedule
from .launch import POINTER, Launch, TensorMap
from .schedule import CLUSTER, TILE_COLUMNS, TILE_ROWS

ELEMENTS = {torch.bfloat16: '"bf16"', torch.float16: '"f16"'}
_THREADS = 256  # a block of the packing kernels
# of the matmuls, tiles.cuh
MATMUL_THREADS = 512
MATMUL_STARTS_WITH = 128  # registers: see there
K = 64  # columns of A and B in a stage
# RUN: columns that four threads hold a quarter each of; A_COLUMNS: of A in a stage, as it is stored; A_MN, B_MN: is A,
# is B MN-major; GROUP: so many rows of K come together though they are that part of K apart
_SPARSE = {"STAGES": 5, "RUN": 32, "A_COLUMNS": 32, "A_MN": 0, "GROUP": 1}  # with 8 columns, two threads fill a sector
_DENSE = {"STAGES": 4, "RUN": 64, "A_COLUMNS": 64, "A_MN": 0, "GROUP": 1}  # 16: as many as a thread has metadata of
DEFINES = {
    "sparse_mm": {**_SPARSE, "B_MN": 0},
    "sparse_mm_mn": {**_SPARSE, "B_MN": 1},
    "feature_wise_mm": {**_SPARSE, "A_MN": 1, "B_MN": 1, "GROUP": 4},
    "feature_wise_mm_in_order": {**_SPARSE, "A_MN": 1, "B_MN": 1},
    "linear_relu2_sparsify": {**_DENSE, "B_MN": 0},
    "grad_hidden": {**_DENSE, "B_MN": 1},
}
SOURCES = dict.fromkeys(("sparse_mm_mn", "feature_wise_mm", "feature_wise_mm_in_order"), "sparse_mm")  # else the name


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

    The kernel takes H and D divisible by 64, and, without a bias, also a weight that is a transposed ``[H, D]``. For
    another D the weight is copied into a larger one; for another H this unpacks and multiplies dense.
    """
    index = packed.get_device()
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return sparse_mm(packed, metadata, weight, bias)
    if weight.shape[0] % 64:
        more = -weight.shape[0] % 64
        weight, bias = pad(weight, (0, 0, 0, more)), None if bias is None else pad(bias, (0, more))
        return sparse_mm(packed, metadata, weight, bias)[..., :-more].contiguous()
    transposed = bias is None and not weight.is_contiguous() and weight.t().is_contiguous()
    plan = _plans.sparse_mm(packed.shape, weight.shape, transposed, packed.dtype, index)
    if plan is None:
        return linear(reference.unpack(packed, metadata), weight, bias)
    weight = weight.t() if transposed else weight
    metadata = _aligned(metadata)
    bias = None if bias is None else _aligned(bias)
    (out,) = (_empty(*shape) for shape in plan.outputs)
    plan.run(
        _aligned(packed), _aligned(weight), metadata.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr()
    )
    return out


def grad_hidden(grad: Tensor, down: Tensor, packed: Tensor, metadata: Tensor) -> Tensor:
    """As ``reference.grad_hidden``. The kernel takes D divisible by 8 and H by 64, and ``down`` row after row."""
    index = grad.get_device()
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return grad_hidden(grad, down, packed, metadata)
    plan = _plans.grad_hidden(grad.shape, down.shape, grad.dtype, index)
    if plan is None:
        return reference.grad_hidden(grad, down, packed, metadata)
    packed, metadata = _aligned(packed), _aligned(metadata)
    (out,) = (_empty(*shape) for shape in plan.outputs)
    plan.run(_aligned(grad), _aligned(down), packed.data_ptr(), metadata.data_ptr(), out.data_ptr())
    return out


def feature_wise(packed: Tensor, metadata: Tensor, permuted: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``reference.feature_wise``, bit for bit but for ``sums``. The kernel takes H divisible by 64."""
    index, hidden_dim = packed.get_device(), packed.shape[-1] * 2
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return feature_wise(packed, metadata, permuted)
    tokens = packed.numel() // max(packed.shape[-1], 1)
    whole = tokens // 4 * 4
    if hidden_dim % 64 or not whole * hidden_dim:
        return reference.feature_wise(packed, metadata, permuted)
    packed, metadata = _aligned(packed), _aligned(metadata)
    wise = _empty(*_contiguous((whole // 2, hidden_dim), packed.dtype))
    codes = _empty(*_contiguous(layout.metadata_shape((hidden_dim, whole)), torch.uint8))
    left, counts = packed.new_zeros(3, hidden_dim), packed.new_zeros(hidden_dim, dtype=torch.int32)
    if whole < tokens:  # one to three rows of the last block of metadata
        rows = layout.to_rows(metadata[-16:], tokens - whole // 16 * 16, hidden_dim)[whole % 16 :]
        left[: tokens - whole] = reference.unpack(packed.reshape(tokens, -1)[whole:], layout.from_rows(rows))
        counts = (left != 0).sum(0, dtype=torch.int32)
    sums = _empty(*_contiguous((-(-whole // 256), hidden_dim), torch.float32))  # over the tokens of a block
    start = _plans.feature_wise(tokens // 4, hidden_dim, permuted, packed.dtype, index)
    outputs = (wise, codes, counts, sums)
    start(packed.data_ptr(), metadata.data_ptr(), *(output.data_ptr() for output in outputs))
    return wise, codes, counts, left, sums.sum(0) + (left.sum(0, dtype=torch.float32) if whole < tokens else 0)


def feature_wise_mm(packed: Tensor, metadata: Tensor, left: Tensor, dense: Tensor, permuted: bool) -> Tensor:
    """As ``reference.feature_wise_mm``: fp32 accumulation, rounded once, but for what the tokens left over add, rounded
    again. The kernel takes H and D divisible by 64."""
    index = packed.get_device()
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return feature_wise_mm(packed, metadata, left, dense, permuted)
    plan = _plans.feature_wise_mm(packed.shape, dense.shape[1], permuted, packed.dtype, index)
    if plan is None:
        return reference.feature_wise_mm(packed, metadata, left, dense, permuted)
    metadata = _aligned(metadata)
    (out,) = (_empty(*shape) for shape in plan.outputs)
    plan.run(_aligned(packed), _aligned(dense), metadata.data_ptr(), 0, out.data_ptr())
    rest = dense[2 * packed.shape[0] :]
    return out.addmm_(left[: rest.shape[0]].t(), rest) if rest.shape[0] else out


def unpack(packed: Tensor, metadata: Tensor) -> Tensor:
    """As ``reference.unpack``. The kernel takes H divisible by 16."""
    index, (*tokens, half) = packed.get_device(), packed.shape
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return unpack(packed, metadata)
    if half % 8 or not packed.numel():
        return reference.unpack(packed, metadata)
    packed, metadata = _aligned(packed), _aligned(metadata)
    dense = _empty(*_contiguous((*tokens, 2 * half), packed.dtype))
    start = _plans.unpack(packed.numel() // half, 2 * half, packed.dtype, index)
    start(packed.data_ptr(), metadata.data_ptr(), dense.data_ptr())
    return dense


def columns(packed: Tensor, metadata: Tensor, chosen: Tensor) -> Tensor:
    """As ``reference.columns``, any H."""
    index, (*tokens, half) = packed.get_device(), packed.shape
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return columns(packed, metadata, chosen)
    if not packed.numel() or not chosen.numel():
        return packed.new_zeros((*tokens, chosen.shape[0]))
    packed, metadata, chosen = _aligned(packed), _aligned(metadata), chosen.contiguous()
    dense = _empty(*_contiguous((*tokens, chosen.shape[0]), packed.dtype))
    start = _plans.columns(packed.numel() // half, 2 * half, chosen.shape[0], packed.dtype, index)
    start(packed.data_ptr(), metadata.data_ptr(), chosen.data_ptr(), dense.data_ptr())
    return dense


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
    launch: Launch | None  # None: there is nothing to do


def _packing(shape: torch.Size, stride: int, aligned: bool, dtype: torch.dtype, index: int) -> _Packing:
    launch.set_current(index)
    *tokens, hidden_dim = shape
    height, width = layout.metadata_shape(shape)
    packed, metadata = _contiguous((*tokens, hidden_dim // 2), dtype), _contiguous((height, width), torch.uint8)
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
class _Matmul:
    outputs: tuple[_Empty, ...]
    a_maps: Sequence[TensorMap]  # by whole tiles, and by lower ones
    b_map: TensorMap
    launch: Launch

    def run(self, a: Tensor, b: Tensor, *pointers: int) -> None:
        for a_map in self.a_maps:
            a_map.point_to(a.data_ptr())
        self.b_map.point_to(b.data_ptr())
        self.launch(*pointers)


def _feature_wise(quarter: int, hidden_dim: int, permuted: bool, dtype: torch.dtype, index: int) -> Launch:
    launch.set_current(index)
    kernel = _simple_kernel("feature_wise", "feature_wise", dtype, index)
    # packed, metadata, wise packed, wise metadata, counts, sums, quarter, columns, permuted
    arguments = (*[POINTER] * 6, *map(ctypes.c_int64, (quarter, hidden_dim, permuted)))
    return Launch(index, kernel, (-(-hidden_dim // 128), -(-quarter // 64)), _THREADS, 0, arguments)


def _unpack(tokens: int, hidden_dim: int, dtype: torch.dtype, index: int) -> Launch:
    launch.set_current(index)
    kernel = _simple_kernel("unpack", "unpack", dtype, index)
    # packed, metadata, dense, rows, columns
    arguments = (*[POINTER] * 3, *map(ctypes.c_int64, (tokens, hidden_dim)))
    return Launch(index, kernel, (-(-hidden_dim // (16 * _THREADS)), min(tokens, 65535)), _THREADS, 0, arguments)


def _columns(tokens: int, hidden_dim: int, chosen: int, dtype: torch.dtype, index: int) -> Launch:
    launch.set_current(index)
    kernel = _simple_kernel("unpack", "columns", dtype, index)
    # packed, metadata, index, dense, rows, columns, chosen
    arguments = (*[POINTER] * 4, *map(ctypes.c_int64, (tokens, hidden_dim, chosen)))
    return Launch(index, kernel, (-(-chosen // _THREADS), min(tokens, 65535)), _THREADS, 0, arguments)


# Each of these gives None where the kernel does not take the sizes.
def _sparse_mm(
    packed: torch.Size, weight: torch.Size, transposed: bool, dtype: torch.dtype, index: int
) -> _Matmul | None:
    model_dim, hidden_dim = weight
    if packed.numel() == 0 or model_dim == 0 or hidden_dim % 64:
        return None
    outputs = (_contiguous((*packed[:-1], model_dim), dtype),)
    name = "sparse_mm_mn" if transposed else "sparse_mm"
    # maps, metadata, bias, out, shape
    return _matmul(name, packed.numel() // packed[-1], model_dim, hidden_dim, dtype, index, outputs)


def _linear_relu2_sparsify(x: torch.Size, weight: torch.Size, dtype: torch.dtype, index: int) -> _Matmul | None:
    hidden_dim, model_dim = weight
    if x.numel() == 0 or hidden_dim == 0 or hidden_dim % 64 or model_dim % 8:
        return None
    hidden = (*x[:-1], hidden_dim)
    outputs = (
        _contiguous((*x[:-1], hidden_dim // 2), dtype),
        _contiguous(layout.metadata_shape(hidden), torch.uint8),
    )
    # maps, bias, packed, metadata, shape
    name = "linear_relu2_sparsify"
    return _matmul(name, x.numel() // model_dim, hidden_dim, model_dim, dtype, index, outputs)


def _grad_hidden(grad: torch.Size, down: torch.Size, dtype: torch.dtype, index: int) -> _Matmul | None:
    model_dim, hidden_dim = down
    if grad.numel() == 0 or hidden_dim == 0 or hidden_dim % 64 or model_dim % 8:
        return None
    outputs = (_contiguous((*grad[:-1], hidden_dim // 2), dtype),)
    # maps, packed, metadata, out, shape
    return _matmul("grad_hidden", grad.numel() // model_dim, hidden_dim, model_dim, dtype, index, outputs)


def _feature_wise_mm(
    packed: torch.Size, model_dim: int, permuted: bool, dtype: torch.dtype, index: int
) -> _Matmul | None:
    kept, hidden_dim = packed
    if packed.numel() == 0 or model_dim == 0 or hidden_dim % 64 or model_dim % 64:
        return None
    outputs = (_contiguous((hidden_dim, model_dim), dtype),)
    name = "feature_wise_mm" if permuted else "feature_wise_mm_in_order"
    # maps, metadata, no bias, out, shape
    return _matmul(name, hidden_dim, model_dim, 2 * kept, dtype, index, outputs)


class _Plans(threading.local):
    def __init__(self) -> None:
        cached = functools.lru_cache(maxsize=1024)
        self.packing, self.sparse_mm = cached(_packing), cached(_sparse_mm)
        self.linear_relu2_sparsify, self.grad_hidden = cached(_linear_relu2_sparsify), cached(_grad_hidden)
        self.feature_wise, self.feature_wise_mm = cached(_feature_wise), cached(_feature_wise_mm)
        self.unpack, self.columns = cached(_unpack), cached(_columns)


_plans = _Plans()


def _matmul(
    name: str, rows: int, columns: int, depth: int, dtype: torch.dtype, index: int, outputs: tuple[_Empty, ...]
) -> _Matmul:
    """A of ``[rows, depth]`` and B of ``[columns, depth]``, in memory as ``DEFINES[name]`` says."""
    launch.set_current(index)
    kernel, clusters = _matmul_kernel(name, dtype, index)
    how = DEFINES[name]
    a_columns, run, group = how["A_COLUMNS"], how["RUN"], how["GROUP"]
    stages = -(-depth // 256) * 4 if a_columns < K else -(-depth // K)  # metadata comes by four stages
    shape, clusters = schedule.share_out(rows, columns, stages, clusters)
    stored, heights = depth * a_columns // K, (3, shape.lower_height)
    if how["A_MN"]:
        size, strides = (64, stored, rows // 64), (2 * rows, 128)
        a_maps = [TensorMap(dtype, size, strides, (64, a_columns, height)) for height in heights]
    else:
        size, strides = (stored, rows, 1), (2 * stored, 2 * stored)
        a_maps = [TensorMap(dtype, size, strides, (a_columns, 64 * height, 1)) for height in heights]
    per_block = TILE_COLUMNS // CLUSTER
    if how["B_MN"]:  # by 64 columns; of every group of rows of K one after the other
        b_size = 64, group, depth // group, columns // 64, 1
        b_strides = 2 * columns * (depth // group), 2 * columns, 128, 128
        b_map = TensorMap(dtype, b_size, b_strides, (64, group, K // group, per_block // 64, 1))
    else:  # in the order of tiles.cuh: of every RUN rows, row RUN / 4 * q + 2 a + b comes to lie at 8 a + 2 q + b
        b_size = depth, 2, 4, run // 8, columns // run
        b_strides = 2 * depth, 2 * depth * (run // 4), 4 * depth, 2 * depth * run
        b_map = TensorMap(dtype, b_size, b_strides, (K, 2, 4, run // 8, per_block // run))
    arguments = (*(each.words for each in (*a_maps, b_map)), *[POINTER] * 3, shape)
    ready = Launch(index, kernel, (CLUSTER * clusters, 1), MATMUL_THREADS, _shared_bytes(name), arguments)
    return _Matmul(outputs, a_maps, b_map, ready)


@functools.cache
def _simple_kernel(source: str, entry: str, dtype: torch.dtype, index: int) -> Any:
    return _function(compile.kernel(source, entry, {"ELEMENT": ELEMENTS[dtype]}, index), index)


@functools.cache
def _matmul_kernel(name: str, dtype: torch.dtype, index: int) -> tuple[Any, int]:
    """The kernel, and how many of its clusters the device holds at a time."""
    driver, shared_bytes = launch.driver(), _shared_bytes(name)
    source = SOURCES.get(name, name)
    loaded = compile.kernel(source, source, matmul_defines(name, dtype), index, shared_bytes, MATMUL_STARTS_WITH)
    blocks = torch.cuda.get_device_properties(index).multi_processor_count // CLUSTER * CLUSTER
    config = driver.CUlaunchConfig()
    config.gridDimX, config.blockDimX, config.sharedMemBytes = blocks, MATMUL_THREADS, shared_bytes
    config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
    function = _function(loaded, index)
    with torch.cuda.device(index):
        _, clusters = launch.checked(
            "cuOccupancyMaxActiveClusters", driver.cuOccupancyMaxActiveClusters(function, config)
        )
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


def _aligned(tensor: Tensor) -> Tensor:
    """``tensor`` row after row from a multiple of 16 bytes on, as the copy engine needs it; copied if it must be."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
