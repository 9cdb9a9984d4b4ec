"""Where 2:4 pays: the rule, and what training needs besides."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import ao_act24
from ao_act24 import when
from ao_act24.kernels import cuda
from ao_act24.passes.find import find_sites
from ao_act24.passes.judge import judge


def test_where_there_is_no_kernel_or_none_that_pays_it_stays_dense(monkeypatch):
    config, sizes = ao_act24.Act24Config(), (torch.bfloat16, 8192, 4096, 16384, True, False)
    monkeypatch.setattr(cuda, "_why_not_gpu", lambda index: "")
    gpu = torch.device("cuda", 0)
    assert when.why_dense(torch.device("cpu"), *sizes, config) == "" == when.why_dense(gpu, *sizes, config)
    assert "no 2:4 kernel for mps" in when.why_dense(torch.device("mps"), *sizes, config)
    for changed, reason in (
        ((torch.float32, 8192, 4096, 16384, True, False), "take bfloat16 and float16, got torch.float32"),
        ((torch.bfloat16, 16, 4096, 16384, True, False), "pays from 1665 tokens on at this size, got 16"),
        ((torch.bfloat16, 8192, 4, 16384, True, False), "model_dim divisible by 64, got 4"),
        (
            (torch.bfloat16, 2049, 2048, 8192, True, False),
            "from 3201 tokens on at this size, and at some fewer, got 2049",
        ),
        (
            (torch.bfloat16, 65536, 576, 2304, True, False),
            "pays from model_dim and hidden_dim 768 on, got 576 and 2304",
        ),
        ((torch.bfloat16, 8192, 4096, 16384, False, False), "stored [hidden_dim, model_dim]"),
        ((torch.bfloat16, 8192, 4096, 16388, True, False), "hidden_dim divisible by 64, got 16388"),
        (
            (torch.bfloat16, 1600, 4096, 16384, True, True),
            "from 7297 tokens on at this size, and at some fewer, got 1600",
        ),
    ):
        assert reason in when.why_dense(gpu, *changed, config)
        assert when.why_dense(gpu, *changed, ao_act24.Act24Config(emulate=True)) == ""


def test_a_size_that_is_never_even():
    assert when.least_tokens(832, 832) == when.NEVER
    assert "pays at few numbers of tokens at this size, got 70001" in when._why_slower(70001, 832, 832, True, False)


def test_every_kernel_is_called(monkeypatch):
    """What the dispatcher and compiled code ask of the first argument: counts are int32."""
    monkeypatch.setattr(cuda, "_why_not_gpu", lambda index: "")
    assert all(cuda.why_not(torch.device("cuda", 0), dtype) == "" for dtype in (torch.bfloat16, torch.int32))


@pytest.mark.parametrize("size", [(768, 3072), (2048, 8192), (2304, 13824), (4096, 8192)], ids=str)
def test_the_rule_keeps_to_what_the_schedule_wastes(size):
    least = when.least_tokens(*size)
    assert all(when.waste(tokens, *size) <= when.MAX_WASTE for tokens in range(least, 2**16, 61))
    assert when.waste(least - 128, *size) > when.MAX_WASTE  # a tile of fewer rows before
    answers = {tokens: when._why_slower(tokens, *size, True, False) for tokens in range(when.MIN_TOKENS, least, 13)}
    assert {why == "" for why in answers.values()} == {True, False}  # some of the fewer are even
    assert all((why == "") == (when.waste(tokens, *size) <= when.MAX_WASTE) for tokens, why in answers.items())


def test_dynamo_guards_on_the_bound_alone(monkeypatch):
    """Not on each number of tokens, though the reason names it."""
    monkeypatch.setattr(cuda, "_why_not_gpu", lambda index: "")
    sizes, config, counter = (2048, 8192, True, False), ao_act24.Act24Config(), CompileCounter()
    least = when.least_tokens(2048, 8192)

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def dense(x):
        gpu = torch.device("cuda", 0)
        return x + 1 if when.why_dense(gpu, torch.bfloat16, x.shape[0], *sizes, config, least) else x

    for tokens in (7, 1500, 2048, least - 1, least, least + 1, 8192, 9999):
        assert dense(torch.zeros(tokens)).all() == (tokens < least)
    assert counter.frame_count == 2


def on_a_gpu(function, *sizes):
    """The one site of ``function`` in training, its operands on a GPU as far as the graph knows."""
    graph = torch.fx.symbolic_trace(function).graph
    operands = iter(sizes)
    with FakeTensorMode():
        for node in graph.nodes:
            if node.op == "placeholder":
                node.meta["example_value"] = torch.empty(next(operands), device="cuda", dtype=torch.bfloat16)
            elif node.op != "output":
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda arg: arg.meta["example_value"])
                run = node.target if callable(node.target) else getattr(torch.Tensor, node.target)
                node.meta["example_value"] = run(*args, **kwargs)
    for node in graph.nodes:
        if node.op not in ("placeholder", "output"):
            node.meta["example_value"].requires_grad_()
    (site,) = find_sites(graph)
    return site


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda h: F.relu(h).square(), ""),
        (lambda h: F.relu(h.view(8192, 1, 16384)).square(), "something stands between the up projection and ReLU²"),
        (lambda h: F.relu(h).square().view(8192, 1, 16384), "view stands between ReLU² and the down projection"),
    ],
)
def test_training_on_a_gpu_is_in_one_operator_or_dense(between, reason, monkeypatch):
    monkeypatch.setattr("ao_act24.kernels.cuda._why_not_gpu", lambda index: "")
    site = on_a_gpu(
        lambda x, up, down: F.linear(between(F.linear(x, up)), down), (8192, 4096), (16384, 4096), (4096, 16384)
    )
    got = judge(site, ao_act24.Act24Config())
    assert got == (reason and f"{reason}: in training only both projections in one operator are faster than dense")
    assert judge(site, ao_act24.Act24Config(emulate=True)) == ""


def test_sparse_gradients_of_weights_where_they_pay():
    gpu = torch.device("cuda", 0)
    config, emulate = ao_act24.Act24Config(), ao_act24.Act24Config(emulate=True)
    assert when.why_exact_grads(torch.device("cpu"), 4, 8, 8, config) == ""
    for *size, reason in (
        (16384, 2048, 8192, ""),
        (8192, 2048, 8192, ""),
        (8191, 2048, 8192, "sparse ones pay from 8192 tokens on at this size, got 8191"),
        (65536, 768, 3072, "a gradient of 3072 x 768 does not fill the GPU evenly"),
    ):
        assert when.why_exact_grads(gpu, *size, config) == reason
        assert when.why_exact_grads(gpu, *size, emulate) == ""
