"""The operators ``torch.ops.ao_act24.*``: schema, fake, implementation, autocast. Gradients are in ``autograd``.

    relu2_sparsify(h)                             -> packed, metadata      relu(h)**2, two of every four kept
    linear_relu2_sparsify(x, weight, bias)        -> packed, metadata      the same of h = x @ weight.T + bias
    sparsify(dense)                               -> packed, metadata      the two of largest magnitude kept
    gather(dense, metadata)                       -> packed                the entries that metadata keeps
    unpack(packed, metadata)                      -> dense                 the inverse: zeros elsewhere
    sparse_mm(packed, metadata, weight, bias)     -> out                   unpack(packed, metadata) @ weight.T + bias
    sampled_mm(grad, weight, metadata)            -> packed                gather(grad @ weight, metadata)

for few tokens both matmuls in one, exactly::

    active_ffn(x, up, up_bias, down, down_bias)   -> out       relu(x @ up.T + up_bias)**2 @ down.T + down_bias

for training both matmuls in one, and what its gradient is made of, without gradients of their own::

    relu2_ffn(x, up, up_bias, down, down_bias, feature_wise)   -> out, packed, metadata
    grad_hidden(grad, down, packed, metadata)           -> packed           by h: mask * (grad @ down) * 2 relu(h)
    feature_wise(packed, metadata, permuted, counted)   -> packed, metadata, totals, left     2:4 along tokens
    densest(counts, chosen)                             -> index, slots     the largest counts
    feature_wise_mm(packed, metadata, left, dense, exact, slots, permuted, transposed)  -> grad
                                                        unpacked.T @ dense of such, some rows from exact
    columns(packed, metadata, index)                    -> dense            unpack(packed, metadata)[..., index]

``[..., H]`` dense tensors have H divisible by 4; leading dimensions are tokens; ``packed`` is ``[..., H / 2]``,
``weight`` and ``down`` ``[D, H]`` (``[H, D]`` where ``x`` is ``[..., D]``, as ``up``), ``out`` and ``grad``
``[..., D]``; ``metadata`` is described in ``kernels.layout``. All are functional, take bfloat16, float16, float32 and
float64 and any strides, and raise ``TypeError`` or ``ValueError`` naming the argument that is wrong.
"""

import math
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ao_act24.kernels import cuda, layout, plans, reference

_lib = torch.library.Library("ao_act24", "DEF")


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _floating(name: str, tensor: Tensor) -> None:
    torch._check_type(
        tensor.dtype in DTYPES,
        lambda: f"{name} must have dtype bfloat16, float16, float32 or float64, got {tensor.dtype}",
    )
    torch._check_value(tensor.dim() >= 1, lambda: f"{name} must have at least one dimension, got a scalar")


def _same(name: str, got: Tensor, other_name: str, other: Tensor) -> None:
    torch._check_type(
        got.dtype == other.dtype,
        lambda: f"{name} must have the dtype of {other_name}, {other.dtype}, got {got.dtype}",
    )
    torch._check_value(
        got.device == other.device,
        lambda: f"{name} must be on the device of {other_name}, {other.device}, got {got.device}",
    )


def _check_hidden(name: str, dense: Tensor) -> None:
    _floating(name, dense)
    torch._check_value(
        dense.shape[-1] % 4 == 0, lambda: f"the last dimension of {name} must be divisible by 4, got {dense.shape[-1]}"
    )


def _check_metadata(metadata: Tensor, tokens: Sequence[int], hidden_dim: int, device: torch.device) -> None:
    torch._check_type(metadata.dtype == torch.uint8, lambda: f"metadata must have dtype uint8, got {metadata.dtype}")
    torch._check_value(
        metadata.device == device,
        lambda: f"metadata must be on the other tensors' device, {device}, got {metadata.device}",
    )
    dense = (*tokens, hidden_dim)
    want = layout.metadata_shape(dense)
    torch._check_value(
        metadata.dim() == 2 and metadata.shape[0] == want[0] and metadata.shape[1] == want[1],
        lambda: f"metadata must have shape {want} for a dense shape of {dense}, got {tuple(metadata.shape)}",
    )


def _check_packed(packed: Tensor, metadata: Tensor) -> None:
    _floating("packed", packed)
    torch._check_value(
        packed.shape[-1] % 2 == 0, lambda: f"the last dimension of packed must be even, got {packed.shape[-1]}"
    )
    _check_metadata(metadata, packed.shape[:-1], packed.shape[-1] * 2, packed.device)


def _check_weight(weight: Tensor, dim: int, size: int, size_of: str, name: str = "weight") -> None:
    torch._check_value(weight.dim() == 2, lambda: f"{name} must be [D, H], got shape {tuple(weight.shape)}")
    torch._check_value(
        weight.shape[dim] == size,
        lambda: f"{name} must be [D, H] with {'DH'[dim]} = {size} as in {size_of}, got shape {tuple(weight.shape)}",
    )


def _check_gather(dense: Tensor, metadata: Tensor) -> None:
    _check_hidden("dense", dense)
    _check_metadata(metadata, dense.shape[:-1], dense.shape[-1], dense.device)


def _check_sparse_mm(packed: Tensor, metadata: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    _check_packed(packed, metadata)
    _check_weight(weight, 1, packed.shape[-1] * 2, "packed")
    _same("weight", weight, "packed", packed)
    _check_bias(bias, weight, "packed", packed)


def _plain_sparse_mm(packed: Tensor, metadata: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    *tokens, half = packed.shape or (1,)  # a scalar is not plain
    return (
        packed.dim() > 0
        and weight.dim() == 2
        and weight.shape[1] == 2 * half
        and half % 2 == 0
        and metadata.shape == layout.metadata_shape((*tokens, 2 * half))
        and metadata.dtype == torch.uint8
        and packed.dtype == weight.dtype
        and packed.dtype in plans.ELEMENTS
        and packed.device == weight.device == metadata.device
        and _plain_bias(bias, weight)
    )


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, name: str = "weight") -> None:
    _floating("x", x)
    torch._check_value(
        weight.dim() == 2 and weight.shape[1] == x.shape[-1] and weight.shape[0] % 4 == 0,
        lambda: (
            f"{name} must be [H, D] with H divisible by 4 and D = {x.shape[-1]} as in x, "
            f"got shape {tuple(weight.shape)}"
        ),
    )
    _same(name, weight, "x", x)
    _check_bias(bias, weight, "x", x, name)


def _check_bias(bias: Tensor | None, weight: Tensor, other_name: str, other: Tensor, of: str = "weight") -> None:
    """``of``: the name of the weight, which the bias has with ``_bias``; of ``weight`` it is ``bias``."""
    if bias is not None:
        name = "bias" if of == "weight" else f"{of}_bias"
        torch._check_value(
            bias.dim() == 1 and bias.shape[0] == weight.shape[0],
            lambda: f"{name} must have shape ({weight.shape[0]},) as {of} has rows, got {tuple(bias.shape)}",
        )
        _same(name, bias, other_name, other)


def _plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return (
        weight.dim() == 2
        and x.dim() > 0
        and weight.shape[1] == x.shape[-1]
        and weight.shape[0] % 4 == 0
        and x.dtype == weight.dtype
        and x.dtype in plans.ELEMENTS
        and x.device == weight.device
        and _plain_bias(bias, weight)
    )


def _plain_bias(bias: Tensor | None, weight: Tensor) -> bool:
    return bias is None or (
        bias.shape == weight.shape[:1] and bias.dtype == weight.dtype and bias.device == weight.device
    )


def _check_sampled_mm(grad: Tensor, weight: Tensor, metadata: Tensor) -> None:
    _floating("grad", grad)
    _check_weight(weight, 0, grad.shape[-1], "grad")
    _same("weight", weight, "grad", grad)
    torch._check_value(
        weight.shape[1] % 4 == 0, lambda: f"the last dimension of weight must be divisible by 4, got {weight.shape[1]}"
    )
    _check_metadata(metadata, grad.shape[:-1], weight.shape[1], grad.device)


def _fake_pack(dense: Tensor) -> tuple[Tensor, Tensor]:
    *tokens, hidden_dim = dense.shape
    metadata = dense.new_empty(layout.metadata_shape(dense.shape), dtype=torch.uint8)
    return dense.new_empty((*tokens, hidden_dim // 2)), metadata


def _define(
    schema: str,
    check: Callable[..., None],
    implementation: Callable[..., object],
    fake: Callable[..., object],
    fast: tuple[Callable[..., object], Callable[..., bool]] | None = None,
) -> None:
    """Register one operator; all implementations, and the fake, check their arguments first.

    ``fast``: a kernel, which runs instead of ``implementation`` where ``cuda.why_not`` has nothing against it, and
    whether arguments are plainly right. Only if not, ``check`` is asked: it has words for everything that can be wrong,
    and takes longer than a kernel takes to launch.
    """

    def checked(run: Callable[..., object]) -> Callable[..., object]:
        def call(*args):  # type: ignore[no-untyped-def]
            check(*args)
            return run(*args)

        return call

    name = _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _lib.impl(name, checked(implementation), "CompositeExplicitAutograd")
    if fast is not None:
        kernel, plainly_right = fast

        def fastest(first: Tensor, *others: object) -> object:
            if not plainly_right(first, *others):
                check(first, *others)
            run = implementation if cuda.why_not(first.device, first.dtype) else kernel
            return run(first, *others)

        _lib.impl(name, fastest, "CUDA")

    def traced(*args):  # type: ignore[no-untyped-def]
        if "torch._inductor.lowering" in sys.modules:
            from ao_act24 import lowering  # noqa: F401  # here, as it needs Inductor, and Inductor needs it after tracing
        return checked(fake)(*args)

    torch.library.register_fake(f"ao_act24::{name}", traced, lib=_lib)


def _never(*_: object) -> bool:
    """For operators that are called once in a backward, where a check costs little."""
    return False


_define(
    "relu2_sparsify(Tensor h) -> (Tensor packed, Tensor metadata)",
    lambda h: _check_hidden("h", h),
    reference.relu2_sparsify,
    _fake_pack,
    (cuda.relu2_sparsify, lambda h: h.dtype in plans.ELEMENTS and h.dim() > 0 and h.shape[-1] % 4 == 0),
)
_define(
    "linear_relu2_sparsify(Tensor x, Tensor weight, Tensor? bias=None) -> (Tensor packed, Tensor metadata)",
    _check_linear,
    reference.linear_relu2_sparsify,
    lambda x, weight, bias=None: _fake_pack(x.new_empty((*x.shape[:-1], weight.shape[0]))),
    (cuda.linear_relu2_sparsify, _plain_linear),
)
_define(
    "sparsify(Tensor dense) -> (Tensor packed, Tensor metadata)",
    lambda dense: _check_hidden("dense", dense),
    reference.sparsify,
    _fake_pack,
)
_define(
    "gather(Tensor dense, Tensor metadata) -> Tensor",
    _check_gather,
    reference.gather,
    lambda dense, metadata: dense.new_empty((*dense.shape[:-1], dense.shape[-1] // 2)),
)
_define(
    "unpack(Tensor packed, Tensor metadata) -> Tensor",
    _check_packed,
    reference.unpack,
    lambda packed, metadata: packed.new_empty((*packed.shape[:-1], packed.shape[-1] * 2)),
    (cuda.unpack, _never),
)
_define(
    "sparse_mm(Tensor packed, Tensor metadata, Tensor weight, Tensor? bias=None) -> Tensor",
    _check_sparse_mm,
    reference.sparse_mm,
    lambda packed, metadata, weight, bias=None: packed.new_empty((*packed.shape[:-1], weight.shape[0])),
    (cuda.sparse_mm, _plain_sparse_mm),
)
_define(
    "sampled_mm(Tensor grad, Tensor weight, Tensor metadata) -> Tensor",
    _check_sampled_mm,
    reference.sampled_mm,
    lambda grad, weight, metadata: grad.new_empty((*grad.shape[:-1], weight.shape[1] // 2)),
)


def _check_ffn(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, feature_wise: bool = False
) -> None:
    _check_linear(x, up, up_bias, "up")
    _check_weight(down, 1, up.shape[0], "up", "down")
    _same("down", down, "x", x)
    _check_bias(down_bias, down, "x", x, "down")


def _plain_ffn(x, up, up_bias, down, down_bias, feature_wise=False):  # type: ignore[no-untyped-def]
    return (
        _plain_linear(x, up, up_bias)
        and down.dim() == 2
        and down.shape[1] == up.shape[0]
        and down.dtype == x.dtype
        and down.device == x.device
        and _plain_bias(down_bias, down)
    )


def _fake_ffn(x, up, up_bias, down, down_bias, feature_wise):  # type: ignore[no-untyped-def]
    out = x.new_empty((*x.shape[:-1], down.shape[0]))
    return out, *_fake_pack(x.new_empty((*x.shape[:-1], up.shape[0])))


def _check_grad_hidden(grad: Tensor, down: Tensor, packed: Tensor, metadata: Tensor) -> None:
    _check_sampled_mm(grad, down, metadata)
    _same("packed", packed, "grad", grad)
    want = (*grad.shape[:-1], down.shape[1] // 2)
    torch._check_value(packed.shape == want, lambda: f"packed must have shape {tuple(want)}, got {tuple(packed.shape)}")


def _fake_feature_wise(packed: Tensor, metadata: Tensor, permuted: bool, counted: bool) -> tuple[Tensor, ...]:
    tokens, hidden_dim = math.prod(packed.shape[:-1]), packed.shape[-1] * 2
    codes = packed.new_empty(layout.metadata_shape((hidden_dim, tokens // 4 * 4)), dtype=torch.uint8)
    dtype = torch.int32 if counted else reference.accumulation_dtype(packed.dtype)
    totals, left = packed.new_empty(hidden_dim, dtype=dtype), packed.new_empty((3, hidden_dim))
    return packed.new_empty((tokens // 4 * 2, hidden_dim)), codes, totals, left


def _check_feature_wise_mm(
    packed: Tensor,
    metadata: Tensor,
    left: Tensor,
    dense: Tensor,
    exact: Tensor,
    slots: Tensor,
    permuted: bool,
    transposed: bool,
) -> None:
    _floating("packed", packed)
    torch._check_value(
        packed.dim() == 2 and packed.shape[0] % 2 == 0,
        lambda: f"packed must be [tokens // 4 * 2, H], got shape {tuple(packed.shape)}",
    )
    _check_metadata(metadata, packed.shape[1:], packed.shape[0] * 2, packed.device)
    _same("dense", dense, "packed", packed)
    _same("left", left, "packed", packed)
    torch._check_value(
        left.dim() == 2 and left.shape[0] == 3 and left.shape[1] == packed.shape[1],
        lambda: f"left must be [3, H] with H = {packed.shape[1]} as in packed, got {tuple(left.shape)}",
    )
    torch._check_value(
        dense.dim() >= 2 and math.prod(dense.shape[:-1]) // 4 * 2 == packed.shape[0],
        lambda: f"dense must be [..., D] with the tokens of packed, {tuple(packed.shape)}, got {tuple(dense.shape)}",
    )
    _same("exact", exact, "packed", packed)
    torch._check_value(
        exact.dim() == 2 and exact.shape[1] == dense.shape[-1],
        lambda: f"exact must be [K, D] with D = {dense.shape[-1]} as in dense, got {tuple(exact.shape)}",
    )
    torch._check_type(slots.dtype == torch.int32, lambda: f"slots must have dtype int32, got {slots.dtype}")
    torch._check_value(
        slots.dim() == 1 and slots.shape[0] == packed.shape[1] and slots.device == packed.device,
        lambda: f"slots must be [{packed.shape[1]}] on {packed.device}, got {tuple(slots.shape)} on {slots.device}",
    )


def _check_densest(counts: Tensor, chosen: int) -> None:
    torch._check_type(counts.dtype == torch.int32, lambda: f"counts must have dtype int32, got {counts.dtype}")
    torch._check_value(counts.dim() == 1, lambda: f"counts must be a vector, got shape {tuple(counts.shape)}")
    torch._check_value(
        0 <= chosen <= counts.shape[0], lambda: f"chosen must be in [0, {counts.shape[0]}], got {chosen}"
    )


def _check_columns(packed: Tensor, metadata: Tensor, index: Tensor) -> None:
    _check_packed(packed, metadata)
    torch._check_type(index.dtype == torch.int64, lambda: f"index must have dtype int64, got {index.dtype}")
    torch._check_value(
        index.dim() == 1 and index.device == packed.device,
        lambda: f"index must be a vector on {packed.device}, got shape {tuple(index.shape)} on {index.device}",
    )


_define(
    "relu2_ffn(Tensor x, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, bool feature_wise)"
    " -> (Tensor out, Tensor packed, Tensor metadata)",
    _check_ffn,
    reference.relu2_ffn,
    _fake_ffn,
    (cuda.relu2_ffn, _plain_ffn),
)
_define(
    "active_ffn(Tensor x, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias) -> Tensor",
    _check_ffn,
    reference.active_ffn,
    lambda x, up, up_bias, down, down_bias: x.new_empty((*x.shape[:-1], down.shape[0])),
    (cuda.active_ffn, _plain_ffn),
)
_define(
    "grad_hidden(Tensor grad, Tensor down, Tensor packed, Tensor metadata) -> Tensor",
    _check_grad_hidden,
    reference.grad_hidden,
    lambda grad, down, packed, metadata: torch.empty_like(packed, memory_format=torch.contiguous_format),
    (cuda.grad_hidden, _never),
)
_define(
    "feature_wise(Tensor packed, Tensor metadata, bool permuted, bool counted)"
    " -> (Tensor packed, Tensor metadata, Tensor totals, Tensor left)",
    lambda packed, metadata, permuted, counted: _check_packed(packed, metadata),
    reference.feature_wise,
    _fake_feature_wise,
    (cuda.feature_wise, _never),
)
_define(
    "feature_wise_mm(Tensor packed, Tensor metadata, Tensor left, Tensor dense, Tensor exact, Tensor slots, "
    "bool permuted, bool transposed) -> Tensor",
    _check_feature_wise_mm,
    reference.feature_wise_mm,
    lambda packed, metadata, left, dense, exact, slots, permuted, transposed: dense.new_empty(
        (dense.shape[-1], packed.shape[1]) if transposed else (packed.shape[1], dense.shape[-1])
    ),
    (cuda.feature_wise_mm, _never),
)
_define(
    "densest(Tensor counts, SymInt chosen) -> (Tensor index, Tensor slots)",
    _check_densest,
    reference.densest,
    lambda counts, chosen: (counts.new_empty(chosen, dtype=torch.int64), torch.empty_like(counts)),
    (cuda.densest, _never),
)
_define(
    "columns(Tensor packed, Tensor metadata, Tensor index) -> Tensor",
    _check_columns,
    reference.columns,
    lambda packed, metadata, index: packed.new_empty((*packed.shape[:-1], index.shape[0])),
    (cuda.columns, _never),
)


def _define_autocast(name: str, device_type: str, casts: bool = True) -> None:
    """Under autocast a matmul runs in the autocast dtype, as F.linear does; the packing ops keep their input's.

    Not ``casts``: it runs as it is, and what the reference computes it with, too.
    """
    key = getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}")
    op = getattr(torch.ops.ao_act24, name)

    def autocast(*args):  # type: ignore[no-untyped-def]
        dtype = torch.get_autocast_dtype(device_type)

        def cast(arg: object) -> object:
            eligible = isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64
            return arg.to(dtype) if eligible and arg.device.type == device_type else arg  # type: ignore[attr-defined]

        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*map(cast, args) if casts else args)

    _lib.impl(name, autocast, f"Autocast{device_type.upper()}")


for _name in ("linear_relu2_sparsify", "sparse_mm", "sampled_mm", "relu2_ffn", "active_ffn"):
    for _device_type in ("cpu", "cuda"):
        _define_autocast(_name, _device_type)

relu2_sparsify = torch.ops.ao_act24.relu2_sparsify
linear_relu2_sparsify = torch.ops.ao_act24.linear_relu2_sparsify
sparsify = torch.ops.ao_act24.sparsify
gather = torch.ops.ao_act24.gather
unpack = torch.ops.ao_act24.unpack
sparse_mm = torch.ops.ao_act24.sparse_mm
sampled_mm = torch.ops.ao_act24.sampled_mm
relu2_ffn = torch.ops.ao_act24.relu2_ffn
active_ffn = torch.ops.ao_act24.active_ffn
grad_hidden = torch.ops.ao_act24.grad_hidden
feature_wise = torch.ops.ao_act24.feature_wise
densest = torch.ops.ao_act24.densest
feature_wise_mm = torch.ops.ao_act24.feature_wise_mm
columns = torch.ops.ao_act24.columns
