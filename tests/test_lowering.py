"""Inductor's code calls the kernels' functions themselves where they run, and the operators where not.

Stand-ins take the place of ``cuda.why_not``, which the lowering asks, and of the functions that its code calls.
"""

import pytest
import torch
from mlp import MLP, oracle
from oracle import relative_error, relu2_24
from test_backend import run
from torch._inductor.utils import fresh_cache, run_and_get_code

import ao_act24
from ao_act24 import lowering
from ao_act24.kernels import cuda, reference


@pytest.fixture
def calls(monkeypatch):
    """The names of the functions that were called, on a CPU for which there are kernels."""
    called = []

    def stand_in(name):
        function = getattr(reference, name)
        monkeypatch.setattr(cuda, name, lambda *args: called.append(name) or function(*args))

    for name in lowering.KERNELS:
        stand_in(name)
    monkeypatch.setattr(cuda, "why_not", lambda device, dtype: "")
    with fresh_cache():  # what is compiled here is not for others
        yield called


FFN = ["relu2_sparsify", "sparse_mm"]


def compiled_code(function, *inputs, **options):
    """The output, and the code without what assertions say of their reasons."""
    out, codes = run_and_get_code(torch.compile(function, **{"backend": "ao_act24", **options}), *inputs)
    return out, "\n".join(codes).replace("'torch.ops.", "'")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fullgraph": True, "dynamic": True},
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune-no-cudagraphs"},
        {"options": {"pre_grad_custom_pass": ao_act24.Act24Pass()}, "backend": "inductor"},
        {"options": {"graph_partition": True}},
    ],
    ids=str,
)
def test_the_code_calls_the_kernels(options, calls):
    mlp, x = MLP(), torch.randn(2, 6, 16)
    with torch.no_grad():
        out, code = compiled_code(mlp, x, **options)
        assert calls == FFN and relative_error(out, oracle(mlp, x)) < 1e-5
    assert "ao_act24_cuda.sparse_mm(" in code and "torch.ops.ao_act24" not in code
    assert not any("ao_act24" in line for line in code.splitlines() if "assert_" in line)


def test_the_first_matmul_packs_its_own_result(calls):
    mlp, x = MLP(hidden=64), torch.randn(2, 6, 16)
    with torch.no_grad():
        out, code = compiled_code(mlp, x)
    assert calls == ["linear_relu2_sparsify", "sparse_mm"] and relative_error(out, oracle(mlp, x)) < 1e-5
    assert "ao_act24_cuda.linear_relu2_sparsify(" in code and "torch.ops.ao_act24" not in code


def test_a_transformed_model_and_plain_inductor(calls):
    mlp, x = MLP(), torch.randn(6, 16)
    want = oracle(mlp, x)
    ao_act24.sparsify_(mlp)
    with torch.no_grad():
        out, code = compiled_code(mlp, x, backend="inductor")
    assert calls == FFN and "torch.ops.ao_act24" not in code and relative_error(out, want) < 1e-5


@pytest.mark.parametrize("weight_grads", ["dense", "sparse"])
def test_training(weight_grads, calls):
    mlp, x = MLP(), torch.randn(64, 16, requires_grad=True)
    config = ao_act24.Act24Config(weight_grads=weight_grads)
    backward = {
        "dense": ["unpack", "unpack"],
        "sparse": ["densest", *2 * ["columns", "feature_wise", "feature_wise_mm"]],
    }
    with fresh_cache():
        out = torch.compile(mlp, backend=ao_act24.Act24Backend(config))(x)
        assert calls == ["relu2_ffn"] and relative_error(out, oracle(mlp, x)) < 1e-5
        out.sum().backward()
    assert sorted(calls) == sorted(["relu2_ffn", "grad_hidden", "sparse_mm", *backward[weight_grads]])


def test_dynamic_sizes(calls):
    mlp = MLP()
    compiled = torch.compile(mlp, backend="ao_act24", dynamic=True, fullgraph=True)
    with torch.no_grad():
        for tokens in (5, 8, 13):
            x = torch.randn(2, tokens, 16)
            assert relative_error(compiled(x), oracle(mlp, x)) < 1e-5
    assert calls == 3 * FFN


@pytest.mark.parametrize(
    "hidden", [lambda x: (x + 1).t(), lambda x: x[:, :4].repeat(1, 9)[:, :32], lambda x: x.t() + 1]
)
def test_any_strides(hidden, calls):
    x, weight = torch.randn(32, 8), torch.randn(4, 32)
    out, code = compiled_code(lambda x: ao_act24.ops.sparse_mm(*ao_act24.ops.relu2_sparsify(hidden(x)), weight), x)
    assert calls == FFN and "torch.ops.ao_act24" not in code
    assert relative_error(out, relu2_24(hidden(x)) @ weight.t()) < 1e-5


def test_graphs_within_graphs(calls):
    mlp, x = MLP(), torch.randn(6, 16)
    layer = torch.compiler.nested_compile_region(lambda x: mlp(x))
    branch = lambda x: torch.cond(x.sum() > x.numel(), torch.neg, mlp, (x,))  # noqa: E731
    with torch.no_grad():
        for function, want in ((lambda x: layer(layer(x)), oracle(mlp, oracle(mlp, x))), (branch, oracle(mlp, x))):
            calls.clear()
            out, code = compiled_code(function, x)
            assert calls and "torch.ops.ao_act24" not in code and relative_error(out, want) < 1e-5


@pytest.mark.parametrize("why", ["no kernel", "C++"])
def test_otherwise_the_operators(why, calls, monkeypatch):
    if why == "no kernel":
        monkeypatch.setattr(cuda, "why_not", lambda device, dtype: why)
    mlp, x = MLP(), torch.randn(6, 16)
    with torch.no_grad():
        out, code = compiled_code(mlp, x, options={"cpp_wrapper": why == "C++"})
    assert not calls and "ao_act24_cuda" not in code and relative_error(out, oracle(mlp, x)) < 1e-5
    if why == "no kernel":
        assert "torch.ops.ao_act24.sparse_mm.default(" in code


CACHED = """
    import torch, torch.nn.functional as F
    from torch._dynamo.utils import counters
    import ao_act24
    from ao_act24.kernels import cuda, reference
    assert "torch._inductor.lowering" not in __import__("sys").modules
    cuda.why_not = lambda device, dtype: ""
    cuda.relu2_sparsify, cuda.sparse_mm = reference.relu2_sparsify, lambda *args: reference.sparse_mm(*args) * 0 + 7
    torch.manual_seed(0)
    up, down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)
    with torch.no_grad():
        out = torch.compile(lambda x: down(F.relu(up(x)).square()), backend="ao_act24")(torch.randn(6, 16))
    print(counters["inductor"]["fxgraph_cache_hit"], out.unique().tolist())
"""


def test_from_a_cache_in_a_new_process(tmp_path):
    assert [run(CACHED, TORCHINDUCTOR_CACHE_DIR=tmp_path) for _ in range(2)] == ["0 [7.0]", "1 [7.0]"]
