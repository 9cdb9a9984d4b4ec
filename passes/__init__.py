"""FX graph in, FX graph out: find the sites, judge them, rewrite them, report. Knows graphs, knows no kernels.

``vocabulary``  how operations are spelled
``relu2``       ReLU² among them
``find``        every FFN-like site, near misses included
``judge``       which of them may be rewritten
``rewrite``     the surgery
``fuse``        the first matmul with the packing of its result
``report``      what was decided
``show``        graphs as readable text
"""

from collections.abc import Iterator

from torch.fx import Graph, GraphModule

# autograd: without it the operators that a rewrite puts in have no gradients
from ao_act24 import autograd  # noqa: F401
from ao_act24.config import Act24Config

from .find import Site, find_sites
from .fuse import fuse
from .judge import judge
from .report import Act24Warning, Report, Verdict, describe
from .rewrite import rewrite

__all__ = ["Act24Warning", "Report", "Verdict", "examine", "fuse", "graph_modules", "rewrite_graph"]


def rewrite_graph(graph: Graph, config: Act24Config) -> list[Verdict]:
    """Rewrite every site of ``graph`` that can be, in place, and say what became of each."""
    sites = find_sites(graph)
    reasons = [judge(site, config) for site in sites]
    verdicts = [describe(site, reason, config) for site, reason in zip(sites, reasons)]
    for site, reason in reversed(
        list(zip(sites, reasons))
    ):  # the last first: a site's h may be an earlier site's result
        if not reason and not site.rewritten:
            rewrite(site, config)
    return verdicts


def examine(module: GraphModule, config: Act24Config) -> list[tuple[Site, Verdict]]:
    """The sites of a module and of every subgraph that it calls, and what ``rewrite_graph`` would say of them."""
    sites = [site for graph in graph_modules(module) for site in find_sites(graph.graph)]
    return [(site, describe(site, judge(site, config), config)) for site in sites]


def graph_modules(module: GraphModule) -> Iterator[GraphModule]:
    """``module`` and every graph module that its graph refers to: bodies of checkpointed and other nested regions."""
    yield module
    for name in dict.fromkeys(str(node.target) for node in module.graph.nodes if node.op == "get_attr"):
        child = getattr(module, name, None)
        if isinstance(child, GraphModule):
            yield from graph_modules(child)
