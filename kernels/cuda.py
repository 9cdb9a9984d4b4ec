"""The Hopper kernels of ``csrc`` on torch tensors: fast forms of ``reference``, bit for bit where they pack.

Plain functions of tensors on one CUDA device; ``why_not`` says for which devices and dtypes. They launch on torch's
current stream, allocate with torch's allocator, never wait for the GPU, and can be captured in a CUDA graph.
"""

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from . import compile, layout, reference
from .plans import ELEMENTS, PLANS, Active

# Allocates on the current device, as Inductor's generated code does it: a plain function, past torch's dispatcher, in
# less than half of ``new_empty``'s time.
_empty = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]


@torch.compiler.assume_constant_result
def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Why there is no fast kernel for tensors of ``dtype`` on ``device``; empty if there is. int32 is for counts, e4m3
    for what was packed."""
    if device.type != "cuda":
        return f"there is no 2:4 kernel for {device.type}"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _why_not_gpu(index) or (
        ""
        if dtype in (*ELEMENTS, torch.int32, reference.E4M3)
        else f"the 2:4 kernels take bfloat16 and float16, got {dtype}"
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
    plan = PLANS.packing(h.shape, stride, pointer % 16 == 0, h.dtype, index)
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
    plan = PLANS.linear_relu2_sparsify(x.shape, weight.shape, x.dtype, index)
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

    The kernel takes H and D divisible by 64, and also a weight that is a transposed ``[H, D]``. For another D the
    weight is copied into a larger one; for another H this unpacks and multiplies dense.
    """
    index = packed.get_device()
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return sparse_mm(packed, metadata, weight, bias)
    if weight.shape[0] % 64:
        more = -weight.shape[0] % 64
        weight, bias = pad(weight, (0, 0, 0, more)), None if bias is None else pad(bias, (0, more))
        return sparse_mm(packed, metadata, weight, bias)[..., :-more].contiguous()
    transposed = not weight.is_contiguous() and weight.t().is_contiguous()
    plan = PLANS.sparse_mm(packed.shape, weight.shape, transposed, packed.dtype, index)
    if plan is None:
        return linear(reference.unpack(packed, metadata), weight, bias)
    weight = weight.t() if transposed else weight
    metadata = _aligned(metadata)
    bias = None if bias is None else _aligned(bias)
    (out,) = (_empty(*shape) for shape in plan.outputs)
    plan.run(
        _aligned(packed),
        _aligned(weight),
        metadata.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        0,
        0,
    )
    return out


def relu2_sparsify_fp8(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.relu2_sparsify_fp8``, bit for bit. Reads ``h`` once; rows may be strided.

    The kernel takes H divisible by 16, up to 32768, in rows that are 16 bytes aligned; another one, for any H divisible
    by 4, reads ``h`` twice.
    """
    index = h.get_device()
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return relu2_sparsify_fp8(h)
    if h.numel() == 0:
        return reference.relu2_sparsify_fp8(h)
    rows = (h if h.stride(-1) == 1 else h.contiguous()).reshape(-1, h.shape[-1])
    plan = PLANS.packing_fp8(h.shape, rows.stride(0), rows.data_ptr() % 16 == 0, h.dtype, index)
    packed, metadata, row_scale = (_empty(*shape) for shape in plan.outputs)
    plan.launch(rows.data_ptr(), packed.data_ptr(), metadata.data_ptr(), row_scale.data_ptr())
    return packed, metadata, row_scale


def linear_relu2_sparsify_fp8(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.linear_relu2_sparsify_fp8``, for a ``dtype`` of 16 bits, accumulated as ``sparse_mm_fp8`` does it.

    Two kernels: ``h`` never goes to memory but two of every four of ``relu(h)``, which the second makes e4m3 when the
    largest of whole rows is known. They take D divisible by 16 and H by 64; else this multiplies in fp32.
    """
    index = x.get_device()
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return linear_relu2_sparsify_fp8(x, x_scale, weight, weight_scale, bias, dtype)
    plan = PLANS.linear_relu2_sparsify_fp8(x.shape, weight.shape, dtype, index)
    if plan is None:
        return reference.linear_relu2_sparsify_fp8(x, x_scale, weight, weight_scale, bias, dtype)
    kept, metadata, parts = (_empty(*shape) for shape in plan.matmul.outputs)
    packed, row_scale = (_empty(*shape) for shape in plan.squares.outputs)
    x_scale, weight_scale = _aligned(x_scale), _aligned(weight_scale)
    bias = None if bias is None else _aligned(bias)
    plan.matmul.run(
        _aligned(x),
        _aligned(weight),
        0 if bias is None else bias.data_ptr(),
        kept.data_ptr(),
        metadata.data_ptr(),
        x_scale.data_ptr(),
        weight_scale.data_ptr(),
        parts.data_ptr(),
    )
    plan.squares.launch(kept.data_ptr(), parts.data_ptr(), packed.data_ptr(), row_scale.data_ptr())
    return packed, metadata, row_scale


def sparse_mm_fp8(
    packed: Tensor,
    metadata: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As ``reference.sparse_mm_fp8``, for a ``dtype`` of 16 bits: rounded once, deterministic.

    Accumulated as tensor cores do it with e4m3, and ``torch._scaled_mm`` with ``use_fast_accum``: not quite in fp32.

    The kernel takes H and D divisible by 64. For another D the weight is copied into a larger one; for another H this
    unpacks and multiplies in fp32.
    """
    index = packed.get_device()
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return sparse_mm_fp8(packed, metadata, row_scale, weight, weight_scale, bias, dtype)
    if more := -weight.shape[0] % 64:
        weight = pad(weight.view(torch.uint8), (0, 0, 0, more)).view(weight.dtype)
        weight_scale, bias = pad(weight_scale, (0, more)), None if bias is None else pad(bias, (0, more))
        out = sparse_mm_fp8(packed, metadata, row_scale, weight, weight_scale, bias, dtype)
        return out[..., :-more].contiguous()
    plan = PLANS.sparse_mm_fp8(packed.shape, weight.shape, dtype, index)
    if plan is None:
        return reference.sparse_mm_fp8(packed, metadata, row_scale, weight, weight_scale, bias, dtype)
    metadata, row_scale, weight_scale = _aligned(metadata), _aligned(row_scale), _aligned(weight_scale)
    bias = None if bias is None else _aligned(bias)
    (out,) = (_empty(*shape) for shape in plan.outputs)
    plan.run(
        _aligned(packed),
        _aligned(weight),
        metadata.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        row_scale.data_ptr(),
        weight_scale.data_ptr(),
    )
    return out


def relu2_ffn(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, feature_wise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.relu2_ffn``."""
    packed, metadata = linear_relu2_sparsify(x, up, up_bias)
    return sparse_mm(packed, metadata, down, down_bias), packed, metadata


def active_ffn(x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None) -> Tensor:
    """As ``reference.active_ffn``, reading of ``down`` only what belongs to neurons that fire for one token at least.

    What an infinity or NaN in ``down`` would make of a zero is not computed. The kernels take up to 16 tokens, D and H
    divisible by 64, H and the elements of ``x`` up to 65536, and a ``down`` that is a transposed ``[H, D]``: a row for
    each neuron. Else this is dense.
    """
    index = x.get_device()
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return active_ffn(x, up, up_bias, down, down_bias)
    plan = _active_plan(x, down, x.dtype, index)
    if plan is None:
        return linear(reference.relu2(linear(x, up, up_bias)), down, down_bias)
    return _run_active(plan, x, None, up, None, up_bias, down, None, down_bias)


def active_ffn_fp8(
    x: Tensor,
    x_scale: Tensor,
    up: Tensor,
    up_scale: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As ``reference.active_ffn_fp8``, which runs where ``active_ffn`` would be dense, or D is no multiple of 128."""
    index = x.get_device()
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return active_ffn_fp8(x, x_scale, up, up_scale, up_bias, down, down_scale, down_bias, dtype)
    plan = _active_plan(x, down, dtype, index)
    if plan is None:
        return reference.active_ffn_fp8(x, x_scale, up, up_scale, up_bias, down, down_scale, down_bias, dtype)
    return _run_active(plan, x, x_scale, up, up_scale, up_bias, down, down_scale, down_bias)


def _active_plan(x: Tensor, down: Tensor, dtype: torch.dtype, index: int) -> Active | None:
    if down.stride() != (1, down.shape[0]) or down.data_ptr() % 16:
        return None
    return PLANS.active_ffn(x.shape, down.shape, x.dtype != dtype, dtype, index)


def _run_active(
    plan: Active,
    x: Tensor,
    x_scale: Tensor | None,
    up: Tensor,
    up_scale: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    more = [None if t is None else t.contiguous() for t in (up_bias, x_scale, up_scale, down_scale, down_bias)]
    of_up_bias, of_x, of_up, of_down, of_down_bias = (0 if t is None else t.data_ptr() for t in more)
    x, up = _aligned(x), _aligned(up)
    held = [_empty(*shape) for shape in plan.between]
    between, out = [tensor.data_ptr() for tensor in held], _empty(*plan.out)
    plan.first(x.data_ptr(), up.data_ptr(), of_up_bias, of_x, of_up, *between)
    plan.second(*between, down.data_ptr(), of_down, of_down_bias, out.data_ptr())
    return out


def grad_hidden(grad: Tensor, down: Tensor, packed: Tensor, metadata: Tensor) -> Tensor:
    """As ``reference.grad_hidden``. The kernel takes D divisible by 8 and H by 64, and ``down`` row after row."""
    index = grad.get_device()
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return grad_hidden(grad, down, packed, metadata)
    plan = PLANS.grad_hidden(grad.shape, down.shape, grad.dtype, index)
    if plan is None:
        return reference.grad_hidden(grad, down, packed, metadata)
    packed, metadata = _aligned(packed), _aligned(metadata)
    (out,) = (_empty(*shape) for shape in plan.outputs)
    plan.run(_aligned(grad), _aligned(down), packed.data_ptr(), metadata.data_ptr(), out.data_ptr())
    return out


def feature_wise(
    packed: Tensor, metadata: Tensor, permuted: bool, counted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``reference.feature_wise``, bit for bit but for sums. The kernel takes H divisible by 64."""
    index, hidden_dim = packed.get_device(), packed.shape[-1] * 2
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return feature_wise(packed, metadata, permuted, counted)
    tokens = packed.numel() // max(packed.shape[-1], 1)
    plan = PLANS.feature_wise(tokens, hidden_dim, permuted, counted, packed.dtype, index)
    if plan is None:
        return reference.feature_wise(packed, metadata, permuted, counted)
    packed, metadata = _aligned(packed), _aligned(metadata)
    wise, codes, parts, left = (_empty(*shape) for shape in plan.outputs)
    plan.launch(*(tensor.data_ptr() for tensor in (packed, metadata, wise, codes, parts, left)))
    totals, whole = parts.sum(0, dtype=parts.dtype), tokens // 4 * 4
    if whole < tokens:  # one to three rows of the last block of metadata
        rows = layout.to_rows(metadata[-16:], tokens - whole // 16 * 16, hidden_dim)[whole % 16 :]
        left[: tokens - whole] = reference.unpack(packed.reshape(tokens, -1)[whole:], layout.from_rows(rows))
        totals += reference.total(left, counted)
    return wise, codes, totals, left


def densest(counts: Tensor, chosen: int) -> tuple[Tensor, Tensor]:
    """As ``reference.densest``."""
    gpu = counts.get_device()
    if gpu != torch._C._cuda_getDevice():
        with torch.cuda.device(gpu):
            return densest(counts, chosen)
    counts, plan = counts.contiguous(), PLANS.densest(counts.shape[0], chosen, gpu)
    index, slots = (_empty(*shape) for shape in plan.outputs)
    if counts.shape[0]:
        plan.launch(counts.data_ptr(), index.data_ptr(), slots.data_ptr())
    return index, slots


def feature_wise_mm(
    packed: Tensor,
    metadata: Tensor,
    left: Tensor,
    dense: Tensor,
    exact: Tensor,
    slots: Tensor,
    permuted: bool,
    transposed: bool,
) -> Tensor:
    """As ``reference.feature_wise_mm``: fp32 accumulation, rounded once, but for what the tokens left over add, rounded
    again. The kernel takes H and D divisible by 64."""
    index = packed.get_device()
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return feature_wise_mm(packed, metadata, left, dense, exact, slots, permuted, transposed)
    plan = PLANS.feature_wise_mm(packed.shape, dense.shape[-1], permuted, transposed, packed.dtype, index)
    if plan is None:
        return reference.feature_wise_mm(packed, metadata, left, dense, exact, slots, permuted, transposed)
    metadata, exact, slots = _aligned(metadata), _aligned(exact), _aligned(slots)
    dense = dense.reshape(-1, dense.shape[-1])
    (out,) = (_empty(*shape) for shape in plan.outputs)
    plan.run(
        _aligned(packed),
        _aligned(dense),
        metadata.data_ptr(),
        0,
        out.data_ptr(),
        exact.data_ptr(),
        slots.data_ptr(),
    )
    rest = dense[dense.shape[0] // 4 * 4 :]
    if rest.shape[0]:
        of_rest = left[: rest.shape[0]].masked_fill(slots >= 0, 0)
        (out.t() if transposed else out).addmm_(of_rest.t(), rest)
    return out


def unpack(packed: Tensor, metadata: Tensor) -> Tensor:
    """As ``reference.unpack``. The kernel takes H divisible by 16."""
    index, half = packed.get_device(), packed.shape[-1]
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return unpack(packed, metadata)
    if half % 8 or not packed.numel():
        return reference.unpack(packed, metadata)
    packed, metadata = _aligned(packed), _aligned(metadata)
    plan = PLANS.unpack(packed.shape[:-1], 2 * half, packed.dtype, index)
    (dense,) = (_empty(*shape) for shape in plan.outputs)
    plan.launch(packed.data_ptr(), metadata.data_ptr(), dense.data_ptr())
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
    plan = PLANS.columns(packed.shape[:-1], 2 * half, chosen.shape[0], packed.dtype, index)
    (dense,) = (_empty(*shape) for shape in plan.outputs)
    plan.launch(packed.data_ptr(), metadata.data_ptr(), chosen.data_ptr(), dense.data_ptr())
    return dense


def _aligned(tensor: Tensor) -> Tensor:
    """``tensor`` row after row from a multiple of 16 bytes on, as the copy engine needs it; copied if it must be."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
