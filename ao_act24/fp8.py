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

INFERENCE_ONLY = "fp8 has no gradients: in 2:4 it runs under torch.no_grad()"
HOW_TO_CONVERT = 'sparsify_(model, Act24Config(dtype="fp8")), or torchao.quantization.quantize_, converts them once'


def to_fp8(weight: Tensor) -> Float8Tensor:
    """``weight [D, H]`` as ``quantize_`` would have it, which refuses to on a CPU."""
    return Float8Tensor.from_hp(weight, granularity=PerRow(), **_how())


def rows_to_fp8(x: Tensor) -> Float8Tensor:
    """An activation ``[..., D]`` as torchao has it where it multiplies by such weights."""
    return Float8Tensor.from_hp(x, granularity=PerRow())


def from_parts(qdata: Tensor, scale: Tensor, dtype: torch.dtype) -> Float8Tensor:
    """``qdata [D, H]`` in e4m3 and ``scale [D]``; what multiplies by it gives ``dtype``."""
    return Float8Tensor(qdata, scale.unsqueeze(-1), block_size=[1, qdata.shape[1]], dtype=dtype, **_how())


def _how() -> dict[str, Any]:
    return {"mm_config": Float8MMConfig(use_fast_accum=True), "act_quant_kwargs": QuantizeTensorToFloat8Kwargs()}


def is_fp8(weight: Any) -> bool:
    return isinstance(weight, Float8Tensor)


def why_not_by_rows(weight: Float8Tensor) -> str:
    """Why 2:4 does not take a weight in fp8; empty if it does."""
    how = weight.act_quant_kwargs
    if how is None:
        return "its activation stays in 16 bits"
    dtypes = {weight.qdata.dtype, how.float8_dtype}
    if dtypes != {torch.float8_e4m3fn}:
        return f"it is in {', '.join(sorted(map(str, dtypes)))}"
    if list(weight.block_size) != [1, weight.shape[-1]] or how.granularity != PerRow():
        return f"its scales are of blocks {list(weight.block_size)}, of the activation {how.granularity}"
    if how.hp_value_lb is not None or how.hp_value_ub is not None:
        return "the activation's scale is bounded"
    return ""
