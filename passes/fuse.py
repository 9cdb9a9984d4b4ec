"""Join what the rewrite left as separate operators, where one does more than its parts. A pass after ``rewrite``.

Before::

    h                = linear(x, W1, b1)
    packed, metadata = ao_act24.relu2_sparsify(h)
    out              = ao_act24.sparse_mm(packed, metadata, W2, b2)

In inference, where there is a kernel for it: the hidden activation never goes to memory ::

    packed, metadata = ao_act24.linear_relu2_sparsify(x, W1, b1)
    out              = ao_act24.sparse_mm(packed, metadata, W2, b2)

In training: the gradient by the hidden activation stays packed, from one matmul to the next ::

    out, _, _        = ao_act24.relu2_ffn(x, W1, b1, W2, b2, weight_grads == "sparse", where that pays)

In fp8, data and scales being read from torchao's weights, and made of ``x`` by ``rows_to_fp8`` ::

    packed, metadata, row_scale = ao_act24.linear_relu2_sparsify_fp8(x_data, x_scale, W1_data, W1_scale, b1, dtype)

Only where nobody else needs what is between. ``why_apart`` says so of a site before it is rewritten: in training the
separate operators are slower than dense on a GPU.
"""

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ao_act24 import ops, ops_fp8
from ao_act24.config import Act24Config
from ao_act24.fingerprint import source_digest
from ao_act24.fp8 import is_fp8, rows_to_fp8, why_not_by_rows
from ao_act24.when import few_tokens_pay, why_exact_grads, why_not_fused

from .find import Site
from .relu2 import Relu2, strip
from .rewrite import Emitter, narrow_source, parameters
from .vocabulary import (
    Linear,
    argument,
    as_linear,
    depends_on_data,
    is_our_op,
    is_transpose,
    known_weight,
    mutates,
    nodes_between,
    op_name,
    same_size,
    takes_dtype,
    value,
)


def fuse(graph: Graph, config: Act24Config) -> None:
    """Fuse wherever it is possible, in place. The graph must know shapes, dtypes and devices."""
    for node in [node for node in graph.nodes if is_our_op(node, "relu2_sparsify")]:
        up = as_linear(argument(node, 0, "h"))
        if up is None or set(up.node.users) != {node} or not _plain(up):
            continue
        if value(up.node).requires_grad:
            _fuse_for_training(node, up, config)
        elif _has_kernel(up):
            # Not where the packing stood: x or the weight may have been written into in between.
            emit = Emitter(up.node)
            first = (_cast(emit, tensor, value(up.node).dtype) for tensor in (up.input, *parameters(emit, up)))
            fused = emit.call(ops.linear_relu2_sparsify.default, *first)
            node.replace_all_uses_with(fused)
            graph.erase_node(node)
            graph.erase_node(up.node)
    for node in [node for node in graph.nodes if is_our_op(node, "relu2_sparsify_fp8")]:
        up = as_linear(argument(node, 0, "h"))
        if up is not None and set(up.node.users) == {node} and _takes_fp8(up):
            _fuse_in_fp8(node, up)


def _fuse_in_fp8(three: Node, up: Linear) -> None:
    """As above. Not where the packing stood, either."""
    assert up.weight is not None
    emit = Emitter(up.node)
    x = emit.inlined(rows_to_fp8, up.input)
    operands = *x, *emit.fp8(up.weight), up.bias, value(up.node).dtype
    fused = emit.call(ops_fp8.linear_relu2_sparsify_fp8.default, *operands)
    three.replace_all_uses_with(fused)
    three.graph.erase_node(three)
    three.graph.erase_node(up.node)


def _takes_fp8(up: Linear) -> bool:
    """Whether the first matmul's weight is in fp8, and there is a kernel for it."""
    x, h, bias, weight = (value(operand) for operand in (up.input, up.node, up.bias, up.weight))
    if not is_fp8(weight) or up.transposed or why_not_by_rows(weight):
        return False
    if x is None or h is None or not _alike(up.node, up.input) or x.dtype != h.dtype:
        return False
    if not weight.qdata.is_contiguous():  # it would be copied at each call
        return False
    if up.bias is not None and not (_alike(up.node, up.bias) and bias.dtype == h.dtype and bias.ndim == 1):
        return False
    return not x.shape[-1] % 16 and not why_not_fused(h.device, h.dtype, x.shape[-1], h.shape[-1])


def _fuse_for_training(pair: Node, up: Linear, config: Act24Config) -> None:
    items = {argument(item, 1, "b"): item for item in pair.users}
    if set(items) != {0, 1} or any(item.target is not operator.getitem for item in items.values()):
        return
    down = next(iter(items[0].users))
    if set(items[0].users) | set(items[1].users) != {down} or not is_our_op(down, "sparse_mm"):
        return
    weight, bias = argument(down, 2, "weight"), argument(down, 3, "bias")
    if _why_apart(up, down, weight, bias, nodes_between(up.node, down)):
        return
    emit, h, rows = Emitter(down), value(up.node), value(weight).shape[0]
    operands = (_cast(emit, tensor, h.dtype) for tensor in (up.input, *parameters(emit, up), weight, bias))
    size = (math.prod(h.shape[:-1]), rows, h.shape[-1])
    sparse = config.weight_grads == "sparse" and not why_exact_grads(h.device, *size, config)
    ffn = emit.call(ops.relu2_ffn.default, *operands, sparse, name=f"relu2_ffn_{source_digest()[:8]}")
    out = emit.call(operator.getitem, ffn, 0)
    down.replace_all_uses_with(out)
    for node in (down, items[0], items[1], pair, up.node):
        pair.graph.erase_node(node)


def _cast(emit: Emitter, node: Any, dtype: torch.dtype) -> Any:
    """As autocast does it."""
    return node if node is None or value(node).dtype == dtype else emit.method("to", node, dtype)


def packs_itself(site: Site) -> bool:
    """Whether the first matmul of a site, before it is rewritten, will pack its own result in inference."""
    assert site.relu2 is not None and site.down is not None
    up = site.up
    if up is None or _why_kept(up, site.relu2) or not _plain(up):
        return False
    return _takes_fp8(up) if is_fp8(known_weight(site.down)[0]) else _has_kernel(up)


def why_apart(site: Site, in_fp8: bool = False) -> str:
    """Why both matmuls of a site, before it is rewritten, will not be one operator; empty if they will.

    ``in_fp8``: both weights are.
    """
    assert site.relu2 is not None and site.down is not None
    up, relu2, down = site.up, site.relu2, site.down
    if up is None:
        return "the up projection is not known"
    if reason := _why_kept(up, relu2):
        return reason
    between = [node for node in nodes_between(up.node, down.node) if node not in relu2.inside]
    return _why_apart(up, down.node, down.weight, down.bias, between, in_fp8)


def runs_active(site: Site) -> bool:
    """Whether a site's few tokens can run exactly by the neurons that fire, of each of which ``down`` has a row."""
    up, down = site.up, site.down
    if up is None or down is None or down.weight is None:
        return False
    first, (second, transposed) = value(up.weight), known_weight(down)
    in_fp8 = is_fp8(first) and is_fp8(second)
    if in_fp8 and (up.transposed or transposed or why_not_by_rows(first) or why_not_by_rows(second)):
        return False
    if why_apart(site, in_fp8):
        return False
    if in_fp8:
        first, second = first.qdata, second.qdata
    by_neurons, by_outputs = second if transposed else second.t(), first.t() if up.transposed else first
    if not by_neurons.is_contiguous() or not by_outputs.is_contiguous():  # it would be copied at each call
        return False
    h, weights = value(up.node), () if in_fp8 else (up.weight, down.weight)
    operands = [value(operand) for operand in (up.input, up.bias, down.bias, *weights)]
    if any(operand is not None and operand.dtype != h.dtype for operand in operands):
        return False
    tokens, (hidden_dim, out_dim) = math.prod(h.shape[:-1]), by_neurons.shape
    size = value(up.input).shape[-1], hidden_dim, out_dim
    return not depends_on_data(tokens) and few_tokens_pay(h.device, h.dtype, tokens, *size, in_fp8)


def _why_kept(up: Linear, relu2: Relu2) -> str:
    """Why the result of the first matmul is needed for more than ReLU², or not as it is."""
    source = narrow_source(relu2)
    if (relu2.h if source is None else source) is not up.node:
        return "something stands between the up projection and ReLU²"
    fall_away = ("identity",) if source is None else ("identity", "cast")
    if steps := [step for step in relu2.before_square + relu2.after_square if step.kind not in fall_away]:
        return f"{steps[0].node.name} stands between ReLU² and the down projection"
    widened = {step.node for step in strip(relu2.h)[0]}
    for node in (up.node, *widened):
        if any(user not in relu2.inside | widened and not takes_dtype(user, node) for user in node.users):
            return "the pre-activation is also used elsewhere"
    return ""


def _why_apart(up: Linear, down: Node, weight: Any, bias: Any, between: Iterable[Node], in_fp8: bool = False) -> str:
    if not _plain(up):
        return "the up projection's operands are not known from the graph"
    weights = () if in_fp8 else (up.weight, weight)
    if not _alike(down, bias) or not _alike(up.node, up.input, up.bias, *weights):
        return "an operand of the two projections is on another device, or no plain tensor"
    if value(up.node).dtype != value(down).dtype:
        return f"the two projections run in {value(up.node).dtype} and {value(down).dtype}"
    for node in between:  # the first matmul would run later, where its operands or autocast may be others
        if not _harmless(node):
            return f"{op_name(node) or node.name} stands between the two projections"
    return ""


def _harmless(node: Node) -> bool:
    """Whether nothing is written and no mode is changed here, as far as is known."""
    if node.op in ("get_attr", "placeholder") or node.target is operator.getitem or is_transpose(node):
        return True
    if str(node.target).startswith("ao_act24."):  # another FFN, which the rewrite came to first
        return True
    if "batch_norm" in op_name(node) or "instance_norm" in op_name(node):  # running statistics
        return False
    return bool(op_name(node)) and not mutates(node)


def _plain(up: Linear) -> bool:
    """Whether the graph knows the first matmul's operands, and they are a matrix and a vector."""
    x, h, weight = value(up.input), value(up.node), value(up.weight)
    bias = None if up.bias is None else value(up.bias)
    if x is None or h is None or weight is None or (bias is None) != (up.bias is None):
        return False
    return weight.ndim == 2 and (bias is None or (bias.ndim == 1 and same_size(bias.shape[0], h.shape[-1])))


def _alike(result: Node, *operands: Any) -> bool:
    """Whether operands are plain and on the device of ``result``. They may be given its dtype."""
    tensors = [value(operand) for operand in operands if operand is not None]
    if any(tensor is None or tensor.device != value(result).device for tensor in tensors):
        return False
    return not any(map(is_traceable_wrapper_subclass, tensors))  # quantised, distributed


def _has_kernel(up: Linear) -> bool:
    if not _alike(up.node, up.input, up.weight, up.bias):
        return False
    x, h, weight = value(up.input), value(up.node), value(up.weight)
    if not (weight.t() if up.transposed else weight).is_contiguous():  # it would be copied at each call
        return False
    return not why_not_fused(h.device, h.dtype, x.shape[-1], h.shape[-1])
