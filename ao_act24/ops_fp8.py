"""The fp8 operators ``torch.ops.ao_act24.*``, for inference: a scale for each token and each output, computed here.

    relu2_sparsify_fp8(h)           -> packed, metadata, row_scale   relu(h)**2, two of every four kept, by rows in e4m3
    linear_relu2_sparsify_fp8(x, x_scale, weight, weight_scale, bias, dtype)   -> packed, metadata, row_scale
                                    the same of h = x_scale * (x @ weight.T) * weight_scale + bias, in dtype
    sparse_mm_fp8(packed, metadata, row_scale, weight, weight_scale, bias, dtype)   -> out
                                    row_scale * (unpack(packed, metadata) @ weight.T) * weight_scale + bias, in dtype
    active_ffn_fp8(x, x_scale, up, up_scale, up_bias, down, down_scale, down_bias, dtype)   -> out
                                    for few tokens the whole FFN, nothing dropped: relu(h)**2 by rows in e4m3

``h`` is ``[..., H]``, bfloat16 or float16, H divisible by 4; ``packed [..., H / 2]`` and ``weight [D, H]`` are e4m3,
``row_scale [...]`` and ``weight_scale [D]`` fp32, ``bias [D]`` and ``out [..., D]`` of ``dtype``, bfloat16 or float16.
``x`` is ``[..., D]``, and the weight that it is multiplied by, as ``up``, ``[H, D]``; ``down`` is ``[D, H]``.
``metadata`` is as in ``ops``. What is
rounded where, ``kernels.reference`` says. None has a gradient.
"""

from typing import Any

import torch
from torch import Tensor

from ao_act24 import ops
from ao_act24.kernels import cuda, layout, plans, reference


def _check_sixteen(name: str, dtype: torch.dtype) -> None:
    torch._check_type(dtype in plans.ELEMENTS, lambda: f"{name} must be bfloat16 or float16, got {dtype}")


def _check_e4m3(name: str, tensor: Tensor) -> None:
    torch._check_type(
        tensor.dtype == reference.E4M3, lambda: f"{name} must have dtype float8_e4m3fn, got {tensor.dtype}"
    )


def _check_scale(name: str, scale: Tensor, shape: torch.Size) -> None:
    torch._check_type(scale.dtype == torch.float32, lambda: f"{name} must have dtype float32, got {scale.dtype}")
    torch._check_value(scale.shape == shape, lambda: f"{name} must have shape {tuple(shape)}, got {tuple(scale.shape)}")


def _check_device(name: str, tensor: Tensor, device: torch.device, other: str = "packed") -> None:
    torch._check_value(
        tensor.device == device, lambda: f"{name} must be on the device of {other}, {device}, got {tensor.device}"
    )


def _check_h(h: Tensor) -> None:
    _check_sixteen("the dtype of h", h.dtype)
    ops._check_hidden("h", h)


def _check_sparse_mm(
    packed: Tensor,
    metadata: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> None:
    _check_e4m3("packed", packed)
    torch._check_value(
        packed.dim() >= 1 and packed.shape[-1] % 2 == 0,
        lambda: f"packed must be [..., H / 2] with H divisible by 4, got shape {tuple(packed.shape)}",
    )
    ops._check_metadata(metadata, packed.shape[:-1], packed.shape[-1] * 2, packed.device)
    _check_e4m3("weight", weight)
    ops._check_weight(weight, 1, packed.shape[-1] * 2, "packed")
    _check_scale("row_scale", row_scale, packed.shape[:-1])
    _check_scale("weight_scale", weight_scale, weight.shape[:1])
    _check_sixteen("dtype", dtype)
    ops._check_bias(bias, weight, "out", packed.new_empty(0, dtype=dtype))
    _check_device("weight", weight, packed.device)
    _check_device("row_scale", row_scale, packed.device)
    _check_device("weight_scale", weight_scale, packed.device)


def _check_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    name: str = "weight",
) -> None:
    _check_e4m3("x", x)
    _check_e4m3(name, weight)
    torch._check_value(
        x.dim() >= 1 and weight.dim() == 2 and weight.shape[1] == x.shape[-1] and weight.shape[0] % 4 == 0,
        lambda: (
            f"{name} must be [H, D] with H divisible by 4 and D as in x, of shape {tuple(x.shape)}, "
            f"got shape {tuple(weight.shape)}"
        ),
    )
    _check_scale("x_scale", x_scale, x.shape[:-1])
    _check_scale(f"{name}_scale", weight_scale, weight.shape[:1])
    _check_sixteen("dtype", dtype)
    ops._check_bias(bias, weight, "h", x.new_empty(0, dtype=dtype), name)
    for each, tensor in ((name, weight), ("x_scale", x_scale), (f"{name}_scale", weight_scale)):
        _check_device(each, tensor, x.device, "x")


def _plain_linear(x, x_scale, weight, weight_scale, bias, dtype):  # type: ignore[no-untyped-def]
    return (
        x.dtype == weight.dtype == reference.E4M3
        and weight.dim() == 2
        and x.dim() > 0
        and weight.shape[1] == x.shape[-1]
        and weight.shape[0] % 4 == 0
        and x_scale.dtype == weight_scale.dtype == torch.float32
        and x_scale.shape == x.shape[:-1]
        and weight_scale.shape == weight.shape[:1]
        and x.device == weight.device == x_scale.device == weight_scale.device
        and dtype in plans.ELEMENTS
        and (bias is None or (bias.shape == weight_scale.shape and bias.dtype == dtype and bias.device == x.device))
    )


def _check_ffn(
    x: Tensor,
    x_scale: Tensor,
    up: Tensor,
    up_scale: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_bias: Tensor | None,
    dtype: torch.dtype,
) -> None:
    _check_linear(x, x_scale, up, up_scale, up_bias, dtype, "up")
    _check_e4m3("down", down)
    ops._check_weight(down, 1, up.shape[0], "up", "down")
    _check_scale("down_scale", down_scale, down.shape[:1])
    ops._check_bias(down_bias, down, "out", x.new_empty(0, dtype=dtype), "down")
    for name, tensor in (("down", down), ("down_scale", down_scale)):
        _check_device(name, tensor, x.device, "x")


def _plain_ffn(x, x_scale, up, up_scale, up_bias, down, down_scale, down_bias, dtype):  # type: ignore[no-untyped-def]
    return (
        _plain_linear(x, x_scale, up, up_scale, up_bias, dtype)
        and down.dtype == reference.E4M3
        and down.dim() == 2
        and down.shape[1] == up.shape[0]
        and down_scale.dtype == torch.float32
        and down_scale.shape == down.shape[:1]
        and x.device == down.device == down_scale.device
        and (
            down_bias is None
            or (down_bias.shape == down_scale.shape and down_bias.dtype == dtype and down_bias.device == x.device)
        )
    )


def _fake_linear(x, x_scale, weight, weight_scale, bias, dtype):  # type: ignore[no-untyped-def]
    return _fake_pack(x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype))


def _plain(packed, metadata, row_scale, weight, weight_scale, bias, dtype):  # type: ignore[no-untyped-def]
    return (
        packed.dtype == weight.dtype == reference.E4M3
        and weight.dim() == 2
        and packed.dim() > 0
        and weight.shape[1] == 2 * packed.shape[-1]
        and packed.shape[-1] % 2 == 0
        and metadata.dtype == torch.uint8
        and metadata.shape == layout.metadata_shape((*packed.shape[:-1], weight.shape[1]))
        and row_scale.dtype == weight_scale.dtype == torch.float32
        and row_scale.shape == packed.shape[:-1]
        and weight_scale.shape == weight.shape[:1]
        and packed.device == metadata.device == weight.device == row_scale.device == weight_scale.device
        and dtype in plans.ELEMENTS
        and (
            bias is None or (bias.shape == weight_scale.shape and bias.dtype == dtype and bias.device == packed.device)
        )
    )


def _fake_pack(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    packed, metadata = ops._fake_pack(h)
    return packed.to(reference.E4M3), metadata, h.new_empty(h.shape[:-1], dtype=torch.float32)


ops._define(
    "relu2_sparsify_fp8(Tensor h) -> (Tensor packed, Tensor metadata, Tensor row_scale)",
    _check_h,
    reference.relu2_sparsify_fp8,
    _fake_pack,
    (cuda.relu2_sparsify_fp8, lambda h: h.dtype in plans.ELEMENTS and h.dim() > 0 and h.shape[-1] % 4 == 0),
)
ops._define(
    "linear_relu2_sparsify_fp8(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "ScalarType dtype) -> (Tensor packed, Tensor metadata, Tensor row_scale)",
    _check_linear,
    reference.linear_relu2_sparsify_fp8,
    _fake_linear,
    (cuda.linear_relu2_sparsify_fp8, _plain_linear),
)
ops._define(
    "sparse_mm_fp8(Tensor packed, Tensor metadata, Tensor row_scale, Tensor weight, Tensor weight_scale, "
    "Tensor? bias, ScalarType dtype) -> Tensor",
    _check_sparse_mm,
    reference.sparse_mm_fp8,
    lambda packed, metadata, row_scale, weight, weight_scale, bias, dtype: packed.new_empty(
        (*packed.shape[:-1], weight.shape[0]), dtype=dtype
    ),
    (cuda.sparse_mm_fp8, _plain),
)
ops._define(
    "active_ffn_fp8(Tensor x, Tensor x_scale, Tensor up, Tensor up_scale, Tensor? up_bias, Tensor down, "
    "Tensor down_scale, Tensor? down_bias, ScalarType dtype) -> Tensor",
    _check_ffn,
    reference.active_ffn_fp8,
    lambda x, x_scale, up, up_scale, up_bias, down, down_scale, down_bias, dtype: x.new_empty(
        (*x.shape[:-1], down.shape[0]), dtype=dtype
    ),
    (cuda.active_ffn_fp8, _plain_ffn),
)


def _no_gradient(ctx: Any, *_: Any) -> None:
    raise NotImplementedError("the fp8 operators have no gradient: fp8 is for inference, under torch.no_grad()")


for _name in ("relu2_sparsify_fp8", "linear_relu2_sparsify_fp8", "sparse_mm_fp8", "active_ffn_fp8"):
    torch.library.register_autograd(f"ao_act24::{_name}", _no_gradient)
    for _device_type in ("cpu", "cuda"):
        ops._define_autocast(_name, _device_type, casts=False)

relu2_sparsify_fp8 = torch.ops.ao_act24.relu2_sparsify_fp8
linear_relu2_sparsify_fp8 = torch.ops.ao_act24.linear_relu2_sparsify_fp8
sparse_mm_fp8 = torch.ops.ao_act24.sparse_mm_fp8
active_ffn_fp8 = torch.ops.ao_act24.active_ffn_fp8
