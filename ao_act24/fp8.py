"""Weights in fp8 as torchao has them: ``Float8Tensor``, in e4m3 with a scale for each output (row).

2:4 takes those of ``quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))``. torchao itself
multiplies by them, the activation quantised by rows at each call.
"""

from typing import Any

import torch
from torch import Tensor
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import Float8Tensor, PerRow
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs
from torchao.utils import TorchAOBaseTensor

from ao_act24.kernels import layout, plans
from ao_act24.kernels.reference import E4M3, E4M3_FLOOR, E4M3_MAX

DTYPES = tuple(plans.ELEMENTS)  # of activations and results
INFERENCE_ONLY = "fp8 has no gradients: in 2:4 it runs under torch.no_grad()"
NOT_CONVERTED = "sparsify_ converts parameters [outputs, inputs] that nothing but ReLU² FFNs uses"
HOW_TO_CONVERT = 'sparsify_(model, Act24Config(dtype="fp8")), or torchao.quantization.quantize_, converts them once'


def to_fp8(weight: Tensor) -> Float8Tensor:
    """``weight [D, H]`` as ``quantize_`` would have it, which refuses to on a CPU; but rows of zeros stay zeros.

    So they do in what it multiplies: torchao makes NaN of both. Scales stay in fp32, where torchao rounds those of a
    bfloat16 weight to its dtype.
    """
    return from_parts(*rows_to_fp8(weight.contiguous()), weight.dtype)


def rows_to_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """``[..., D]`` in e4m3, and the scales ``[...]``, in fp32: a row's largest magnitude, at least 1e-12, over 448.

    Nothing to clamp: what rounding leaves above 448 is far below 464, from where e4m3 has no number.
    """
    scale = values.abs().amax(-1).float().clamp_min(E4M3_FLOOR) / E4M3_MAX
    return (values.float() / scale.unsqueeze(-1)).to(E4M3), scale


def from_parts(qdata: Tensor, scale: Tensor, dtype: torch.dtype) -> Float8Tensor:
    """``qdata [D, H]`` in e4m3 and ``scale [D]``; what multiplies by it gives ``dtype``."""
    return Float8Tensor(qdata, scale.unsqueeze(-1), block_size=[1, qdata.shape[1]], dtype=dtype, **_how())


def _how() -> dict[str, Any]:
    activation = QuantizeTensorToFloat8Kwargs(hp_value_lb=E4M3_FLOOR)
    return {"mm_config": Float8MMConfig(use_fast_accum=True), "act_quant_kwargs": activation}


def is_fp8(weight: Any) -> bool:
    return isinstance(weight, Float8Tensor)


def why_not_by_rows(weight: Float8Tensor) -> str:
    """Why 2:4 does not take a weight in fp8; empty if it does."""
    how = weight.act_quant_kwargs
    if how is None:
        return "its activation stays in 16 bits"
    dtypes = {weight.qdata.dtype, how.float8_dtype}
    if dtypes != {E4M3}:
        return f"it is in {', '.join(sorted(map(str, dtypes)))}"
    if list(weight.block_size) != [1, weight.shape[-1]] or how.granularity != PerRow():
        return f"its scales are of blocks {list(weight.block_size)}, of the activation {how.granularity}"
    if (how.hp_value_lb or 0) > E4M3_FLOOR or how.hp_value_ub is not None:
        return "the activation's scale is bounded"
    if weight.mm_config is not None and not weight.mm_config.use_fast_accum:
        return "its products are not accumulated fast (use_fast_accum=False)"
    return ""


def to_torchao(packed: Tensor, metadata: Tensor, row_scale: Tensor, dtype: torch.dtype) -> TorchAOBaseTensor:
    """What ``relu2_sparsify_fp8`` gives as torchao's ``Float8Sparse2x4_2DData2DMetadataTensor``, bit by bit.

    ``packed [tokens, H / 2]``; ``dtype``: what the tensor says that it stands for. torchao's own kernel multiplies it
    right from an H of 256 on; at 128 (torchao 0.18) it is wrong by itself.

    Raises:
        TypeError: unless packed is in e4m3.
        ValueError: unless packed is two-dimensional, tokens divisible by 64 and H by 128.
        NotImplementedError: on torchao < 0.18, which has no such tensor.
    """
    Sparse = torchao_float8_sparse()
    if packed.dtype != E4M3:
        raise TypeError(f"packed must have dtype float8_e4m3fn, got {packed.dtype}")
    tokens, hidden_dim = packed.shape[0], 2 * packed.shape[-1]
    if packed.dim() != 2 or tokens % 64 or hidden_dim % 128:
        raise ValueError(
            f"packed must be [tokens, H / 2], of (tokens, H) divisible by (64, 128), got {(*packed.shape,)}"
        )
    theirs = layout.to_cutlass_sm90_fp8(layout.to_rows(metadata, tokens, hidden_dim))
    return Sparse(packed, theirs, row_scale.unsqueeze(-1), block_size=[1, hidden_dim], dtype=dtype)


def from_torchao(sparse: TorchAOBaseTensor) -> tuple[Tensor, Tensor, Tensor]:
    """``packed``, ``metadata`` and ``row_scale`` of such a tensor, bit by bit: the inverse of ``to_torchao``.

    Raises:
        TypeError: if ``sparse`` is another tensor.
        ValueError: unless its shape is divisible by (64, 128).
    """
    if not isinstance(sparse, torchao_float8_sparse()):
        raise TypeError(f"sparse must be a Float8Sparse2x4_2DData2DMetadataTensor, got {type(sparse).__name__}")
    tokens, hidden_dim = sparse.shape
    if tokens % 64 or hidden_dim % 128:
        raise ValueError(f"sparse must have a shape divisible by (64, 128), got {(*sparse.shape,)}")
    rows = layout.from_cutlass_sm90_fp8(sparse.sparse_metadata.view(torch.uint8).reshape(tokens, hidden_dim // 8))
    return sparse.qdata, layout.from_rows(rows), sparse.scale.squeeze(-1)


def torchao_float8_sparse() -> Any:
    try:
        from torchao.quantization.quantize_.workflows import Float8Sparse2x4_2DData2DMetadataTensor
    except ImportError as error:
        raise NotImplementedError(
            "converting to and from Float8Sparse2x4_2DData2DMetadataTensor needs torchao >= 0.18, which introduced it"
        ) from error
    return Float8Sparse2x4_2DData2DMetadataTensor
