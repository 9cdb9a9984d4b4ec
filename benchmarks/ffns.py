"""The FFNs that are timed: plain ones whose biases make as many zeros as asked for, compiled in one way or another."""

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from summary import Row, Shape
from timing import Runs
from torch import Tensor, nn
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

SHIFTS = {
    50: 0.0,
    85: -1.0364,
    90: -1.2816,
    95: -1.6449,
    97: -1.8808,
}  # of a normal distribution, for that share of zeros in percent
# In any mode Inductor tries kernels of its own for matmuls in fp8, 150 s for each, and ends at cuBLAS's: 0.19 ms at
# 8192 x 2048 x 8192, the best of its own being 0.38 (seen). So it is told. What torchao's conversion asks of it, to
# tune each other kernel, stays.
FP8_BY_CUBLAS = torch._inductor.config.patch(max_autotune_gemm_backends="ATEN")


class FFN(nn.Module):
    def __init__(self, model_dim: int, hidden_dim: int, zeros: int):
        super().__init__()
        self.up, self.down = (
            nn.Linear(a, b, device="cuda") for a, b in ((model_dim, hidden_dim), (hidden_dim, model_dim))
        )
        nn.init.normal_(self.up.weight, std=model_dim**-0.5)
        nn.init.normal_(self.down.weight, std=hidden_dim**-0.5)
        nn.init.constant_(self.up.bias, SHIFTS[zeros])
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


def ffn_and_input(shape: Shape, zeros: int, dtype: torch.dtype = torch.bfloat16) -> tuple[FFN, Tensor]:
    torch._dynamo.reset()  # what was compiled of others
    tokens, model_dim, hidden_dim = shape
    return FFN(model_dim, hidden_dim, zeros).to(dtype), torch.randn(tokens, model_dim, device="cuda").to(dtype)


def in_fp8(ffn: FFN) -> FFN:
    """A copy, as torchao converts it, by rows."""
    converted = copy.deepcopy(ffn)
    quantize_(converted, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return converted


def compiled(ffn: FFN, x: Tensor, **variants: dict[str, Any]) -> Runs:
    """The FFN compiled in each way, each with code of its own: Dynamo keeps in one list all that it made of one."""
    runs: Runs = {}
    for name, how in variants.items():
        copied = copy.copy(ffn)  # its parameters are the same
        copied.__class__ = type("FFN", (FFN,), {"forward": with_own_code(FFN.forward)})
        model = torch.compile(copied, fullgraph=True, dynamic=False, **how)
        model(x)
        runs[name] = functools.partial(model, x)
    return runs


def with_own_code(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return types.FunctionType(function.__code__.replace(), function.__globals__)


def placed(timed: dict[str, Row], shape: Shape, zeros: int, dtype: torch.dtype = torch.bfloat16) -> list[Row]:
    at: Row = dict(zip(("tokens", "model_dim", "hidden_dim"), shape))
    at["zeros"] = zeros
    if dtype != torch.bfloat16:
        at["dtype"] = str(dtype).removeprefix("torch.")
    return [{"what": found["what"], **at, **found} for found in timed.values()]
