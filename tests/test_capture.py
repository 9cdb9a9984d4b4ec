"""What explain, measure and capture_graphs have in common: the model stays as it was, and places are told apart."""

import threading
import time

import pytest
import torch
import torch.nn.functional as F
from ffn import FFN, D, H, ReLU2, data
from torch import nn

import ao_act24

LOOKS = [ao_act24.explain, ao_act24.measure, ao_act24.capture_graphs]


class Hoarder(FFN):
    """Makes a submodule when first called, and keeps what it computes in containers."""

    def __init__(self):
        super().__init__()
        self.kept, self.by_name, self.seen = [], {}, set()

    def forward(self, x):
        if not hasattr(self, "extra"):
            self.extra = nn.Linear(D, D)
        self.kept.append(x.sum())
        self.by_name["x"] = x
        self.seen.add("x")
        return self.extra(super().forward(x))


@pytest.mark.parametrize("look", LOOKS)
def test_submodules_and_containers_are_put_back(look):
    model = nn.Sequential(Hoarder())
    names, kept = list(model.state_dict()), model[0].kept
    look(model, data(6, grad=False))
    assert list(model.state_dict()) == names and not hasattr(model[0], "extra")
    assert model[0].kept is kept and not kept and not model[0].by_name and not model[0].seen


@pytest.mark.parametrize("look", LOOKS)
def test_scripted_modules_are_left_in_peace(look):
    look(nn.Sequential(torch.jit.script(nn.Linear(D, D)), FFN()), data(6, grad=False))


def test_a_callable_that_has_every_attribute():
    class Anything:
        def __getattr__(self, name):
            return self

        def __call__(self, x):
            return x

    ao_act24.explain(Anything(), data(2, grad=False))


class Disabled(FFN):
    @torch.compiler.disable(recursive=False)
    def forward(self, x):
        return super().forward(x)


class DisabledWithAllInside(FFN):
    forward = torch.compiler.disable(FFN.forward)


class Skipped(FFN):
    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


torch._dynamo.decorators.skip(Skipped.forward)


@pytest.mark.parametrize("kind", [Disabled, DisabledWithAllInside, Skipped])
def test_what_is_hidden_from_dynamo_is_not_claimed(kind):
    model, x = nn.Sequential(kind(), FFN()), data(6, grad=False)
    graphs = []
    torch.compile(model, backend=lambda gm, _: graphs.append(gm) or gm)(x)
    linears = sum("linear" in str(node.target) for gm in graphs for node in gm.graph.nodes)
    report = ao_act24.explain(model, x)
    assert len(report.rewritten) == linears / 2
    assert any(note.endswith("so from this report: 0.") for note in report.notes)


def test_overlapping_calls_put_every_forward_back():
    class Slow(nn.Sequential):
        def forward(self, x):
            torch._dynamo.graph_break()
            time.sleep(0.2)
            return super().forward(x)

    model, x, code = Slow(FFN()), data(6, grad=False), Slow.forward.__code__
    reports = []

    def look(delay):
        time.sleep(delay)
        reports.append(ao_act24.explain(model, x))

    threads = [threading.Thread(target=look, args=(delay,)) for delay in (0.0, 0.1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Slow.forward.__code__ is code and [len(report.rewritten) for report in reports] == [1, 1]


@pytest.mark.parametrize("look", LOOKS)
def test_a_model_may_have_an_argument_called_model(look):
    ffn = FFN()
    look(lambda model: ffn(model), model=data(2, grad=False))


class NormedBlock(nn.Module):
    def __init__(self, norm, ffn):
        super().__init__()
        self.norm, self.ffn = norm, ffn

    def forward(self, x):
        torch._dynamo.graph_break()
        return x + self.ffn(self.norm(x))


def pair(a, b, x):
    torch._dynamo.graph_break()
    return a(x) + b(x)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = FFN(), FFN()

    def forward(self, x):
        return pair(self.left, self.right, x)


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("up", torch.randn(H, D))
        self.register_buffer("down", torch.randn(D, H))

    def forward(self, x):
        torch._dynamo.graph_break()
        return F.linear(F.relu(F.linear(x, self.up)).square(), self.down)


class Unregistered(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = [torch.randn(H, D), torch.randn(D, H)]

    def forward(self, x):
        return F.linear(F.relu(F.linear(x, self.weights[0])).square(), self.weights[1])


class Holder(nn.Module):
    def __init__(me):
        super().__init__()
        me.part = Unregistered()

    def forward(me, x):  # the frame that Dynamo compiles knows the part as me.part
        torch._dynamo.graph_break()
        return me.part(x)


def shared_norm():
    norm = nn.LayerNorm(D)
    return nn.Sequential(NormedBlock(norm, FFN()), NormedBlock(norm, FFN()))


def shared_up():
    ffns = [FFN(), FFN()]
    ffns[1].up = ffns[0].up
    return nn.Sequential(*(NormedBlock(nn.Identity(), ffn) for ffn in ffns))


def compiled_parts():
    return nn.Sequential(*(torch.compile(FFN(), backend="eager") for _ in range(2)))


PLACES = {
    "shared norm": (shared_norm, ["0.ffn", "1.ffn"]),
    "shared up projection": (shared_up, ["0.ffn", "1.ffn"]),
    "helper of two modules": (lambda: nn.Sequential(Pair()), ["0.left", "0.right"]),
    "buffers": (lambda: nn.Sequential(Buffers(), Buffers()), ["0", "1"]),
    "compiled parts": (compiled_parts, ["0", "1"]),
    "two in one Sequential": (
        lambda: nn.Sequential(*(part for _ in range(2) for part in (nn.Linear(D, D), ReLU2())), nn.Linear(D, D)),
        ["", ""],
    ),
    "unregistered weights": (lambda: nn.Sequential(Holder()), [""]),
}


@pytest.mark.parametrize("place", PLACES)
def test_places_are_modules_of_the_model(place):
    make, paths = PLACES[place]
    model, x = make(), data(6, grad=False)
    assert [verdict.path for verdict in ao_act24.explain(model, x)] == paths
    layers = ao_act24.measure(model, x).layers
    assert [layer.tokens for layer in layers] == [6] * len(paths)
    assert all(layer.path == path for layer, path in zip(layers, paths) if path)
