"""Which first matmuls pack their own result: a stand-in says that there is a kernel, on a CPU."""

import pytest
import torch
import torch.nn.functional as F
from oracle import relative_error, relu2_24
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao_fp8 import needs_scaled_mm

from ao_act24 import Act24Config, ops_fp8
from ao_act24.fp8 import rows_to_fp8, to_fp8
from ao_act24.passes import examine, fuse, rewrite_graph
from ao_act24.passes.find import find_sites
from ao_act24.passes.fuse import packs_itself, why_apart
from ao_act24.passes.vocabulary import is_our_op, value

X, W1, B1, W2 = torch.randn(2, 6, 16), torch.randn(64, 16), torch.randn(64), torch.randn(16, 64)
UNFUSED, FUSED = ["linear", "relu2_sparsify", "sparse_mm"], ["linear_relu2_sparsify", "sparse_mm"]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr("ao_act24.when.cuda.why_not", lambda device, dtype: "")


def run(function, *inputs):
    """The output of the rewritten and fused function, and the names of its matmuls and of our operators."""
    seen = []

    def backend(gm, example_inputs):
        sites = [site for site in find_sites(gm.graph) if not site.rewritten]
        trains = [value(site.relu2.h).requires_grad for site in sites]
        said = [why_apart(site) == "" if grad else packs_itself(site) for site, grad in zip(sites, trains)]
        rewrite_graph(gm.graph, Act24Config())
        fuse(gm.graph, Act24Config())
        gm.graph.lint()
        gm.recompile()
        names = [getattr(node.target, "__name__", str(node.target)) for node in gm.graph.nodes]
        seen.extend(name.split(".")[0].removeprefix("ao_act24::") for name in names)
        after = examine(gm, Act24Config())
        assert all(verdict.rewritten for _, verdict in after) and len(after) >= len(sites)
        ours = [site for site, _ in after][-len(sites) :]
        joined = [
            site.up is not None and is_our_op(site.up.node, "relu2_ffn" if grad else "linear_relu2_sparsify")
            for site, grad in zip(ours, trains)
        ]
        assert joined == said, "before it is rewritten"
        return gm.forward

    torch._dynamo.reset()
    out = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return out, [name for name in seen if name in ("linear", "matmul", "addmm", "relu2_ffn", *FUSED, *UNFUSED)]


def ffn(first, second=lambda y: F.linear(y, W2)):
    return lambda x: second(F.relu(first(x)).square())


def want(bias=None):
    return F.linear(relu2_24(F.linear(X, W1, bias)), W2)


@pytest.mark.parametrize(
    "first, bias",
    [
        (lambda x: F.linear(x, W1), None),
        (lambda x: F.linear(x, W1, B1), B1),
        (lambda x: x @ W1.t(), None),
        (lambda x: torch.matmul(x, W1.t()), None),
    ],
)
def test_fused(first, bias):
    with torch.no_grad():
        out, names = run(ffn(first), X)
    assert names == FUSED and relative_error(out, want(bias)) < 1e-5


def test_dynamic():
    with torch.no_grad():
        x = X.clone()
        torch._dynamo.mark_dynamic(x, 1)
        out, names = run(ffn(lambda x: F.linear(x, W1, B1)), x)
    assert names == FUSED and relative_error(out, want(B1)) < 1e-5


@pytest.mark.parametrize(
    "first, bias",
    [(lambda x: F.linear(x, W1, B1), B1), (lambda x: x @ W1.t(), None), (lambda x: torch.matmul(x, W1.t()), None)],
)
def test_training(first, bias):
    x = X.clone().requires_grad_()
    out, names = run(ffn(first), x)
    assert names == ["relu2_ffn"] and relative_error(out, want(bias)) < 1e-5
    (got,) = torch.autograd.grad(out.square().sum(), x)
    (grad,) = torch.autograd.grad(F.linear(relu2_24(F.linear(x, W1, bias)), W2).square().sum(), x)
    assert relative_error(got, grad) < 1e-5


def test_training_under_autocast():
    """fp32 weights are cast as autocast does it, and get fp32 gradients."""
    up, down = nn.Linear(16, 64), nn.Linear(64, 16)

    with torch.autocast("cpu", torch.bfloat16):
        out, names = run(ffn(up, down), X)
    assert names == ["relu2_ffn"] and out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    got = [parameter.grad for parameter in (up.weight, up.bias, down.weight, down.bias)]
    assert all(grad.dtype == torch.float32 for grad in got)
    exact = [parameter.detach().double().requires_grad_() for parameter in (up.weight, up.bias, down.weight, down.bias)]
    loss = F.linear(relu2_24(F.linear(X.double(), *exact[:2])), *exact[2:]).square().sum()
    assert all(relative_error(g, w) < 0.05 for g, w in zip(got, torch.autograd.grad(loss, exact)))


def in_fp8(weight):
    return nn.Parameter(to_fp8(weight.bfloat16()), requires_grad=False)


@needs_scaled_mm
@pytest.mark.parametrize("bias", [None, B1.bfloat16()], ids=["no bias", "bias"])
def test_fp8(bias):
    up, down, x = in_fp8(W1), in_fp8(W2), X.bfloat16()
    seen = []

    def backend(gm, example_inputs):
        for fused in (False, True):
            if fused:
                fuse(gm.graph, Act24Config())
            else:
                rewrite_graph(gm.graph, Act24Config())
            gm.graph.lint()
            gm.recompile()
            ((site, verdict),) = examine(gm, Act24Config())
            assert verdict.rewritten and verdict.hidden_dim == 64 and verdict.x == (2, 6, 16)
            seen.append((is_our_op(site.up.node, "linear_relu2_sparsify_fp8"), gm.forward(*example_inputs)[0]))
        return gm.forward

    with torch.no_grad():
        torch.compile(lambda x: F.linear(F.relu(F.linear(x, up, bias)).square(), down), backend=backend)(x)
    (first, apart), (second, joined) = seen
    assert (first, second) == (False, True)
    packed = ops_fp8.linear_relu2_sparsify_fp8(*rows_to_fp8(x), up.qdata, up.scale.flatten(), bias, x.dtype)
    assert torch.equal(joined, ops_fp8.sparse_mm_fp8(*packed, down.qdata, down.scale.flatten(), None, x.dtype))
    assert relative_error(joined, apart) < 0.1, "torchao rounds x otherwise"


@needs_scaled_mm
@pytest.mark.parametrize(
    "change",
    [
        {"bias": B1},
        {"up": W1.bfloat16()},
        {"dim": 24},
        {"again": True},
    ],
    ids=["a bias added in fp32", "a weight in bf16", "D not divisible by 16", "h is used elsewhere"],
)
def test_fp8_that_is_not_fused(change):
    dim = change.get("dim", 16)
    up, down = (in_fp8(torch.randn(*size)) for size in ((64, dim), (dim, 64)))
    up, x, bias = change.get("up", up), torch.randn(6, dim).bfloat16(), change.get("bias")
    names = []

    def backend(gm, example_inputs):
        rewrite_graph(gm.graph, Act24Config())
        fuse(gm.graph, Act24Config())
        names.extend(str(node.target) for node in gm.graph.nodes)
        return gm.forward

    def function(x):
        h = F.linear(x, up)
        h = h if bias is None else (h + bias).bfloat16()
        out = F.linear(F.relu(h).square(), down)
        return (out, h) if change.get("again") else out

    with torch.no_grad():
        torch.compile(function, backend=backend)(x)
    assert not any("linear_relu2_sparsify_fp8" in name for name in names)


def in_training(between):
    def function(x):
        weight = W1.clone()
        h = F.linear(x, weight)
        other = between(h, x, weight)
        return F.linear(F.relu(h).square(), W2), other

    return run(function, X.clone().requires_grad_())[1]


@torch.library.custom_op("ao_act24_tests::bump", mutates_args=("weight",))
def bump(weight: torch.Tensor) -> None:
    weight.add_(1)


bump.register_fake(lambda weight: None)


def test_training_beside_what_changes_operands_or_modes():
    assert in_training(lambda h, x, weight: torch.ops.ao_act24_tests.bump(weight)) == UNFUSED
    norm = lambda h, x, weight: F.batch_norm(x[0], weight[0].detach()[:16], torch.ones(16), training=True)  # noqa: E731
    assert in_training(norm) == UNFUSED

    def regions(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            h = F.linear(x, W1)
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(F.relu(h).square(), W2)

    assert "relu2_ffn" not in run(regions, X.clone().requires_grad_())[1]


def test_training_with_other_uses():
    assert in_training(lambda h, x, weight: h) == UNFUSED
    assert in_training(lambda h, x, weight: weight.add_(1)) == UNFUSED, "weight is another one at the second matmul"
    assert in_training(lambda h, x, weight: x + 1) == ["relu2_ffn"]


W1B, W2B = torch.randn(64, 16), torch.randn(16, 64)
W2T = W2.t().contiguous()


def relu2(h):
    return F.relu(h).square()


def interleaved(activation=relu2, down=lambda y: F.linear(y, W2)):
    def function(x):
        h, other = F.linear(x, W1), F.linear(x, W1B)
        y, other = activation(h), relu2(other)
        return down(y) + F.linear(other, W2B)

    return function


def nested(x):
    h = F.linear(x, W1)
    inner = F.linear(relu2(F.linear(x, W1B)), W2B)
    return F.linear(relu2(h), W2) + inner


def beside(other):
    def function(x):
        h = F.linear(x, W1)
        aside = other(x)
        return F.linear(relu2(h), W2) + aside

    return function


def after(first):
    return lambda x: F.linear(first(F.linear(x.bfloat16(), W1.bfloat16())), W2.bfloat16())


def seen_wide(x):
    wide = F.linear(x, W1.bfloat16()).float()
    return F.linear(F.relu(wide).square().bfloat16(), W2.bfloat16()) + wide.sum()


def weight_by_wide(x):
    wide = F.linear(x, W1.bfloat16()).float()
    return F.linear(F.relu(wide).square().type_as(x), W2.double().type_as(wide).bfloat16())


GRAPHS = {  # and how many of its FFNs become one operator
    "alone": (ffn(lambda x: F.linear(x, W1)), 1),
    "one token": (lambda x: ffn(lambda x: F.linear(x, W1))(x[0, 0]), 1),
    "@ .t()": (ffn(lambda x: x @ W1.t(), lambda y: y @ W2.t()), 1),
    "@ .T": (ffn(lambda x: x @ W1.T, lambda y: y @ W2.T), 1),
    "@ .mT": (ffn(lambda x: x @ W1.mT, lambda y: y @ W2.mT), 1),
    "@ stored": (ffn(lambda x: x @ W1.T, lambda y: y @ W2T), 1),
    "in turn": (lambda x: ffn(lambda x: F.linear(x, W1B))(ffn(lambda x: F.linear(x, W1))(x)), 2),
    "interleaved": (interleaved(), 2),
    "interleaved, stored": (interleaved(down=lambda y: y @ W2T), 2),
    "interleaved, .T": (interleaved(down=lambda y: y @ W2.T), 2),
    "interleaved, one apart": (interleaved(lambda h: F.relu(h.view(12, 64)).square().view(2, 6, 64)), 1),
    "nested": (nested, 2),
    "wide square": (after(lambda h: F.relu(h).float().square().bfloat16()), 1),
    "wide square, .to(h)": (after(lambda h: F.relu(h).float().square().to(h)), 1),
    "wide relu": (after(lambda h: F.relu(h.float()).square().bfloat16()), 1),
    "wide relu, twice": (after(lambda h: F.relu(h.float().double()).square().bfloat16()), 1),
    "weight.type_as(y)": (ffn(lambda x: F.linear(x, W1), lambda y: F.linear(y, W2.double().type_as(y))), 1),
    "weight.to(h)": (lambda x: F.linear(relu2(h := F.linear(x, W1)), W2.double().to(h)), 1),
    "weight.type_as(wide h)": (lambda x: weight_by_wide(x.bfloat16()), 1),
    "wide relu, seen": (lambda x: seen_wide(x.bfloat16()), 0),
    "narrow square": (ffn(lambda x: F.linear(x, W1), lambda y: F.linear(y.bfloat16(), W2.bfloat16())), 0),
    "contiguous": (ffn(lambda x: F.linear(x, W1).contiguous()), 0),
    "bias added": (ffn(lambda x: F.linear(x, W1) + B1), 0),
    "layer_norm beside": (beside(lambda x: F.layer_norm(x, (16,))), 1),
    "rms_norm beside": (beside(lambda x: F.rms_norm(x, (16,))), 1),
    "norm beside": (beside(lambda x: x / x.norm(dim=-1, keepdim=True)), 1),
    "batch_norm beside": (beside(lambda x: F.batch_norm(x.mT, torch.zeros(16), torch.ones(16), training=True).mT), 0),
    "instance_norm beside": (beside(lambda x: F.instance_norm(x.mT, torch.zeros(16), torch.ones(16)).mT), 0),
}


@pytest.mark.parametrize("graph", GRAPHS)
def test_training_as_foretold(graph):
    """``run`` compares what ``why_apart`` says of each FFN with what becomes of it."""
    function, joined = GRAPHS[graph]
    assert run(function, X.clone().requires_grad_())[1].count("relu2_ffn") == joined


def test_h_that_is_returned():
    def both(x):
        h = F.linear(x, W1)
        return F.linear(F.relu(h).square(), W2), h

    with torch.no_grad():
        assert run(both, X)[1] == UNFUSED


def test_another_step_in_between():
    with torch.no_grad():
        out, names = run(ffn(lambda x: F.linear(x, W1).view(12, 64)), X)
    assert names == UNFUSED and relative_error(out, want().view(12, 16)) < 1e-5


def test_autocast():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, names = run(ffn(lambda x: F.linear(x, W1, B1)), X)
        assert names == FUSED and out.dtype == torch.bfloat16 and relative_error(out, want(B1)) < 0.01


def test_a_weight_that_lies_the_other_way():
    weight = W1.t().contiguous()
    with torch.no_grad():
        assert run(ffn(lambda x: x @ weight), X)[1] == ["matmul", *UNFUSED[1:]]


def test_what_is_written_into_afterwards():
    """The first matmul stays where it was."""

    def scaled(x):
        h = F.linear(x, W1)
        x.mul_(0.5)
        return F.linear(F.relu(h).square(), W2) + x

    def cleared(x, weight):
        h = F.linear(x, weight)
        weight.zero_()
        return F.linear(F.relu(h).square(), W2)

    with torch.no_grad():
        out, names = run(scaled, X.clone())
        assert names == FUSED and relative_error(out, want() + X * 0.5) < 1e-5
        out, names = run(cleared, X, W1.clone())
        assert names == FUSED and relative_error(out, want()) < 1e-5


@pytest.mark.parametrize(
    "first",
    [lambda x: F.linear(x, W1, B1[:1]), lambda x: torch.addmm(B1[:1], x.view(12, 16), W1.t())],
)
def test_a_bias_that_is_spread(first):
    with torch.no_grad():
        assert "linear_relu2_sparsify" not in run(ffn(first), X)[1]


def test_our_operator_called_by_name():
    def user(x):
        packed, metadata = torch.ops.ao_act24.relu2_sparsify(h=F.linear(x, W1))
        return torch.ops.ao_act24.sparse_mm(packed, metadata, W2)

    with torch.no_grad():
        out, names = run(user, X)
    assert names == FUSED and relative_error(out, want()) < 1e-5


def test_a_quantised_weight():
    up = nn.Linear(16, 64)
    quantize_(up, Int8WeightOnlyConfig())
    with torch.no_grad():
        out, names = run(ffn(up), X)
        assert names == UNFUSED and relative_error(out, F.linear(relu2_24(up(X)), W2)) < 1e-5


@pytest.mark.parametrize("shape", [(60, 16), (64, 12)])
def test_sizes_that_the_kernel_does_not_take(shape):
    hidden_dim, model_dim = shape
    w1, w2 = torch.randn(shape), torch.randn(16, hidden_dim)
    monkey = ffn(lambda x: F.linear(x, w1), lambda y: F.linear(y, w2))
    with torch.no_grad():
        assert run(monkey, torch.randn(6, model_dim))[1] == UNFUSED
