"""Where 2:4 pays: the rule, and what training needs besides."""

from types import SimpleNamespace

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


@pytest.fixture
def gpu(monkeypatch):
    """Stands in for an H200."""
    monkeypatch.setattr(cuda, "_why_not_gpu", lambda index: "")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    return torch.device("cuda", 0)


SIZE = {
    **{"dtype": torch.bfloat16, "tokens": 8192, "model_dim": 4096, "hidden_dim": 16384},
    **{"in_rows": True, "training": False, "packs": True},
}
SMALLEST = "2:4 runs from model_dim 768 and here hidden_dim"


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"dtype": torch.float32}, "the 2:4 kernels take bfloat16 and float16, got torch.float32"),
        ({"model_dim": 4}, "the 2:4 kernels take model_dim divisible by 64, got 4"),
        ({"hidden_dim": 16388}, "the 2:4 kernels take hidden_dim divisible by 64, got 16388"),
        ({"model_dim": 576, "hidden_dim": 2304}, f"{SMALLEST} 2048 on, got 576, 2304"),
        ({"model_dim": 1024, "hidden_dim": 1024}, f"{SMALLEST} 2048 on, got 1024, 1024"),
        ({"hidden_dim": 4032}, f"{SMALLEST} 4096 on, got 4096, 4032"),
        ({"hidden_dim": 4096}, ""),
        ({"hidden_dim": 4096, "training": True}, f"{SMALLEST} 8192 on, got 4096, 4096"),
        ({"model_dim": 1024, "hidden_dim": 2560, "training": True}, f"{SMALLEST} 3072 on, got 1024, 2560"),
        ({"in_rows": False}, "the down projection's weight does not lie in rows: 2:4 would copy it"),
        ({"tokens": 16}, "2:4 runs from 1665 tokens on at this size, and at some fewer, got 16"),
        ({"tokens": 1537}, "2:4 runs from 1665 tokens on at this size, and at some fewer, got 1537"),
        ({"tokens": 1152, "packs": False}, "2:4 runs from 3201 tokens on at this size, and at some fewer, got 1152"),
        ({"tokens": 1152, "training": True}, "2:4 runs from 7297 tokens on at this size, and at some fewer, got 1152"),
        ({"tokens": 1152}, ""),
        ({"tokens": 1024, "packs": False}, ""),
        ({"tokens": 512, "model_dim": 8192, "hidden_dim": 32768}, ""),
    ],
    ids=str,
)
def test_where_there_is_no_kernel_or_none_that_pays_it_stays_dense(changed, reason, gpu):
    got = when.why_dense(gpu, **SIZE | changed, config=ao_act24.Act24Config())
    assert got.startswith(reason) and bool(got) == bool(reason)
    assert when.why_dense(gpu, **SIZE | changed, config=ao_act24.Act24Config(emulate=True)) == ""


def test_on_other_devices(gpu, monkeypatch):
    config = ao_act24.Act24Config()
    assert when.why_dense(torch.device("cpu"), **SIZE, config=config) == ""
    assert "no 2:4 kernel for mps" in when.why_dense(torch.device("mps"), **SIZE, config=config)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=114))
    reason = "when 2:4 pays was measured on a GPU of 132 multiprocessors, this one has 114"
    assert when.why_dense(gpu, **SIZE, config=config).startswith(reason)


def test_a_size_that_is_never_even(gpu):
    never = {"tokens": 70001, "model_dim": 832, "hidden_dim": 3328, "packs": False}
    got = when.why_dense(gpu, **SIZE | never, config=ao_act24.Act24Config())
    assert got.startswith("2:4 runs at few numbers of tokens of this size only, got 70001")


def test_every_kernel_is_called(gpu):
    """What the dispatcher and compiled code ask of the first argument: counts are int32."""
    assert all(cuda.why_not(gpu, dtype) == "" for dtype in (torch.bfloat16, torch.int32))


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("size", [(768, 3072), (2048, 8192), (2304, 13824), (4096, 8192)], ids=str)
def test_the_rule_keeps_to_what_the_schedule_wastes(size, packs, gpu):
    def pays(tokens):
        arguments = SIZE | dict(zip(("tokens", "model_dim", "hidden_dim", "packs"), (tokens, *size, packs)))
        return when.why_dense(gpu, **arguments, config=ao_act24.Act24Config()) == ""

    def even(tokens):
        return when.waste(tokens, *size, packs) <= when.MAX_WASTE

    least = when.least_tokens(*size, packs=packs)
    assert all(even(tokens) for tokens in range(least, 2**16, 61))
    assert not even(least - 128)  # a tile of fewer rows before
    answers = {tokens: pays(tokens) for tokens in range(when.MIN_TOKENS, least, 13)}
    assert {*answers.values()} == {True, False}  # some of the fewer are even
    assert all(answer == even(tokens) for tokens, answer in answers.items())


def test_dynamo_guards_on_the_bound_alone(gpu):
    """Not on each number of tokens, though the reason names it."""
    sizes, config, counter = (2048, 8192, True, False, True), ao_act24.Act24Config(), CompileCounter()
    least = when.least_tokens(2048, 8192)

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def dense(x):
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
def test_training_on_a_gpu_is_in_one_operator_or_dense(between, reason, gpu):
    site = on_a_gpu(
        lambda x, up, down: F.linear(between(F.linear(x, up)), down), (8192, 4096), (16384, 4096), (4096, 16384)
    )
    got = judge(site, ao_act24.Act24Config())
    assert got == (reason and f"{reason}: in training only both projections in one operator are faster than dense")
    assert judge(site, ao_act24.Act24Config(emulate=True)) == ""


def test_sparse_gradients_of_weights_where_they_pay(gpu):
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
