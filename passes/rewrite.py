"""Replace a site by the 2:4 operators.

Before::

    h    = linear(x, W1, b1)
    r    = relu(h)
    y    = r * r
    out  = linear(y, W2, b2)

After::

    h                = linear(x, W1, b1)
    packed, metadata = ao_act24.relu2_sparsify(h)
    out              = ao_act24.sparse_mm(packed, metadata, W2, b2)

Few tokens of a weight that has a row for each neuron run exactly instead::

    out              = ao_act24.active_ffn(x, W1, b1, W2, b2)

or, of weights in fp8, ``active_ffn_fp8`` of their data and scales and of ``rows_to_fp8(x)``.

In-between nodes keep their effect: ReLU² is pointwise and the groups lie along the last dimension, so a view or a
cast in front of the square is done to ``h`` instead, and a cast behind it to ``packed``. Casts that only widen the
square's arithmetic and come back to the dtype of ``h`` fall away, since ``relu2_sparsify`` squares in fp32 and rounds
once anyway. A tensor that is cast like ReLU² or ``h`` (``weight.type_as(y)``) is given the dtype by name.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import maybe_get_fake_mode
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from ao_act24 import ops, ops_fp8
from ao_act24.config import Act24Config
from ao_act24.fingerprint import source_digest
from ao_act24.fp8 import is_fp8, rows_to_fp8, to_fp8

from .find import Site
from .relu2 import Relu2, strip
from .vocabulary import Between, Linear, as_between, cast_dtype, is_transpose, known_weight, op_name, takes_dtype, value


def rewrite(site: Site, config: Act24Config) -> None:
    """Rewrite one site in its graph. The nodes that it replaces are erased."""
    assert site.relu2 is not None and site.down is not None and site.up is not None
    down = site.down.node
    for node in (*site.relu2.inside, site.relu2.h, *(step.input for step in strip(site.relu2.h)[0])):
        for user in [user for user in node.users if takes_dtype(user, node)]:
            user.op, user.target, user.args = "call_method", "to", (user.args[0], value(user).dtype)
    emit = Emitter(down)
    weight, bias = parameters(emit, site.down)
    known = known_weight(site.down)[0]
    in_fp8 = is_fp8(known)
    if config.dtype == "fp8" and not in_fp8:
        in_fp8, weight = True, emit.call(to_fp8, weight)
        if not is_fp8(known_weight(site.up)[0]):
            first = parameters(Emitter(site.up.node), site.up)[0]
            site.up.node.replace_input_with(first, Emitter(site.up.node).call(to_fp8, first))
    if site.few:
        up, up_bias = parameters(emit, site.up)
        if in_fp8:
            x, dtype = emit.inlined(rows_to_fp8, site.up.input), value(down).dtype
            operands = *x, *emit.fp8(up), up_bias, *emit.fp8(weight), bias, dtype
            out = emit.instead(ops_fp8.active_ffn_fp8.default, *operands, name=f"active_ffn_fp8_{source_digest()[:8]}")
        else:
            operands = site.up.input, up, up_bias, weight, bias
            out = emit.instead(ops.active_ffn.default, *operands, name=f"active_ffn_{source_digest()[:8]}")
    else:
        h, casts = _hoist(emit, site.relu2)
        out = _in_fp8(emit, h, weight, bias, known.dtype) if in_fp8 else _in_24(emit, h, casts, weight, bias)
    down.replace_all_uses_with(out)
    graph = down.graph
    graph.erase_node(down)
    for node in [node for node in reversed(graph.nodes) if node in site.relu2.inside]:
        graph.erase_node(node)
    widened = site.relu2.h
    while not widened.users and (step := as_between(widened)):  # a cast that _hoist went around
        graph.erase_node(widened)
        widened = step.input
    if site.few and not site.up.node.users:
        graph.erase_node(site.up.node)
    site.rewritten = True
    site.node = out


PACKED = ("packed", "metadata", "row_scale")


def _in_24(emit: "Emitter", h: Node, casts: list[Between], weight: Node, bias: Any) -> Node:
    pair = emit.call(ops.relu2_sparsify.default, h, name="relu2_sparsify")
    packed, metadata = (emit.call(operator.getitem, pair, i, name=name) for i, name in enumerate(PACKED[:2]))
    for cast in casts:
        packed = emit.again(cast, packed)
    name = f"sparse_mm_{source_digest()[:8]}"
    return emit.instead(ops.sparse_mm.default, packed, metadata, weight, bias, name=name)


def _in_fp8(emit: "Emitter", h: Node, weight: Node, bias: Any, dtype: torch.dtype) -> Node:
    """``weight``: torchao's tensor, whose data and scales are read at each call."""
    three = emit.call(ops_fp8.relu2_sparsify_fp8.default, h, name="relu2_sparsify_fp8")
    packed, metadata, row_scale = (emit.call(operator.getitem, three, i, name=name) for i, name in enumerate(PACKED))
    out = value(emit.anchor)
    operands = packed, metadata, row_scale, *emit.fp8(weight), bias, dtype if out is None else out.dtype
    return emit.instead(ops_fp8.sparse_mm_fp8.default, *operands, name=f"sparse_mm_fp8_{source_digest()[:8]}")


class Emitter:
    """Adds nodes in front of an anchor, with the anchor's provenance and, where the inputs have them, fake values."""

    def __init__(self, anchor: Node):
        self.anchor = anchor
        self.graph: Graph = anchor.graph

    def call(self, target: Any, *args: Any, name: str | None = None) -> Node:
        with self.graph.inserting_before(self.anchor):
            return self._annotate(self.graph.create_node("call_function", target, args, name=name))

    def instead(self, target: Any, *args: Any, name: str) -> Node:
        """A node that has the anchor's value, which running it would not give: autocast may be on in the graph here."""
        with self.graph.inserting_before(self.anchor):
            node = self.graph.create_node("call_function", target, args, name=name)
        node.meta.update(self.anchor.meta)
        return node

    def method(self, target: str, *args: Any) -> Node:
        with self.graph.inserting_before(self.anchor):
            return self._annotate(self.graph.create_node("call_method", target, args))

    def fp8(self, weight: Node) -> tuple[Node, Node]:
        """The data and the scales of torchao's tensor."""
        qdata = self.call(getattr, weight, "qdata", name="qdata")
        return qdata, self.method("flatten", self.call(getattr, weight, "scale", name="scale"))

    def inlined(self, function: Callable[..., Any], *args: Node) -> Any:
        """What a function that ``torch.fx`` can trace would return, its operations as nodes."""
        traced = torch.fx.symbolic_trace(function).graph
        made = dict(zip(traced.find_nodes(op="placeholder"), args))
        for node in traced.nodes:
            if node.op == "output":
                return map_arg(node.args[0], made.__getitem__)
            if node.op != "placeholder":
                with self.graph.inserting_before(self.anchor):
                    made[node] = self._annotate(self.graph.node_copy(node, made.__getitem__))
        raise AssertionError("a graph without an output")

    def attribute(self, path: str) -> Node:
        with self.graph.inserting_before(self.anchor):
            return self.graph.get_attr(path)

    def again(self, step: Between, source: Node) -> Node:
        """The in-between ``step``, done to ``source`` instead of its own input."""
        with self.graph.inserting_before(self.anchor):
            node = self.graph.node_copy(step.node, lambda arg: source if arg is step.input else arg)
        if op_name(node) == "reshape":  # source need not have the strides that made a view possible
            node.target = "reshape" if node.op == "call_method" else torch.reshape
        return self._annotate(node)

    def _annotate(self, node: Node) -> Node:
        for key in ("nn_module_stack", "source_fn_stack", "stack_trace"):
            if key in self.anchor.meta:
                node.meta[key] = self.anchor.meta[key]
        inputs = [value(arg) for arg in node.all_input_nodes]
        kind = "val" if "val" in self.anchor.meta else "example_value"
        node.meta.pop(kind, None)
        fake_mode = next(filter(None, map(maybe_get_fake_mode, tree_leaves(inputs))), None)
        if fake_mode is not None and all(v is not None for v in inputs):
            args, kwargs = map_arg((node.args, dict(node.kwargs)), value)
            run = node.target if callable(node.target) else getattr(torch.Tensor, str(node.target))
            with fake_mode, torch.no_grad():  # no graph: saved-tensor hooks around the compilation must not see one
                node.meta[kind] = run(*args, **kwargs)
        return node


def _hoist(emit: Emitter, relu2: Relu2) -> tuple[Node, list[Between]]:
    """Do to ``h`` what was done to the activation. Returns the new ``h`` and the casts that are left for ``packed``."""
    source = narrow_source(relu2)
    steps = relu2.before_square + [step for step in relu2.after_square if step.kind == "view"]
    if source is not None:
        steps = [step for step in steps if step.kind == "view"]
    h = relu2.h if source is None else source
    for step in steps:
        if step.kind != "identity":
            h = emit.again(step, h)
    casts = [] if source is not None else [step for step in relu2.after_square if step.kind == "cast"]
    return h, casts


def narrow_source(relu2: Relu2) -> Node | None:
    """The tensor of which ``h`` and everything up to the consumer is a widened copy, in the consumer's own dtype."""
    casts = [step for step in relu2.before_square + relu2.after_square if step.kind == "cast"]
    if not casts:
        return relu2.h
    last = cast_dtype(casts[-1].node)
    source = relu2.h
    while (step := as_between(source)) and step.kind == "cast":
        source = step.input
    start = value(source)
    if start is None or start.dtype != last:
        return None
    widths = [value(relu2.h).dtype, *(cast_dtype(step.node) for step in casts)]
    return source if all(width and torch.promote_types(width, start.dtype) == width for width in widths) else None


def parameters(emit: Emitter, linear: Linear) -> tuple[Node, Any]:
    """A linear layer's weight as ``[outputs, inputs]``, and its bias."""
    if linear.weight is None:
        path = str(linear.node.target)
        has_bias = emit.graph.owning_module.get_submodule(path).bias is not None  # type: ignore[union-attr]
        return emit.attribute(f"{path}.weight"), emit.attribute(f"{path}.bias") if has_bias else None
    if not linear.transposed:
        return linear.weight, linear.bias
    if is_transpose(linear.weight):
        return linear.weight.args[0], linear.bias  # type: ignore[return-value]
    return emit.method("t", linear.weight), linear.bias
