"""Let the first matmul of a rewritten site pack its own result, so that the hidden activation never goes to memory.

Before::

    h                = linear(x, W1, b1)
    packed, metadata = ao_act24.relu2_sparsify(h)

After::

    packed, metadata = ao_act24.linear_relu2_sparsify(x, W1, b1)

Where there is a kernel for it, and nobody else needs ``h``.
"""

from torch.fx import Graph
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ao_act24 import ops
from ao_act24.when import why_not_fused

from .rewrite import Emitter, parameters
from .vocabulary import Linear, argument, as_linear, is_our_op, same_size, value


def fuse(graph: Graph) -> None:
    """Fuse wherever it is possible, in place. The graph must know shapes, dtypes and devices."""
    for node in [node for node in graph.nodes if is_our_op(node, "relu2_sparsify")]:
        up = as_linear(argument(node, 0, "h"))
        if up is None or set(up.node.users) != {node} or not _fits(up):
            continue
        emit = Emitter(up.node)  # not where the packing stood: x or the weight may have been written into in between
        fused = emit.call(ops.linear_relu2_sparsify.default, up.input, *parameters(emit, up))
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
        graph.erase_node(up.node)


def _fits(up: Linear) -> bool:
    x, h, weight = value(up.input), value(up.node), value(up.weight)
    bias = None if up.bias is None else value(up.bias)
    if x is None or h is None or weight is None or (bias is None) != (up.bias is None):
        return False
    alike = [tensor for tensor in (x, h, weight, bias) if tensor is not None]
    if any(map(is_traceable_wrapper_subclass, alike)):  # a quantised or distributed weight
        return False
    if any(tensor.dtype != h.dtype or tensor.device != h.device for tensor in alike):  # under autocast, for example
        return False
    if weight.ndim != 2 or (bias is not None and not (bias.ndim == 1 and same_size(bias.shape[0], h.shape[-1]))):
        return False
    if not (weight.t() if up.transposed else weight).is_contiguous():  # it would be copied at each call
        return False
    return not why_not_fused(h.device, h.dtype, x.shape[-1], h.shape[-1], h.requires_grad)
