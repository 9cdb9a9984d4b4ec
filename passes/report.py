"""What was found and decided, for people and for programs."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from ao_act24.config import Act24Config
from ao_act24.fp8 import is_fp8

from .find import Site
from .judge import hidden_size
from .vocabulary import known_weight, value


def as_text(table: Any) -> str:
    """A rich renderable as plain text, as wide as the terminal; 140 columns where there is none."""
    from rich.console import Console

    width = max(100, shutil.get_terminal_size((140, 24)).columns)
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


class Act24Warning(UserWarning):
    """Something that a user of ao_act24 asked for does not happen."""


@dataclass(frozen=True)
class Verdict:
    """What happened to one FFN-like site.

    Attributes:
        path: the module that holds the site, as in ``named_modules``; empty where the graph does not say.
        activation: ``relu²``, ``gated relu²``, or what stands in its place.
        rewritten: whether it runs in 2:4, or, where ``few``, by the neurons that fire.
        reason: why it does not; empty if it does.
        x, out: shapes of the FFN's input and output, ``[..., D]``; None where the graph does not say. Sizes that are
            symbolic are given as text.
        hidden_dim: the hidden size H, or None.
        dtype, device: of the hidden activation, or of the weight where the graph does not say; float8_e4m3fn where the
            down projection multiplies in fp8.
        source: the line of code that multiplies by the down projection.
        remark: what else ``explain`` has to say of a site that runs in 2:4.
        few: whether it is rewritten to run exactly, by the neurons that fire alone, and not in 2:4.
    """

    path: str
    activation: str
    rewritten: bool
    reason: str
    x: tuple[int | str, ...] | None
    hidden_dim: int | str | None
    out: tuple[int | str, ...] | None
    dtype: str
    device: str
    source: str
    remark: str = ""
    few: bool = False

    @property
    def name(self) -> str:
        """The path, or where the graph does not say it, as of a model that is an FFN itself, the line of code."""
        return self.path or (self.source if len(self.source) <= 40 else self.source[:39] + "…")

    def within(self, prefix: str, instead_of: str = "") -> "Verdict":
        """The same verdict with ``path`` seen from a module further out, which knows ``instead_of`` as ``prefix``."""
        inside = self.path.removeprefix(instead_of) if f"{self.path}.".startswith(f"{instead_of}.") else self.path
        return replace(self, path=f"{prefix}.{inside.strip('.')}".strip("."))


@dataclass(frozen=True)
class Report:
    """The verdicts on every FFN-like site of a model, in order of execution. Prints as a table.

    Attributes:
        verdicts: one for each site; also what iterating over the report yields.
        notes: what else a reader should know, such as graph breaks.
    """

    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def rewritten(self) -> tuple[Verdict, ...]:
        """The sites that run in 2:4, or by the neurons that fire."""
        return tuple(v for v in self.verdicts if v.rewritten)

    @property
    def dense(self) -> tuple[Verdict, ...]:
        """The sites that stay dense, each with a reason."""
        return tuple(v for v in self.verdicts if not v.rewritten)

    def __len__(self) -> int:
        return len(self.verdicts)

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.verdicts)

    def summary(self) -> str:
        """One line: how many of how many."""
        few = sum(v.few for v in self)
        text = f"{len(self.rewritten) - few} of {len(self)} FFN-like sites run in 2:4"
        return f"{text}, {few} by the neurons that fire" if few else text

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.summary(), title_justify="left")
        for column in ("site", "activation", "x → hidden → out", "dtype", "2:4", "remarks"):
            table.add_column(column, overflow="fold", no_wrap=column == "site")
        for v in self.verdicts:
            shapes = f"{_shape(v.x)} → {'?' if v.hidden_dim is None else v.hidden_dim} → {_shape(v.out)}"
            mark = Text("few", "green") if v.few else Text("yes", "green") if v.rewritten else Text("no", "yellow")
            cells = (v.name, v.activation, shapes, f"{v.dtype} {v.device}".strip())
            table.add_row(*map(Text, cells), mark, Text(v.reason or v.remark))  # Text: brackets are no markup
        return Group(table if self.verdicts else self.summary(), *map(Text, self.notes))

    def __str__(self) -> str:
        return as_text(self)


def describe(site: Site, reason: str, config: Act24Config) -> Verdict:
    """The verdict on ``site``; call it before the site is rewritten, while its nodes are there."""
    h = value(site.relu2.h) if site.relu2 else None
    weight = known_weight(site.down)[0] if site.down else None
    x = value(site.up.input) if site.up else None
    out = value(site.down.node) if site.down else None
    hidden = hidden_size(site)
    if hidden is None and site.up is not None and value(site.up.node) is not None:
        hidden = value(site.up.node).shape[-1]
    like = next((tensor for tensor in (h, out, weight) if tensor is not None), None)
    e4m3 = torch.float8_e4m3fn
    in_fp8 = is_fp8(weight) or getattr(weight, "dtype", None) == e4m3 or (config.dtype == "fp8" and not reason)
    return Verdict(
        path=_module_path(site),
        activation=site.activation,
        rewritten=not reason,
        reason=reason,
        x=_sizes(x),
        hidden_dim=None if hidden is None else _size(hidden),
        out=_sizes(out),
        dtype="" if like is None else str(e4m3 if in_fp8 else like.dtype).removeprefix("torch."),
        device="" if like is None else str(like.device),
        source=_source(site.node),
        few=site.few,
    )


def _size(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)


def _sizes(tensor: Any) -> tuple[int | str, ...] | None:
    return None if tensor is None else tuple(map(_size, tensor.shape))


def _shape(sizes: tuple[int | str, ...] | None) -> str:
    return "?" if sizes is None else "[" + ", ".join(map(str, sizes)) + "]"


def _module_path(site: Site) -> str:
    """The innermost module that both projections belong to."""
    nodes = [linear.node for linear in (site.up, site.down) if linear is not None]
    paths = [_module_paths(node) for node in nodes or [site.node]]
    if len(nodes) == 1:
        paths[0] = paths[0][:-1]  # the linear layer itself
    common = [
        entry for level, entry in enumerate(paths[0]) if all(path[level : level + 1] == [entry] for path in paths)
    ]
    return common[-1] if common else ""


def _module_paths(node: Node) -> list[str]:
    """The paths of the modules around ``node``, outermost first, as ``named_modules`` writes them."""
    if node.op == "call_module":
        parts = str(node.target).split(".")
        return [".".join(parts[:n]) for n in range(len(parts) + 1)]
    return [clean_path(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]


def clean_path(path: str) -> str:
    """``L['model'].layers.0.mlp`` or ``L['self']._modules['layers']._modules['0']`` to ``layers.0.mlp``."""
    path = re.sub(r"^(?:L\['(?:model|self|kwargs)'\]|self\b)", "", path)
    path = re.sub(r"^[LG]\[(['\"])(.*?)\1\]", r"\2", path)
    path = re.sub(r"(?:\._modules)?\[['\"]?(.*?)['\"]?\]", r".\1", path).replace("_modules.", "")
    return re.sub(r"\.?_orig_mod\b", "", path).strip(".")


_CALL = "return model(*args, **kwargs)"  # of ao_act24/capture.py


def _source(node: Node) -> str:
    """The innermost line of code in the node's stack trace; of code that ``sparsify_`` made, the module's class.

    And of code whose lines are not known (made by ``exec``): the trace ends with the line that calls the model.
    """
    trace = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip(" ^~")]
    made_for = re.findall(r'File "<ao_act24 (\w+)', "\n".join(trace))
    if made_for:
        return made_for[-1]
    if trace and not trace[-1].startswith("File ") and trace[-1] != _CALL:
        return trace[-1]
    kinds = [kind for _, kind in node.meta.get("nn_module_stack", {}).values() if kind is not torch.nn.Linear]
    return getattr(kinds[-1], "__name__", str(kinds[-1])) if kinds else node.name
