"""How operations are spelled in FX graphs, and nothing else: one name for each, whichever way it was written.

Dynamo leaves torch functions, operators and tensor methods in a graph, ``torch.export`` leaves ATen overloads, symbolic
tracing adds module calls. ``op_name`` maps all of them to one name (``F.relu``, ``torch.relu``, ``x.relu()``,
``aten.relu.default`` and ``nn.ReLU`` are ``"relu"``), the ``as_*`` and ``match_*`` functions to what they mean.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Node

_NAMESPACES = (torch, torch.nn.functional, torch._C._nn, torch.Tensor, operator)
_MODULES: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.ReLU: "relu",
    nn.Dropout: "dropout",
    nn.Identity: "alias",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.ReLU6: "relu6",
    nn.Mish: "mish",
    nn.Softplus: "softplus",
    nn.Hardswish: "hardswish",
}
_SYNONYMS = {
    "_threshold": "threshold",
    "clip": "clamp",
    "multiply": "mul",
    "__mul__": "mul",
    "__pow__": "pow",
    "__matmul__": "matmul",
    "__add__": "add",
    "true_divide": "truediv",
    "div": "truediv",
    "divide": "truediv",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "_unsafe_view": "reshape",
    "view": "reshape",
    "view_as": "reshape_as",
    "imul": "mul_",
    "ipow": "pow_",
    "iadd": "add_",
    "isub": "sub_",
    "itruediv": "div_",
    "setitem": "setitem_",
}


def op_name(node: object) -> str:
    """The one name of what ``node`` computes; empty for placeholders, attributes and functions torch does not own."""
    if not isinstance(node, Node):
        return ""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_module":
        module = submodule(node)
        name = "" if "forward" in module.__dict__ else _MODULES.get(type(module), "")
    elif isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.partition("::")[2] if node.target.namespace in ("aten", "prims") else ""
    elif isinstance(node.target, torch._ops.OpOverloadPacket):
        return ""
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        if not any(getattr(space, name, None) is node.target for space in _NAMESPACES):
            return ""
    else:
        return ""
    return _SYNONYMS.get(name, name)


def is_our_op(node: Node, name: str) -> bool:
    """Whether ``node`` calls ``torch.ops.ao_act24.<name>``."""
    return str(node.target) in (f"ao_act24.{name}", f"ao_act24.{name}.default")


def submodule(node: Node) -> nn.Module:
    """The module that a ``call_module`` node calls."""
    root = node.graph.owning_module
    assert root is not None
    return root.get_submodule(str(node.target))


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def value(node: object) -> Any:
    """The fake (or real) value that the graph says ``node`` has; None where the graph does not say."""
    if not isinstance(node, Node):
        return node
    return node.meta.get("example_value", node.meta.get("val"))


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal without adding a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(a == b)


def depends_on_data(size: Any) -> bool:
    """Whether nobody knows a size before the graph runs, such as of ``nonzero``: it cannot be compared."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))


def is_number(x: object, number: float) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and x == number


def is_zero(x: object) -> bool:
    """A number, or a tensor that the graph builds, that is zero everywhere."""
    if is_number(x, 0):
        return True
    if not isinstance(x, Node):
        return False
    name = op_name(x)
    if any(op_name(user) not in ("maximum", "max", "where", "gt", "ge", "lt", "le", "to") for user in x.users):
        return False  # somebody may write into it
    if name in ("zeros", "zeros_like", "new_zeros"):
        return True
    if name in ("tensor", "scalar_tensor", "new_tensor"):
        return is_number(argument(x, 1 if name == "new_tensor" else 0, "data"), 0)
    if name in ("full", "full_like", "new_full"):
        return is_number(argument(x, 1 if name != "new_full" else 2, "fill_value"), 0)
    return name == "to" and is_zero(x.args[0])


def same_form(a: Node, b: Node) -> bool:
    """Whether two tensors have one shape and dtype, as far as the graph says: neither was broadcast or promoted."""
    first, second = value(a), value(b)
    if first is None or second is None:
        return all(op_name(zero) == "zeros_like" for zero in a.all_input_nodes if is_zero(zero))
    return first.dtype == second.dtype and first.ndim == second.ndim and all(map(same_size, first.shape, second.shape))


_INPLACE = {
    "relu": 1,
    "relu6": 1,
    "silu": 1,
    "mish": 1,
    "hardswish": 1,
    "elu": 2,
    "leaky_relu": 2,
    "threshold": 3,
    "dropout": 3,
}


def nodes_between(first: Node, last: Node) -> Iterator[Node]:
    """The nodes of a graph after ``first`` and before ``last``, in order."""
    node = first.next
    while node is not last and node.op != "output":
        yield node
        node = node.next


def mutates(node: Node) -> bool:
    """Whether the node writes into one of its arguments."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if node.op == "call_module":
        return bool(getattr(submodule(node), "inplace", False))
    name = op_name(node)
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or bool(argument(node, _INPLACE.get(name, 99), "inplace")) or "out" in node.kwargs


class Linear(NamedTuple):
    """``input @ weight.T + bias``, with ``transposed`` ``input @ weight + bias``. A module call has no weight node."""

    node: Node
    input: Node
    weight: Node | None
    bias: Any
    transposed: bool


def as_linear(node: object) -> Linear | None:
    """``F.linear``, ``nn.Linear``, or a product with a two-dimensional weight: ``x @ w``, ``mm``, ``addmm``."""
    name = op_name(node)
    if not isinstance(node, Node) or name not in ("linear", "matmul", "mm", "addmm"):
        return None
    if node.op == "call_module":
        return Linear(node, node.args[0], None, None, False) if isinstance(node.args[0], Node) else None
    if name == "linear":
        data, weight = argument(node, 0, "input"), argument(node, 1, "weight")
        bias, transposed = argument(node, 2, "bias"), False
    elif name == "addmm":
        if not is_number(node.kwargs.get("beta", 1), 1) or not is_number(node.kwargs.get("alpha", 1), 1):
            return None
        bias, data, weight = argument(node, 0, "input"), argument(node, 1, "mat1"), argument(node, 2, "mat2")
        transposed = True
        if getattr(value(bias), "ndim", None) != 1:
            return None  # a summand of another shape is no bias
    else:
        data, weight = argument(node, 0, "input"), argument(node, 1, "mat2" if name == "mm" else "other")
        bias, transposed = None, True
    if not isinstance(data, Node) or not isinstance(weight, Node) or "out" in node.kwargs:
        return None
    if not _is_weight(weight) and (transposed or _made_by_linear(weight)):
        return None
    return Linear(node, data, weight, bias, transposed)


def _is_weight(node: Node) -> bool:
    """A matrix that comes from outside the graph, at most cast or transposed: no product of activations."""
    if getattr(value(node), "ndim", 2) != 2:
        return False
    while node.op not in ("placeholder", "get_attr"):
        if not (is_transpose(node) or op_name(node) in _CASTS or op_name(node) in _IDENTITIES):
            return False
        node = node.args[0]  # type: ignore[assignment]
    return True


def _made_by_linear(node: Node) -> bool:
    """Whether a linear layer took part: ``F.linear`` of two activations. A weight that is computed is none of these."""
    return any(op_name(source) == "linear" for source in (node, *ancestors(node)))


def ancestors(node: Node) -> set[Node]:
    """Everything that ``node`` is computed from."""
    found: set[Node] = set()
    queue = [node]
    while queue:
        new = [n for n in queue.pop().all_input_nodes if n not in found]
        found.update(new)
        queue += new
    return found


def known_weight(linear: Linear) -> tuple[Any, bool]:
    """A linear layer's weight as the graph knows it (fake, real, or None), and whether it is ``[inputs, outputs]``."""
    if linear.weight is None:
        return submodule(linear.node).weight, False
    weight, transposed = linear.weight, linear.transposed
    if transposed and is_transpose(weight):
        weight, transposed = weight.args[0], False  # type: ignore[assignment]
    origin = weight_origin(weight)
    return value(origin.node), origin.transposed != transposed


class Origin(NamedTuple):
    """Where a weight comes from: ``node`` is it, or what it is a cast or transposed copy of."""

    node: Node
    transposed: bool
    cast: Node | None  # the last one


def weight_origin(node: Node) -> Origin:
    """As far back as to a value that is known."""
    transposed, cast = False, None
    while value(node) is None and node.args and isinstance(node.args[0], Node):
        if is_transpose(node):
            transposed = not transposed
        elif op_name(node) in _CASTS:
            cast = cast or node
        elif op_name(node) not in _IDENTITIES:
            break
        node = node.args[0]
    return Origin(node, transposed, cast)


def is_transpose(node: Node) -> bool:
    """Whether the node transposes a two-dimensional tensor."""
    name = op_name(node)
    if name in ("t", "adjoint") or (node.target is getattr and node.args[1] in ("T", "mT")):
        return True
    dims = node.args[1:]
    if name == "transpose":
        return sorted(int(d) % 2 for d in dims) == [0, 1]  # type: ignore[arg-type]
    if name == "permute":
        return tuple(int(d) % 2 for d in _permutation(node)) == (1, 0)
    return False


def _permutation(node: Node) -> Sequence[Any]:
    """The dimensions of ``x.permute(a, b)``, ``x.permute((a, b))`` and ``x.permute(dims=(a, b))`` alike."""
    dims = argument(node, 1, "dims")
    return dims if isinstance(dims, (tuple, list)) else node.args[1:]


_CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as", "_to_copy", "convert_element_type"}
_CAST_DTYPES = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
_IDENTITIES = {"contiguous", "clone", "alias"}
_RESHAPES = {"reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze"}


class Between(NamedTuple):
    """A node that may stand between the steps of the pattern, and what it does to the tensor that passes through it."""

    node: Node
    kind: str  # "identity"; "cast": changes the dtype; "view": keeps the last dimension; "dropout": drops something
    input: Node


def as_between(node: Node) -> Between | None:
    """What an in-between node does, or None if it is not one that we know to commute with ReLU² and grouping."""
    name = op_name(node)
    source = argument(node, 0, "input")
    if not name or not isinstance(source, Node):
        if name == "mul" and is_number(source, 1) and isinstance(node.args[1], Node):
            return Between(node, "identity", node.args[1])
        return None
    if mutates(node) and name != "dropout":
        return None
    if name in _IDENTITIES or (name in ("mul", "truediv") and is_number(argument(node, 1, "other"), 1)):
        return Between(node, "identity", source)
    if name == "dropout":
        return Between(node, "dropout" if dropout_rate(node) else "identity", source)
    if name in _CASTS:
        kind = _cast_kind(node, source)
        return Between(node, kind, source) if kind else None
    if name in _RESHAPES or name in ("transpose", "permute"):
        return Between(node, "view", source) if _keeps_last_dim(node, name, source) else None
    return None


def dropout_rate(node: Node) -> float:
    """The rate at which a dropout node drops; zero where it does nothing."""
    if node.op == "call_module":
        module = submodule(node)
        return float(module.p) if module.training else 0.0  # type: ignore[arg-type]
    training = argument(node, 2, "training", argument(node, 2, "train", True))
    rate = argument(node, 1, "p", 0.5)
    if isinstance(training, Node) or isinstance(rate, Node):
        return 1.0  # not known here: it may drop
    return float(rate) if training else 0.0


def _cast_kind(node: Node, source: Node) -> str:
    before, after = value(source), value(node)
    if before is not None and after is not None:
        if before.device != after.device:
            return ""
        return "identity" if before.dtype == after.dtype else "cast"
    return "cast" if cast_dtype(node) is not None else ""


def takes_dtype(node: Node, like: Node) -> bool:
    """Whether all that ``node`` wants of ``like`` is its dtype: ``weight.type_as(like)``, both on one device."""
    if op_name(node) not in ("type_as", "to") or node.args[1:] != (like,) or node.kwargs or node.args[0] is like:
        return False
    return value(node.args[0]) is not None and as_between(node) is not None


def cast_dtype(node: Node) -> torch.dtype | None:
    """The dtype that a cast gives, from the graph's values or, without them, from how the cast is written."""
    known = value(node)
    target = known.dtype if known is not None else None
    target = target or _CAST_DTYPES.get(op_name(node), argument(node, 1, "dtype"))
    return target if isinstance(target, torch.dtype) else None


def _keeps_last_dim(node: Node, name: str, source: Node) -> bool:
    """Whether groups of four along the last dimension stay together."""
    before, after = value(source), value(node)
    if before is not None and after is not None:
        if before.ndim == 0 or after.ndim == 0 or before.dtype != after.dtype:
            return False
        last = before.ndim - 1
        if name == "transpose":
            dims = (argument(node, 1, "dim0"), argument(node, 2, "dim1"))
            return all(d % before.ndim != last for d in dims)
        if name == "permute":
            return bool(_permutation(node)[-1] % before.ndim == last)
        return same_size(before.shape[-1], after.shape[-1])
    # without values: only what cannot touch the last dimension, whatever the number of dimensions
    return name == "flatten" and argument(node, 1, "start_dim", 0) == 0 and argument(node, 2, "end_dim", -1) == -2
