"""Graphs as text that a person reads and a test can pin: one line an operation, shapes at the end.

Names are the operations' own, numbered in order; inputs carry the path of the parameter that they are; symbolic sizes
are s0, s1, … in order of appearance. So the text changes from one torch release to the next only if the graph does.
"""

import operator
import re
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils._dtype_abbrs import dtype_abbrs
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .report import clean_path
from .vocabulary import value


def format_graph(module: GraphModule, title: str, known: dict[str, str] | None = None) -> str:
    """``module``'s graph, and every subgraph that it calls, as text.

    Args:
        module: from Dynamo, AOTAutograd or ``torch.export``.
        title: what to call it in the first line.
        known: what to call inputs, by their names in the graph; the names that this graph's results get are added to
            it, so that a backward graph can show what it takes from the forward graph.
    """
    text = "\n\n".join(_format(module, title, {} if known is None else known))
    symbols = dict.fromkeys(re.findall(r"\bs\d+\b", text))
    renamed = {symbol: f"s{number}" for number, symbol in enumerate(symbols)}
    return re.sub(r"\bs\d+\b", lambda match: renamed[match[0]], text)


def _format(module: GraphModule, title: str, known: dict[str, str], inputs: list[str] | None = None) -> list[str]:
    """The texts of a graph and of the subgraphs that it calls; ``inputs`` names its own inputs."""
    names: dict[Node, str] = {}
    subgraphs: list[str] = []
    taken: set[str] = set()

    def name(node: Node, wanted: str) -> str:
        number, free = 1, wanted
        while free in taken:
            free = f"{wanted}_{number}"
            number += 1
        taken.add(free)
        names[node] = known[node.name] = free
        return free

    header: list[str] = []
    lines: list[tuple[str, str]] = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            wanted = inputs[len(header)] if inputs else known.get(node.name, input_name(node))
            header.append(f"    {name(node, wanted)}: {_type(node)}")
        elif node.op == "get_attr":
            name(node, str(node.target))
        elif node.op == "output":
            lines.append((f"    return {_argument(node.args[0], names)}", ""))
        elif node.target is operator.getitem and node in names:
            continue  # already written as one of several results
        else:
            getitems = [user for user in node.users if user.target is operator.getitem]
            if getitems and len(getitems) == len(node.users) and isinstance(value(node), (tuple, list)):
                results = sorted(getitems, key=lambda user: user.args[1])
                fields = _fields(node)
                left = ", ".join(name(part, fields.get(part.args[1], _result_name(part))) for part in results)
                types = ", ".join(_type(result) for result in results)
            else:
                left, types = name(node, _result_name(node)), _type(node)
            region = node.args[0] if node.args else None
            child = getattr(module, str(region.target), None) if isinstance(region, Node) else None
            if isinstance(region, Node) and isinstance(child, GraphModule):
                given = [names[arg] if isinstance(arg, Node) else str(arg) for arg in node.args[1:]]
                matches = len(given) == len(child.graph.find_nodes(op="placeholder"))
                subgraphs += _format(child, str(region.target), {}, given if matches else None)
            lines.append((f"    {left} = {_call(node, names)}", types))
    width = min(100, max((len(line) for line, types in lines if types), default=0))
    body = [f"{line:<{width}}  # {types}" if types else line for line, types in lines]
    return ["\n".join([f"{title}(", *(f"{line}," for line in header), "):", *body]), *subgraphs]


def input_name(node: Node) -> str:
    """What a Dynamo graph's input is, as a path: ``layers.0.mlp.up.weight``."""
    if isinstance(value(node), torch.SymInt):
        return str(value(node))
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return str(node.target)
    path = source.name() if callable(source.name) else source.name
    path = path.replace("._parameters[", "[").replace("._buffers[", "[")
    return re.sub(r"^args\.(\d+)", r"arg\1", clean_path(path))


def _fields(node: Node) -> dict[Any, str]:
    """The names that an operator's schema gives its results."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    return {i: result.name for i, result in enumerate(node.target._schema.returns) if result.name}


def _result_name(node: Node) -> str:
    if node.target is operator.getitem:
        return re.sub(r"(_\d+)+$", "", node.name)
    if node.target is getattr:
        return str(node.args[1])
    return _operation(node).rpartition(".")[2]


def _operation(node: Node) -> str:
    if node.op in ("call_method", "call_module"):
        return str(node.target)
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return ".".join(str(node.target).split(".")[:2])
    return getattr(node.target, "__name__", str(node.target))


def _call(node: Node, names: dict[Node, str]) -> str:
    if node.target is getattr:
        return f"{_argument(node.args[0], names)}.{node.args[1]}"
    arguments = [_argument(arg, names) for arg in node.args]
    arguments += [f"{key}={_argument(arg, names)}" for key, arg in node.kwargs.items()]
    return f"{_operation(node)}({', '.join(arguments)})"


def _argument(argument: Any, names: dict[Node, str]) -> str:
    class Name(str):
        __repr__ = str.__str__

    return repr(map_aggregate(argument, lambda arg: Name(names[arg]) if isinstance(arg, Node) else arg))


def _type(node: Node) -> str:
    result = value(node)
    if isinstance(result, Tensor):
        if is_traceable_wrapper_subclass(result):
            return f"{type(result).__name__}[{', '.join(map(str, result.shape))}]"
        return f"{dtype_abbrs[result.dtype]}[{', '.join(map(str, result.shape))}]"
    return type(result).__name__ if isinstance(result, (torch.SymInt, torch.SymFloat, torch.SymBool)) else ""
