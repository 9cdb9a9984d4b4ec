"""Inductor's generated code calls the kernels themselves, past torch's dispatcher.

By default it calls ``torch.ops.ao_act24.*``, which takes tens of microseconds of host time: the dispatcher, the Python
kernel that ``register_autograd`` adds, the dispatcher again, then ours. A compiled graph needs none of it: shapes,
dtypes and devices were checked when it was traced and are guarded, and AOTAutograd has dealt with gradients. ::

    before   buf1 = torch.ops.ao_act24.relu2_sparsify.default(buf0)
    after    buf1 = ao_act24_cuda.relu2_sparsify(buf0)

All else stays Inductor's fallback for custom operators: dynamic shapes, several outputs, memory, CUDA graph
partitions; and C++ wrappers (AOTInductor among them) call the operator. The generated code imports what it calls, so
that it runs from a cache in a process that has not imported us.

Importing this module registers the lowerings, and imports Inductor: ``ops`` does it when Inductor traces an operator.
Private to torch: ``FallbackKernel``, its ``codegen`` and ``set_python_kernel_name``, and ``wrapper.add_import_once``.
``tests/test_lowering.py`` notices if one of them changes.
"""

from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import V
from torch.utils._pytree import tree_map

from ao_act24 import ops, ops_fp8  # noqa: F401  # the operators, also where only a part of the package was imported
from ao_act24.kernels import cuda

KERNELS = (  # functions of kernels.cuda, each named as its operator
    "relu2_sparsify",
    "linear_relu2_sparsify",
    "sparse_mm",
    "relu2_ffn",
    "active_ffn",
    "grad_hidden",
    "feature_wise",
    "densest",
    "feature_wise_mm",
    "unpack",
    "columns",
    "relu2_sparsify_fp8",
    "linear_relu2_sparsify_fp8",
    "sparse_mm_fp8",
    "active_ffn_fp8",
)
DIRECT = {getattr(torch.ops.ao_act24, name).default: f"ao_act24_cuda.{name}" for name in KERNELS}


class DirectCall(ir.FallbackKernel):
    """A call of an operator; of its kernel, where the calling code is Python and ``kernels.cuda`` has one."""

    def codegen(self, wrapper: Any) -> None:
        first: Any = self.inputs[0]
        op: Any = self.op_overload
        in_python = not (V.graph.cpp_wrapper or V.graph.fx_wrapper)
        direct = in_python and not cuda.why_not(first.get_device(), first.get_dtype())
        if direct:
            wrapper.add_import_once("from ao_act24.kernels import cuda as ao_act24_cuda")
        self.set_python_kernel_name(DIRECT[op] if direct else None)  # None: the operator's
        for output in self.outputs:
            output.skip_size_stride_alignment_checks = direct  # of what a fake promised; half a us each
        super().codegen(wrapper)


def _register(op: torch._ops.OpOverload) -> None:
    # With no layout constraint, other than Inductor's fallback: the operators take any strides.
    @register_lowering(op, type_promotion_kind=None)
    def lower(*args: Any, **kwargs: Any) -> Any:
        return tree_map(ir.TensorBox.create, DirectCall.create(op, *args, **kwargs))


for _op in DIRECT:
    _register(_op)
