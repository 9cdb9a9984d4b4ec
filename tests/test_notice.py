"""A compiled model in which nothing was rewritten says so, once, and no other does."""

import dataclasses
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from mlp import MLP, check
from torch import nn

import ao_act24
from ao_act24 import Act24Pass, phases


def test_zero_rewrites_are_said_once():
    gelu, x = torch.compile(MLP(F.gelu), backend="ao_act24"), torch.randn(4, 16)
    with pytest.warns(ao_act24.Act24Warning, match=r"rewrote nothing .* gelu, not relu².*explain"):
        gelu(x)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ao_act24.Act24Warning)
        gelu(x)  # on a warm cache too, and once is enough
        torch.compile(lambda x: x + 1, backend="ao_act24")(x)  # nothing to expect here
        torch.compile(lambda x: F.relu(x).square().mean(), backend="ao_act24")(x)
        torch.compile(MLP(), backend="ao_act24")(x)


def test_zero_rewrites_without_any_ffn():
    """For each model anew, and also after another one was rewritten."""
    torch.compile(MLP(), backend="ao_act24")(torch.randn(4, 16))
    for layers in (2, 3):
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
        with pytest.warns(ao_act24.Act24Warning, match="no linear layers in it form"):
            torch.compile(model, backend="ao_act24")(torch.randn(4, 16))


def test_zero_rewrites_with_the_pass_alone():
    with torch._inductor.config.patch(pre_grad_custom_pass=Act24Pass(), force_disable_caches=True):
        with pytest.warns(ao_act24.Act24Warning, match="gelu, not relu²"):
            torch.compile(MLP(F.gelu))(torch.randn(4, 16))
        with warnings.catch_warnings():
            warnings.simplefilter("error", ao_act24.Act24Warning)
            torch.compile(MLP())(torch.randn(4, 16))


class Attention(nn.Module):
    """Two linear layers and no activation; a graph of its own, since the model around it breaks."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        x = self.outer(self.inner(x).softmax(-1))
        torch._dynamo.graph_break()
        return x


class Breaking(nn.Sequential):
    """Each layer in a graph of its own."""

    def forward(self, x):
        for number in range(len(self)):
            x = self[number](x)
            torch._dynamo.graph_break()
        return x


MODELS_WITH_GRAPH_BREAKS = {  # and what is said of them
    "attention, FFN": (lambda: nn.Sequential(Attention(), MLP()), ""),
    "one graph for two layers, FFN": (lambda: nn.Sequential(*(Attention() for _ in range(3)), MLP()), ""),
    "FFN, GELU": (lambda: Breaking(MLP(), MLP(F.gelu)), ""),
    "GELU, FFN": (lambda: Breaking(MLP(F.gelu), MLP()), ""),
    "attention": (lambda: nn.Sequential(Attention(), nn.Linear(16, 16)), "no linear layers in it form"),
    "sizes": (lambda: Breaking(*(MLP(hidden=hidden) for hidden in (6, 10, 14))), "got 10; .* got 14; .* got 6"),
    "cut off": (lambda: MLP(broken_off), "ReLU² is alone in its graph"),
}


def broken_off(h):
    torch._dynamo.graph_break()
    y = h.relu().square()
    torch._dynamo.graph_break()
    return y


@pytest.mark.parametrize("model", MODELS_WITH_GRAPH_BREAKS)
def test_zero_rewrites_in_a_model_with_graph_breaks(model):
    """A part proves nothing: the warning waits until the model has been run through, and comes once."""
    make, message = MODELS_WITH_GRAPH_BREAKS[model]
    compiled, x = torch.compile(make(), backend="ao_act24"), torch.randn(4, 16)
    said = []
    for _ in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compiled(x)
        said.append([str(w.message) for w in caught if w.category is ao_act24.Act24Warning])
    assert list(map(len, said)) == [0, bool(message), 0]
    assert not message or re.search(message, said[1][0])


@dataclasses.dataclass
class Unhashable:
    mlp: nn.Module

    def run(self, x):
        return self.mlp(x)


class Slots:
    __slots__ = ("mlp",)

    def __init__(self, mlp):
        self.mlp = mlp

    def run(self, x):
        return self.mlp(x)


@pytest.mark.parametrize("owner", [Unhashable, Slots])
def test_methods_of_any_object_compile(owner):
    with pytest.warns(ao_act24.Act24Warning, match="gelu, not relu²"):
        torch.compile(owner(MLP(F.gelu)).run, backend="ao_act24")(torch.randn(4, 16))


def test_ddp_that_splits_graphs_is_named(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        # each matrix is 2 MB and fills a bucket: the graph is cut between the projections
        model = nn.parallel.DistributedDataParallel(MLP(dim=256, hidden=2048), bucket_cap_mb=1)
        x = torch.randn(4, 256)
        with pytest.warns(ao_act24.Act24Warning, match="optimize_ddp = False"):
            compiled = torch.compile(model, backend="ao_act24")
            compiled(x), compiled(x)
        schedule = ao_act24.Schedule()
        with pytest.warns(ao_act24.Act24Warning, match="optimize_ddp = False"):  # from the first dense step on
            compiled = torch.compile(model, backend="ao_act24")
            compiled(x), compiled(x)
        schedule.close()
        report = ao_act24.explain(model, x)
        assert not report.rewritten and any("optimize_ddp" in note for note in report.notes)
        torch._dynamo.reset()
        with torch._dynamo.config.patch(optimize_ddp=False):
            check(torch.compile(model, backend="ao_act24"), model.module, x)
            report = ao_act24.explain(model, x)
            assert report.rewritten and not report.notes
    finally:
        torch.distributed.destroy_process_group()


def test_training_without_a_schedule(monkeypatch):
    """Said once, at the first backward: not of inference under grad mode, nor where there was a schedule."""
    monkeypatch.setattr(phases.PHASE, "scheduled", False)
    run, x = torch.compile(MLP(), backend="ao_act24", fullgraph=True), torch.randn(4, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ao_act24.Act24Warning)
        out = run(x)
        with torch.no_grad():
            run(x)
    with pytest.warns(ao_act24.Act24Warning, match=r"no ao_act24.Schedule. .* dense steps first"):
        out.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ao_act24.Act24Warning)
        run(x).sum().backward()
        phases.PHASE.scheduled = False
        out = run(x)
        ao_act24.Schedule(0).close()
        out.sum().backward()
        run(x).sum().backward()
