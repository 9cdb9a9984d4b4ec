"""Join what the rewrite left as separate operators, where one does more than its parts. A pass after ``rewrite``.

Before::

    h                = linear(x, W1, b1)
    packed, metadata = ao_act24.relu2_sparsify(h)
    out              = ao_act24.sparse_mm(packed, metadata, W2, b2)

In inference, where there is a kernel for it: the hidden activation never goes to memory ::

    packed, metadata = ao_act24.linear_relu2_sparsify(x, W1, b1)
    out              = ao_act24.sparse_mm(packed, metadata, W2, b2)

In training: the gradient by the hidden activation stays packed, from one matmul to the next ::

    out, _, _        = ao_act24.relu2_ffn(x, W1, b1, W2, b2, weight_grads == "sparse")

Only where nobody else needs what is between.
"""

import operator
from typing import Any

from torch.fx import Graph, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ao_act24 import ops
from ao_act24.config import Act24Config
from ao_act24.fingerprint import source_digest
from ao_act24.when import why_not_fused

from .rewrite import Emitter, parameters
from .vocabulary import Linear, argument, as_linear, is_our_op, mutates, nodes_between, op_name, same_size, value


def fuse(graph: Graph, config: Act24Config) -> None:
    """Fuse wherever it is possible, in place. The graph must know shapes, dtypes and devices."""
    for node in [node for node in graph.nodes if is_our_op(node, "relu2_sparsify")]:
        up = as_linear(argument(node, 0, "h"))
        if up is None or set(up.node.users) != {node} or not _plain(up):
            continue
        if value(up.node).requires_grad:
            _fuse_for_training(node, up, config)
        elif _alike(up.node, up.input, up.weight, up.bias) and _has_kernel(up):
            # Not where the packing stood: x or the weight may have been written into in between.
            emit = Emitter(up.node)
            fused = emit.call(ops.linear_relu2_sparsify.default, up.input, *parameters(emit, up))
            node.replace_all_uses_with(fused)
            graph.erase_node(node)
            graph.erase_node(up.node)


def _fuse_for_training(pair: Node, up: Linear, config: Act24Config) -> None:
    items = {argument(item, 1, "b"): item for item in pair.users}
    if set(items) != {0, 1} or any(item.target is not operator.getitem for item in items.values()):
        return
    down = next(iter(items[0].users))
    if set(items[0].users) | set(items[1].users) != {down} or not is_our_op(down, "sparse_mm"):
        return
    weight, bias = argument(down, 2, "weight"), argument(down, 3, "bias")
    if not _alike(down, weight, bias, cast=True) or not _alike(up.node, up.input, up.weight, up.bias, cast=True):
        return
    if value(up.node).dtype != value(down).dtype or not all(map(_harmless, nodes_between(up.node, down))):
        return  # the first matmul would run later, where its operands or autocast may be others
    emit = Emitter(down)

    def cast(node: Any) -> Any:  # as autocast does
        dtype = value(up.node).dtype
        return node if node is None or value(node).dtype == dtype else emit.method("to", node, dtype)

    first = (cast(tensor) for tensor in (up.input, *parameters(emit, up)))
    arguments = (*first, cast(weight), cast(bias), config.weight_grads == "sparse")
    ffn = emit.call(ops.relu2_ffn.default, *arguments, name=f"relu2_ffn_{source_digest()[:8]}")
    out = emit.call(operator.getitem, ffn, 0)
    down.replace_all_uses_with(out)
    for node in (down, items[0], items[1], pair, up.node):
        pair.graph.erase_node(node)


def _harmless(node: Node) -> bool:
    """Whether nothing is written and no mode is changed here, as far as is known."""
    if node.op in ("get_attr", "placeholder") or node.target is operator.getitem or is_our_op(node, "relu2_sparsify"):
        return True
    return bool(op_name(node)) and not mutates(node) and "norm" not in op_name(node)  # batch_norm's running statistics


def _plain(up: Linear) -> bool:
    """Whether the graph knows the first matmul's operands, and they are a matrix and a vector."""
    x, h, weight = value(up.input), value(up.node), value(up.weight)
    bias = None if up.bias is None else value(up.bias)
    if x is None or h is None or weight is None or (bias is None) != (up.bias is None):
        return False
    return weight.ndim == 2 and (bias is None or (bias.ndim == 1 and same_size(bias.shape[0], h.shape[-1])))


def _alike(result: Node, *operands: Any, cast: bool = False) -> bool:
    """Whether operands are plain, on the device of ``result``, and of its dtype or, with ``cast``, to be given it."""
    want = value(result)
    tensors = [value(operand) for operand in operands if operand is not None]
    if any(tensor is None or tensor.device != want.device for tensor in tensors):
        return False
    if any(map(is_traceable_wrapper_subclass, tensors)):  # quantised, distributed
        return False
    return cast or all(tensor.dtype == want.dtype for tensor in tensors)


def _has_kernel(up: Linear) -> bool:
    x, h, weight = value(up.input), value(up.node), value(up.weight)
    if not (weight.t() if up.transposed else weight).is_contiguous():  # it would be copied at each call
        return False
    return not why_not_fused(h.device, h.dtype, x.shape[-1], h.shape[-1])
