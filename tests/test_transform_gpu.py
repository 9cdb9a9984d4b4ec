"""``sparsify_`` where its modules run on a GPU: a stand-in says so of inputs and weights that lie on the CPU."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from mlp import MLP, check
from torch import nn

from ao_act24 import Act24Config, Act24Warning, sparsify_, transform, when
from ao_act24.kernels import cuda, schedule

LEAST = 16  # tokens


class OnGpu:
    def __init__(self, x):
        self.device, self.ndim, self.shape = torch.device("cuda", 0), x.ndim, x.shape
        self.requires_grad, self.numel, self.dtype, self.is_cuda = x.requires_grad, x.numel, x.dtype, True


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(cuda, "_why_not_gpu", lambda index: "")
    monkeypatch.setattr(when, "_why_not_measured", lambda device: "")
    monkeypatch.setattr(when, "MIN_HIDDEN_DIM", 128)
    for module in (transform, when):
        monkeypatch.setattr(module, "MIN_DIM", 64)
    monkeypatch.setattr(transform, "least_tokens", lambda *size, packs: LEAST)

    def as_on_a_gpu(check):
        return lambda module, generated, inputs: check(module, generated, [OnGpu(x) for x in inputs])

    for name in ("_changed", "_stays_dense"):
        monkeypatch.setattr(transform, name, as_on_a_gpu(getattr(transform, name)))


def mlp(**trainable):
    """In bf16; only the named parts are trainable, all of them if none is named."""
    model = MLP(dim=64, hidden=128).bfloat16()
    for name, part in model.named_children():
        part.requires_grad_(not trainable or trainable.get(name, False))
    return model


def data(tokens=LEAST, grad=False):
    return torch.randn(tokens, 64, dtype=torch.bfloat16, requires_grad=grad)


def runs_sparse(model, x):
    with torch.profiler.profile() as profile:
        model(x)
    return "ao_act24::sparse_mm" in {event.key for event in profile.key_averages()}


def warned(model, x):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert runs_sparse(model, x) == (not torch.is_grad_enabled())
    return [str(warning.message) for warning in caught if issubclass(warning.category, Act24Warning)]


MESSAGE = f"{transform._COMPILED_ONLY}: MLP runs dense"


def test_training_that_stays_dense_is_said_once():
    model = nn.Sequential(mlp(), mlp())
    sparsify_(model)
    with torch.no_grad():
        assert warned(model, data()) == []
    assert warned(model, data()) == [MESSAGE]
    assert warned(model, data()) == []


def test_what_is_dense_for_want_of_tokens_is_not_said():
    model = mlp()
    sparsify_(model)
    assert warned(model, data(LEAST - 1)) == []
    assert warned(model, data()) == [MESSAGE]


@pytest.mark.parametrize("part", ["up", "down"])
def test_any_weight_that_is_trained_counts(part):
    model = mlp(**{part: True})
    sparsify_(model)
    assert warned(model, data()) == [MESSAGE]


class Cast(MLP):
    """With weights in fp32, each cast where it is used."""

    def __init__(self, cast):
        super().__init__(dim=64, hidden=128)
        self.cast = cast

    def forward(self, x):
        h = F.linear(x, self.cast(self.up.weight, x))
        return F.linear(h.relu().square(), self.cast(self.down.weight, x))


CASTS = [lambda w, x: w.to(x.dtype), lambda w, x: w.type_as(x), lambda w, x: w.bfloat16(), lambda w, x: w.t().to(x).t()]


@pytest.mark.parametrize("cast", CASTS)
def test_weights_that_are_cast(cast):
    model = Cast(cast)
    sparsify_(model)
    with torch.no_grad():
        assert runs_sparse(model, data())
        assert not runs_sparse(model, data(LEAST - 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not runs_sparse(model, data())
    assert [str(warning.message) for warning in caught] == [MESSAGE.replace("MLP", "Cast")]


def test_an_input_that_is_trained_counts():
    model = mlp(none=True)
    sparsify_(model)
    assert runs_sparse(model, data())
    assert warned(model, data(grad=True)) == [MESSAGE]


class Scaled(MLP):
    def __init__(self):
        super().__init__(dim=64, hidden=128)
        self.before, self.after = (nn.Parameter(torch.ones(64)) for _ in range(2))

    def forward(self, x):
        return super().forward(x * self.before) * self.after


@pytest.mark.parametrize("name, trains", [("before", True), ("after", False)])
def test_parameters_of_the_module_itself(name, trains):
    """Training what comes behind an FFN does not train it."""
    model = Scaled().bfloat16().requires_grad_(False)
    sparsify_(model)
    assert runs_sparse(model, data())
    getattr(model, name).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Act24Warning)
        assert runs_sparse(model, data()) == (not trains)


def test_a_part_that_was_replaced():
    model = mlp(none=True)
    sparsify_(model)
    model.up = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 128)).bfloat16()
    assert warned(model, data()) == [MESSAGE]
    model.up.requires_grad_(False)
    model.down = nn.Linear(128, 64, bias=False).bfloat16().requires_grad_(False)
    assert runs_sparse(model, data())


def test_emulated_training_is_in_24():
    model = mlp()
    sparsify_(model, Act24Config(emulate=True))
    assert runs_sparse(model, data())


def counts_of_sparse_mm(model, *inputs):
    """Of each graph that Dynamo makes of calls with a dynamic number of tokens."""
    counts = []

    def backend(gm, example_inputs):
        counts.append(sum(str(node.target) == "ao_act24.sparse_mm.default" for node in gm.graph.nodes))
        return gm.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for x in inputs:
        compiled(x)
    return counts


@pytest.mark.parametrize("part", ["up", "down"])
def test_compiled_training_is_one_dense_graph_and_says_nothing(part):
    """For any number of tokens: another backend has no use for a guard, and ours asks by its own rule."""
    model = mlp(**{part: True})
    sparsify_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Act24Warning)
        assert counts_of_sparse_mm(model, *map(data, (LEAST, 4 * LEAST, LEAST // 2))) == [0]


def test_compiled_inference_asks_for_one_bound_that_was_found_before(monkeypatch):
    """Dynamo would trace the search for it, at each compilation."""
    model = mlp()
    sparsify_(model)

    def traced(*args):
        raise AssertionError("the rule's search is traced")

    for module, name in ((transform, "least_tokens"), (when, "least_tokens"), (when, "waste"), (schedule, "waste")):
        monkeypatch.setattr(module, name, traced)
    with torch.no_grad():
        assert counts_of_sparse_mm(model, *map(data, (LEAST, 4 * LEAST, LEAST // 2, LEAST - 1, 999))) == [1, 0]


def test_trained_by_our_backend_though_dense_by_itself():
    model = MLP(dim=64, hidden=128)
    sparsify_(model)
    check(torch.compile(model, backend="ao_act24", fullgraph=True), model, torch.randn(LEAST, 64))
