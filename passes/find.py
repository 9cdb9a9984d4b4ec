"""Find every FFN-like site of a graph: Linear → activation → Linear, whatever the activation is.

``find_sites`` only reads. It returns the sites that have the form of the paper, and beside them every near miss with
the reason in words, so that a report can say why a block stayed dense.

    h = linear(x, W1, b1)        any in-between nodes may follow: casts, views, dropout that does nothing
    r = relu(h)                  or clamp, maximum, where, threshold
    y = r * r                    or square, pow, h * relu(h), where(h > 0, h * h, 0)
    out = linear(y, W2, b2)      or x @ W, mm, addmm
"""

import operator
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from .relu2 import Relu2, match_relu2, strip
from .vocabulary import (
    Linear,
    ancestors,
    argument,
    as_between,
    as_linear,
    is_our_op,
    mutates,
    nodes_between,
    op_name,
    submodule,
    takes_dtype,
    value,
)

_ACTIVATIONS = {
    "gelu", "silu", "relu", "leaky_relu", "elu", "celu", "selu", "relu6", "hardtanh", "hardswish", "mish", "softplus",
    "tanh", "sigmoid", "logsigmoid", "prelu", "softsign", "clamp", "clamp_min", "maximum", "threshold", "pow", "square",
}  # fmt: skip
_NORMS = {"layer_norm", "native_layer_norm", "rms_norm", "group_norm", "rsqrt", "linalg_vector_norm", "norm"}


@dataclass
class Site:
    """One FFN-like place. ``reason`` is empty where nothing in the graph's form speaks against rewriting it."""

    activation: str
    node: Node  # the down projection; where there is none, the activation itself
    down: Linear | None = None
    up: Linear | None = None
    relu2: Relu2 | None = None
    reason: str = ""
    rewritten: bool = False
    few: bool = False  # runs, or is to run, exactly, by the neurons that fire alone


def find_sites(graph: Graph) -> list[Site]:
    """All sites of one graph (not of its subgraphs), in order of execution."""
    sites: list[Site] = []
    claimed: set[Node] = set()
    for node in graph.nodes:
        site = _already_rewritten(node)
        if site is None and (down := as_linear(node)):
            site = _relu2_site(down) or _gated_site(down) or _other_site(down)
        if site is not None:
            sites.append(site)
            claimed |= site.relu2.inside if site.relu2 else {site.node}
    for node in graph.nodes:  # ReLU² that reaches no linear layer in a way that we can follow
        if node not in claimed and (relu2 := match_relu2(node)) and not (relu2.inside & claimed):
            claimed |= relu2.inside
            up = _climb_to_linear(relu2.h)
            if isinstance(up, Linear):
                sites.append(Site("relu²", node, up=up, relu2=relu2, reason=_where_it_goes(node)))
            elif (source := strip(relu2.h)[1]).op == "call_module":
                sites.append(Site("relu²", node, relu2=relu2, reason=up))
            elif source.op == "placeholder" and _is_output(_behind(node)) and _is_part(graph):
                reason = (
                    "ReLU² is alone in its graph: graph breaks, or an autograd.Function around it, keep it from its "
                    "linear layers"
                )
                sites.append(Site("relu²", node, relu2=relu2, reason=reason))
    order = {node: position for position, node in enumerate(graph.nodes)}
    return sorted(sites, key=lambda site: order[site.node])


def _is_part(graph: Graph) -> bool:
    """Whether the graph is less than a model: a body, or cut by a graph break. A whole one's lone ReLU² is no FFN's."""
    reason = getattr(graph.owning_module, "compile_subgraph_reason", None)  # only Dynamo's outermost graphs have one
    return reason is None or reason.graph_break


def _already_rewritten(node: Node) -> Site | None:
    ffn = node.args[0] if node.target is operator.getitem and node.args[1] == 0 else None
    if isinstance(ffn, Node) and is_our_op(ffn, "relu2_ffn"):
        first, second = ((argument(ffn, i, ""), argument(ffn, i + 1, "")) for i in (1, 3))  # weights and biases
        up, down = Linear(ffn, argument(ffn, 0, "x"), *first, False), Linear(node, ffn, *second, False)
        return Site("relu²", node, down=down, up=up, rewritten=True)
    if is_our_op(node, "active_ffn"):
        first, second = ((argument(node, i, ""), argument(node, i + 1, "")) for i in (1, 3))
        up, down = Linear(node, argument(node, 0, "x"), *first, False), Linear(node, node, *second, False)
        return Site("relu²", node, down=down, up=up, rewritten=True, few=True)
    if is_our_op(node, "active_ffn_fp8"):
        first, second = ((_tensor_of(argument(node, i, "")), argument(node, i + 2, "")) for i in (2, 5))
        up, down = Linear(node, argument(node, 0, "x"), *first, False), Linear(node, node, *second, False)
        return Site("relu²", node, down=down, up=up, rewritten=True, few=True)
    in_fp8 = is_our_op(node, "sparse_mm_fp8")
    if not in_fp8 and not is_our_op(node, "sparse_mm"):
        return None
    packed = argument(node, 0, "packed")
    while isinstance(packed, Node) and (between := as_between(packed)):
        packed = between.input
    sparsify = packed.args[0] if isinstance(packed, Node) and packed.args else None
    if not isinstance(sparsify, Node):
        return None
    weight, bias = (argument(node, i, "") for i in ((3, 5) if in_fp8 else (2, 3)))
    down = Linear(node, sparsify, _tensor_of(weight), bias, False)
    if is_our_op(sparsify, "linear_relu2_sparsify_fp8"):
        x, weight, bias = (argument(sparsify, i, "") for i in (0, 2, 4))
        return Site("relu²", node, down=down, up=Linear(sparsify, x, _tensor_of(weight), bias, False), rewritten=True)
    if is_our_op(sparsify, "linear_relu2_sparsify"):
        x, weight, bias = (argument(sparsify, i, name) for i, name in enumerate(("x", "weight", "bias")))
        return Site("relu²", node, down=down, up=Linear(sparsify, x, weight, bias, False), rewritten=True)
    if not is_our_op(sparsify, "relu2_sparsify_fp8" if in_fp8 else "relu2_sparsify"):
        return None
    h = argument(sparsify, 0, "h")
    source = _climb_to_linear(h)
    relu2 = Relu2(h, {node, sparsify})
    return Site(
        "relu²", node, down=down, up=source if isinstance(source, Linear) else None, relu2=relu2, rewritten=True
    )


def _tensor_of(data: Node) -> Any:
    """torchao's tensor that ``data`` was read from; itself where Dynamo read it."""
    return data.args[0] if data.target is getattr else data


def _relu2_site(down: Linear) -> Site | None:
    """The site whose down projection is ``down``, if its input is a ReLU²."""
    steps, tail = strip(down.input)
    relu2 = match_relu2(tail)
    if relu2 is None:
        return None
    relu2.after_square = steps
    relu2.inside |= {step.node for step in steps}
    up = _climb_to_linear(relu2.h)
    site = Site("relu²", down.node, down=down, relu2=relu2)
    if isinstance(up, Linear):
        site.up = up
    site.reason = up if isinstance(up, str) else _obstacle(relu2, up, down)
    return site


def _obstacle(relu2: Relu2, up: Linear, down: Linear) -> str:
    """What in the graph speaks against rewriting a block of the right form; empty if nothing."""
    return (
        _given_out(relu2)
        or _second_consumer(relu2, down)
        or _overwritten(relu2, up, down)
        or _grad_mode(relu2, down)
        or _functional_transform(down)
        or _dropout(relu2)
        or _entangled(relu2)
    )


def _gated_site(down: Linear) -> Site | None:
    """``relu²(gate) * up`` in either order, and a ReLU² that a constant or a vector scales or shifts."""
    scaled: list[str] = []
    node = strip(down.input)[1]
    while op_name(node) in ("mul", "add", "sub", "truediv"):
        factors = [arg for arg in node.args[:2] if isinstance(arg, Node) and getattr(value(arg), "ndim", 2) >= 2]
        for factor in factors:
            relu2 = match_relu2(strip(factor)[1])
            if relu2 is None:
                continue
            up = _climb_to_linear(relu2.h)
            site = Site("", down.node, down=down, up=up if isinstance(up, Linear) else None, relu2=relu2)
            if len(factors) == 1:
                steps = ", ".join([op_name(node), *scaled])
                site.activation = "scaled relu²"
                site.reason = (
                    f"the activation is scaled or shifted ({steps}) before the down projection: fold a factor into its "
                    "weight"
                )
            elif any(other in relu2.inside for other in factors if other is not factor):
                site.activation = "relu to the power 3"
                site.reason = "the activation is relu to the power 3, not relu²"
            elif any(ancestors(other) & relu2.inside for other in factors if other is not factor):
                site.activation = "relu²"
                site.reason = _where_it_goes(strip(factor)[1])
            elif op_name(node) == "mul":
                site.activation = "gated relu²"
                site.reason = "gated ReLU², relu²(gate) * up, is not supported yet: it stays dense"
            else:
                continue
            return site
        if len(factors) != 1:
            return None
        scaled.append(op_name(node))
        node = strip(factors[0])[1]
    return None


def _other_site(down: Linear) -> Site | None:
    """A down projection behind another activation, or None if no linear layer feeds it through pointwise steps."""
    _, tail = strip(down.input)
    name, names, up = op_name(tail), [], None
    for candidate in tail.args[:2] if name == "mul" else (tail,):
        if isinstance(candidate, Node):
            found, source = _activation(strip(candidate)[1])
            if found and isinstance(linear := _climb_to_linear(source), Linear):
                names.append(found)
                up = linear
    if up is None:
        return None
    activation = " * ".join(names) if name != "mul" else f"gated {names[0]}"
    reason = f"the activation is {activation}, not relu²"
    if activation in ("relu", "clamp", "clamp_min", "maximum"):
        reason = "the activation is ReLU without the square: it is not the function that 2:4 was shown to leave intact"
    return Site(activation, down.node, down=down, up=up, reason=reason)


def _activation(node: Node) -> tuple[str, Node]:
    """The name of a pointwise activation and its input; an empty name if ``node`` is none."""
    name = op_name(node).rstrip("_")
    source = argument(node, 0, "input") if name in _ACTIVATIONS else None
    if not isinstance(source, Node):
        return "", node
    if name not in ("pow", "square"):
        return name, source
    exponent = 2 if name == "square" else argument(node, 1, "exponent")
    inner, inner_source = _activation(strip(source)[1])
    return (f"{inner} to the power {exponent}", inner_source) if inner else (f"power {exponent}", source)


def _climb_to_linear(node: object) -> Linear | str:
    """The linear layer that ``node`` comes from through in-between nodes and bias additions, or why there is none."""
    while isinstance(node, Node):
        if linear := as_linear(node):
            return linear
        name = op_name(node)
        if between := as_between(node):
            node = between.input
        elif name == "add":
            operands = [arg for arg in node.args[:2] if isinstance(arg, Node)]
            biases = [arg for arg in operands if getattr(value(arg), "ndim", None) == 1]
            if len(operands) != 2 or len(biases) != 1:
                return (
                    "the pre-activation is a sum, not the result of one linear layer: if this is a LoRA adapter, "
                    "merge it into the base weight first"
                )
            node = operands[0] if operands[1] is biases[0] else operands[1]
        elif name == "getitem" and op_name(node.args[0]) in ("chunk", "split"):
            node = node.args[0].args[0]  # type: ignore[union-attr]
        else:
            break
    if isinstance(node, Node) and node.op == "call_module":
        return f"the pre-activation comes from {_no_plain_linear(node)}"
    if isinstance(node, Node) and node.op == "placeholder":
        return (
            "the pre-activation is an input of this graph: a graph break or a checkpoint boundary cuts it off from its "
            "linear layer"
        )
    what = _shown(node) if isinstance(node, Node) else "a constant"
    return f"the pre-activation does not come from a linear layer but from {what}"


def _shown(node: Node) -> str:
    name = op_name(node) or node.name
    return "a product of activations" if name == "linear" else name


def _no_plain_linear(module: Node) -> str:
    """Modules that symbolic tracing calls instead of looking inside: custom layers, adapters, what has hooks."""
    return (
        f"{module.target}, a {type(submodule(module)).__name__} and no plain linear layer: if it holds a LoRA adapter, "
        "merge that into the base weight first"
    )


def _given_out(relu2: Relu2) -> str:
    """The tensor that ``out=`` names is somebody else's, who expects to find the dense result in it."""
    written = [op_name(node) for node in sorted(relu2.inside) if node.kwargs.get("out") is not None]
    return f"{written[0]} writes into the tensor given by out=: leave out= away" if written else ""


def _second_consumer(relu2: Relu2, down: Linear) -> str:
    """Nobody else may see the activation: it no longer exists in dense form after the rewrite."""
    if down.weight in relu2.inside or down.bias in relu2.inside:
        return "the activation is multiplied by itself: the second operand is no weight"
    for node in sorted(relu2.inside):
        for user in node.users:
            if user in relu2.inside or user is down.node or takes_dtype(user, node):
                continue
            if user.op == "output":
                return (
                    f"the activation ({node.name}) is also an output of the graph: a hook, an auxiliary loss or a "
                    "graph break keeps it; remove that use"
                )
            if as_linear(user):
                return (
                    f"the activation ({node.name}) also feeds another linear layer ({user.name}): if this is a LoRA "
                    "adapter, merge it into the base weight first"
                )
            return f"the activation ({node.name}) is also used by {op_name(user) or user.name}: remove that use"
    return ""


def _overwritten(relu2: Relu2, up: Linear, down: Linear) -> str:
    """After the rewrite ``h`` is read just before ``down``, and in-place steps of the pattern do not happen.

    Whether two tensors share memory is not asked: whatever is made from the up projection's result counts.
    """
    made = {up.node}
    for node in nodes_between(up.node, down.node):
        if made & set(node.all_input_nodes):
            made.add(node)
    for node in nodes_between(min(relu2.inside), down.node):
        if node not in relu2.inside and mutates(node) and made & set(node.all_input_nodes):
            return f"the pre-activation may be changed in place by {op_name(node)}: use the out-of-place form"
    if relu2.in_place:
        path = made & (ancestors(relu2.h) | {relu2.h})
        for node in sorted(path):
            for user in node.users:
                if user not in path | relu2.inside:
                    other = op_name(user) or user.name
                    return f"ReLU works in place on a tensor that {other} also sees: use the out-of-place form"
    return ""


def _grad_mode(relu2: Relu2, down: Linear) -> str:
    """The operators stand where ``down`` stood; the activation must not have been in another grad mode."""
    modes = ("_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")
    if any(getattr(node.target, "__name__", "") in modes for node in nodes_between(min(relu2.inside), down.node)):
        return "a change of grad mode (torch.no_grad and the like) stands between ReLU² and the down projection"
    return ""


def _functional_transform(down: Linear) -> str:
    """Custom operators with Python gradients do not take part in torch.func's transforms."""
    if any("increment_nesting" in getattr(node.target, "__name__", "") for node in down.node.graph.nodes):
        return "the graph uses a torch.func transform (grad, jvp, vmap), in which the 2:4 operators cannot take part"
    return ""


def _dropout(relu2: Relu2) -> str:
    active = [step for step in relu2.before_square + relu2.after_square if step.kind == "dropout"]
    if not active:
        return ""
    return (
        f"dropout ({active[0].node.name}) is active between ReLU² and the down projection: set its p to 0, move it "
        "behind the down projection, or compile in eval mode"
    )


def _entangled(relu2: Relu2) -> str:
    """In-between steps are done to another tensor after the rewrite; they must not need the old one for more."""
    for step in relu2.before_square + relu2.after_square:
        if any(other in relu2.inside for other in step.node.all_input_nodes if other is not step.input):
            return f"{step.node.name} takes the activation twice: pass it a size instead of a tensor"
    return ""


def _behind(node: Node) -> Node:
    """The last of the in-between nodes that follow ``node``; itself if there is none, or others see it too."""
    while len(node.users) == 1 and as_between(user := next(iter(node.users))):
        node = user
    return node


def _is_output(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _where_it_goes(node: Node) -> str:
    """Why a ReLU² has no down projection that we recognise."""
    node = _behind(node)
    users = list(node.users)
    if _is_output(node):
        return "the activation is an output of this graph: a graph break or a checkpoint boundary follows it"
    if len(users) == 1 and users[0].op == "call_module":
        return f"the activation goes into {_no_plain_linear(users[0])}"
    seen, queue = set(users), list(users)
    while queue and len(seen) < 20:
        user = queue.pop(0)
        if as_linear(user):
            continue
        if op_name(user) in _NORMS:
            return (
                "a norm stands between ReLU² and the down projection: the zeros survive it, but this is another pattern"
            )
        queue += [u for u in user.users if u not in seen]
        seen |= set(user.users)
    names = ", ".join(map(_shown, users)) or "nothing"
    return f"the activation does not go straight into a linear layer but into {names}"
