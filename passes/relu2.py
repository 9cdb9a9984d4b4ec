"""Recognise ``relu(h)**2`` in any spelling, as it ends at a node of a graph."""

from dataclasses import dataclass, field

from torch.fx import Node

from .vocabulary import Between, argument, as_between, is_number, is_zero, mutates, op_name, same_form


@dataclass
class Relu2:
    """A recognised ``relu(h)**2``: where ``h`` enters it, and every node that it is made of."""

    h: Node
    inside: set[Node]  # relu, square, masks, and the in-between nodes of both kinds
    before_square: list[Between] = field(default_factory=list)  # between relu and square, in order of execution
    after_square: list[Between] = field(default_factory=list)  # between square and the consumer
    in_place: bool = False  # overwrites h


def strip(node: Node) -> tuple[list[Between], Node]:
    """Walk up through in-between nodes. Returns them in order of execution, and the node that they start from."""
    steps: list[Between] = []
    while between := as_between(node):
        steps.insert(0, between)
        node = between.input
    return steps, node


def match_relu2(node: Node) -> Relu2 | None:
    """``relu(h)**2`` in any spelling, ending at ``node``."""
    name = op_name(node)
    if name in ("square", "square_") or (name in ("pow", "pow_") and is_number(argument(node, 1, "exponent"), 2)):
        base = argument(node, 0, "input")
    elif name in ("mul", "mul_"):
        base, other = argument(node, 0, "input"), argument(node, 1, "other")
        if base is not other:
            return _match_h_times_relu(node, base, other)
    elif name == "where":
        return _match_masked_square(node)
    else:
        return None
    if not isinstance(base, Node):
        return None
    steps, tail = strip(base)
    relu = _match_relu(tail)
    if relu is None:
        return None
    relu.inside |= {node, *(step.node for step in steps)}
    relu.before_square = steps
    return relu


def _match_h_times_relu(node: Node, a: object, b: object) -> Relu2 | None:
    """``h * relu(h)``, which differs from ReLU² only at -inf (NaN there, 0 here)."""
    for h, factor in ((a, b), (b, a)):
        if isinstance(factor, Node) and (relu := _match_relu(factor)) and relu.h is h and not relu.in_place:
            relu.inside.add(node)
            relu.in_place = mutates(node) and node.args[0] is h
            return relu
    return None


def _match_masked_square(node: Node) -> Relu2 | None:
    """``where(h > 0, h * h, 0)``, which differs from ReLU² only at NaN (0 there, NaN here)."""
    masked = _masked(node)
    if masked is None:
        return None
    mask, kept, h = masked
    name = op_name(kept)
    squares = name == "square" or (name == "pow" and is_number(argument(kept, 1, "exponent"), 2))
    squares = squares or (name == "mul" and kept.args[0] is kept.args[1])
    if not squares or argument(kept, 0, "input") is not h or not same_form(node, h):
        return None
    return Relu2(h, {node, mask, kept, *_zeros(node)})


def _match_relu(node: Node) -> Relu2 | None:
    """``relu(h)`` in any spelling; the square is the caller's."""
    name = op_name(node)
    h = argument(node, 0, "input") if name else None
    if name in ("relu", "relu_"):
        found = True
    elif name in ("clamp_min", "clamp_min_"):
        found = is_zero(argument(node, 1, "min"))
    elif name in ("clamp", "clamp_"):
        found = is_zero(argument(node, 1, "min")) and argument(node, 2, "max") is None
    elif name in ("threshold", "threshold_"):
        found = is_number(argument(node, 1, "threshold"), 0) and is_number(argument(node, 2, "value"), 0)
    elif name in ("maximum", "max"):
        other = argument(node, 1, "other")
        if is_zero(h):
            h, other = other, h
        found = isinstance(other, Node) and is_zero(other)
    elif name == "where":
        masked = _masked(node)
        if masked is None or masked[1] is not masked[2]:
            return None
        mask, _, h = masked
        return Relu2(h, {node, mask, *_zeros(node)}) if same_form(node, h) else None
    else:
        found = False
    if not found or not isinstance(h, Node) or not same_form(node, h):
        return None
    return Relu2(h, {node, *_zeros(node)}, in_place=mutates(node))


def _masked(node: Node) -> tuple[Node, Node, Node] | None:
    """``where(h > 0, kept, 0)``, also mirrored: the mask, ``kept`` and ``h``."""
    mask, kept, zero = (argument(node, i, name) for i, name in enumerate(("condition", "input", "other")))
    comparison = op_name(mask)
    if comparison not in ("gt", "ge", "lt", "le"):
        return None
    left, right = argument(mask, 0, "input"), argument(mask, 1, "other")
    if is_zero(left):  # 0 < h
        left, right = right, left
        comparison = {"gt": "lt", "ge": "le", "lt": "gt", "le": "ge"}[comparison]
    if comparison in ("lt", "le"):
        kept, zero = zero, kept
    if not is_zero(right) or not is_zero(zero) or not isinstance(left, Node) or not isinstance(kept, Node):
        return None
    return mask, kept, left


def _zeros(node: Node) -> set[Node]:
    """The zero tensors that were built for ``node`` alone."""
    return {arg for arg in node.all_input_nodes if is_zero(arg) and set(arg.users) == {node}}
