"""Few tokens, of a weight with a row for each neuron: exactly what dense computes. A stand-in says there is a kernel.

``tests/test_active.py`` is about the kernels.
"""

import copy
import functools
import io

import pytest
import torch
import torch.nn.functional as F
from mlp import MLP, Residual
from oracle import relative_error, relu2_24
from torch import nn
from torchao.quantization.quantize_.common import KernelPreference
from torchao_fp8 import needs_scaled_mm

import ao_act24
from ao_act24 import Act24Config, neuron_major_, ops, ops_fp8, when
from ao_act24.fp8 import rows_to_fp8, to_fp8
from ao_act24.passes import graph_modules, rewrite_graph
from ao_act24.when import FEW_TOKENS

DENSE = 1e-6
SIZES = {"dim": 64, "hidden": 128}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr("ao_act24.when.cuda.why_not", lambda device, dtype: "")
    monkeypatch.setattr("ao_act24.when.FEW_TOKENS", ((64 * 64, 8),))


def few_tokens(model, config=None, dynamic=None):
    """The model as it is rewritten, and the names of our operators in each of its graphs."""
    seen = []

    def backend(gm, example_inputs):
        names = []
        for module in graph_modules(gm):
            rewrite_graph(module.graph, config or Act24Config())
            module.graph.lint()
            module.recompile()
            names += [str(node.target).split(".")[1] for node in module.graph.nodes if "ao_act24." in str(node.target)]
        seen.append(names)
        return gm.forward

    return torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True), seen


def by_neurons(bias=True, **sizes):
    mlp = MLP(**SIZES | sizes)
    if not bias:
        mlp.up.bias = mlp.down.bias = None
    assert neuron_major_(mlp) == 1
    return mlp


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [(1,), (8,), (2, 4), (1, 1, 3)], ids=str)
def test_up_to_8_tokens_are_exact(tokens, bias):
    mlp, x = by_neurons(bias), torch.randn(*tokens, 64)
    with torch.no_grad():
        run, seen = few_tokens(mlp)
        assert relative_error(run(x), mlp(x)) < DENSE
    assert seen == [["active_ffn"]]


@pytest.mark.parametrize("tokens", [9, 100])
def test_more_run_in_24(tokens):
    mlp, x = by_neurons(), torch.randn(tokens, 64)
    with torch.no_grad():
        run, seen = few_tokens(mlp)
        assert relative_error(run(x), mlp.down(relu2_24(mlp.up(x)))) < 1e-5
    assert seen == [["relu2_sparsify", "sparse_mm"]]


def test_one_model_owns_a_graph_of_each():
    """Not one for each number of tokens."""
    mlp = by_neurons()
    with torch.no_grad():
        run, seen = few_tokens(mlp, dynamic=True)
        for tokens in (5, 8, 40, 7, 100):
            x = torch.randn(tokens, 64)
            want = mlp(x) if tokens <= 8 else mlp.down(relu2_24(mlp.up(x)))
            assert relative_error(run(x), want) < 1e-5
    assert seen == [["active_ffn"], ["relu2_sparsify", "sparse_mm"]]


@pytest.mark.parametrize(
    "made",
    [
        lambda: MLP(**SIZES),
        lambda: by_neurons(dim=72),
        lambda: by_neurons(hidden=96),
        lambda: by_neurons().half().float().to(torch.float64),
    ],
    ids=["a row for each output", "D not divisible by 64", "H not divisible by 64", "converted and back"],
)
def test_which_weights(made):
    mlp = made()
    x = torch.randn(3, mlp.up.in_features, dtype=mlp.up.weight.dtype)
    with torch.no_grad():
        run, seen = few_tokens(mlp)
        run(x)
    assert seen == [["active_ffn"] if mlp.up.weight.dtype == torch.float64 else ["relu2_sparsify", "sparse_mm"]]


def test_sizes_that_were_measured(monkeypatch):
    """From a size on, up to so many tokens, of which a block's memory holds all."""
    pay = functools.partial(when.few_tokens_pay, torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(when, "FEW_TOKENS", FEW_TOKENS)
    assert [n for n in range(12) if pay(n, 8192, 32768, 8192)] == list(range(1, 9))
    assert [n for n in range(12) if pay(n, 4096, 16384, 4096)] == list(range(1, 5))
    assert not any(pay(1, *sizes) for sizes in ((1024, 4032, 1024), (1024, 4096, 960), (960, 4096, 1024)))
    assert [n for n in range(12) if pay(n, 18432, 65536, 18432)] == [1, 2, 3]
    assert not pay(1, 18432, 73728, 18432)
    assert [n for n in range(20) if pay(n, 4096, 16384, 4096, in_fp8=True)] == list(range(1, 17))
    assert [n for n in range(20) if pay(n, 8192, 32768, 8192, in_fp8=True)] == list(range(1, 9))
    assert not pay(1, 1024, 4096, 1024, in_fp8=True)


def test_gradients_and_emulation_are_in_24():
    mlp, x = by_neurons(), torch.randn(3, 64)
    run, seen = few_tokens(mlp)
    run(x).sum().backward()
    assert seen == [["relu2_sparsify", "sparse_mm"]] and mlp.down.weight.grad is not None
    torch._dynamo.reset()
    with torch.no_grad():
        run, seen = few_tokens(mlp, Act24Config(emulate=True))
        run(x)
    assert seen == [["relu2_sparsify", "sparse_mm"]]


def test_an_up_projection_that_would_be_copied():
    """Stored ``[D, H]``, it has no row for each neuron to read."""
    w1, w2, x = torch.randn(64, 128), torch.randn(128, 64), torch.randn(3, 64)
    with torch.no_grad():
        run, seen = few_tokens(lambda x: F.relu(x @ w1).square() @ w2)
        run(x)
    assert seen == [["relu2_sparsify", "sparse_mm"]]


def test_a_number_of_tokens_that_depends_on_data():
    mlp = by_neurons()

    def routed(x):
        return mlp(x[x[:, 0].nonzero().flatten()])

    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run, seen = few_tokens(routed)
        out = run(torch.randn(3, 64))
    assert out.shape == (3, 64) and seen == [["relu2_sparsify", "sparse_mm"]]


def test_a_dense_phase():
    schedule = ao_act24.Schedule(warmup_steps=2)
    mlp, x = by_neurons(), torch.randn(3, 64)
    with torch.no_grad():
        run, seen = few_tokens(mlp)
        run(x)
    assert seen == [[]]
    schedule.close()


def test_spellings():
    """``x @ w`` of ``[H, D]``, as some models store it; casts that fall away; what else reads the activation."""
    w1, w2, x = torch.randn(128, 64), torch.randn(128, 64), torch.randn(3, 64)

    def product(x):
        return F.relu(F.linear(x, w1)).square() @ w2

    def cast(x):
        return F.relu(F.linear(x, w1).double()).square().float() @ w2

    def also_read(x):
        h = F.linear(x, w1)
        return F.relu(h).square() @ w2 + h.sum()

    for function, ours in ((product, "active_ffn"), (cast, "active_ffn"), (also_read, "relu2_sparsify")):
        torch._dynamo.reset()
        with torch.no_grad():
            run, seen = few_tokens(function)
            out = run(x)
            assert ours != "active_ffn" or relative_error(out, function(x)) < DENSE
        assert seen[0][0] == ours


def test_explain_and_graphs():
    model = nn.Sequential(Residual(**SIZES), Residual(**SIZES))
    neuron_major_(model)
    with torch.no_grad():
        report = ao_act24.explain(model, torch.randn(3, 64))
        assert "ao_act24.active_ffn(" in ao_act24.capture_graphs(model, torch.randn(3, 64)).after[0]
    assert [(v.path, v.rewritten, v.few) for v in report] == [("0", True, True), ("1", True, True)]
    assert report.summary() == "0 of 2 FFN-like sites run in 2:4, 2 by the neurons that fire"
    assert {v.remark for v in report} == {"few tokens: exactly, by the neurons that fire alone"}


def test_neuron_major_changes_nothing_but_strides():
    model = nn.Sequential(nn.Linear(64, 64), MLP(**SIZES), MLP(lambda h: F.gelu(h), **SIZES))
    before, x = copy.deepcopy(model), torch.randn(5, 64)
    parameters = list(model.parameters())
    assert neuron_major_(model) == 1 == neuron_major_(model)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model[1].down.weight.stride() == (1, 64) and model[2].down.weight.is_contiguous()
    state = model.state_dict()
    assert list(state) == list(before.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), before.state_dict().values(), strict=True))
    assert relative_error(model(x), before(x)) < DENSE
    model.load_state_dict({name: tensor + 1 for name, tensor in before.state_dict().items()})
    assert model[1].down.weight.stride() == (1, 64), "loading keeps strides"
    assert copy.deepcopy(model)[1].down.weight.stride() == (1, 64)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    before.load_state_dict(torch.load(file))
    assert torch.equal(before[1].down.weight, model[1].down.weight)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        neuron_major_(3)
    ao_act24.sparsify_(model)
    with pytest.raises(ValueError, match="call neuron_major_ first"):
        neuron_major_(model)


class Square(nn.Module):
    """One weight in both places, or of one block's down and the next one's up projection."""

    def __init__(self, same):
        super().__init__()
        self.a, self.b = MLP(dim=64, hidden=64), MLP(dim=64, hidden=64)
        if same:
            self.a.up.weight = self.a.down.weight
        else:
            self.b.up.weight = self.a.down.weight

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("same", [True, False])
def test_weights_that_are_an_up_projections_too(same):
    model = Square(same)
    assert neuron_major_(model) == 1
    assert model.a.down.weight.is_contiguous() and model.b.down.weight.stride() == (1, 64)


def test_parameters_of_inference_mode():
    with torch.inference_mode():
        mlp = MLP(**SIZES)
        x = torch.randn(3, 64)
        want = mlp(x)
    assert neuron_major_(mlp) == 1
    with torch.inference_mode():
        assert relative_error(mlp(x), want) < DENSE
    trained = MLP(**SIZES)
    with torch.inference_mode():
        assert neuron_major_(trained) == 1
    trained(torch.randn(3, 64)).sum().backward()


def in_fp8(dim=128, hidden=256):
    mlp = MLP(dim=dim, hidden=hidden).bfloat16()
    with torch.no_grad():
        for linear in (mlp.up, mlp.down):
            linear.weight = nn.Parameter(to_fp8(linear.weight), requires_grad=False)
    return mlp


@pytest.mark.parametrize("tokens", [(1,), (8,), (2, 3)], ids=str)
def test_fp8_by_the_reference(tokens):
    mlp, x = in_fp8(), torch.randn(*tokens, 128).bfloat16()
    assert neuron_major_(mlp) == 1 == neuron_major_(mlp)
    assert mlp.down.weight.qdata.stride() == (1, 128) and mlp.up.weight.qdata.is_contiguous()
    up, down = ((linear.weight.qdata, linear.weight.scale.flatten(), linear.bias) for linear in (mlp.up, mlp.down))
    with torch.no_grad():
        run, seen = few_tokens(mlp)
        assert torch.equal(run(x), ops_fp8.active_ffn_fp8(*rows_to_fp8(x), *up, *down, torch.bfloat16))
    assert seen == [["active_ffn_fp8"]]


@needs_scaled_mm
def test_fp8_as_dense():
    """torchao's own, which takes weights stored either way."""
    mlp, x = in_fp8(), torch.randn(8, 128).bfloat16()
    with torch.no_grad():
        want = mlp(x)
        neuron_major_(mlp)
        assert relative_error(mlp(x), want) < 0.01
        run, seen = few_tokens(mlp)
        assert relative_error(run(x), want) < 0.03  # y is not rounded to 16 bits before
    assert seen == [["active_ffn_fp8"]]


@needs_scaled_mm
@pytest.mark.parametrize(
    "change",
    [
        lambda mlp: setattr(mlp.up, "weight", nn.Parameter(mlp.up.weight.dequantize())),
        lambda mlp: setattr(mlp.up.weight, "act_quant_kwargs", None),
        lambda mlp: setattr(mlp.down.weight, "qdata", mlp.down.weight.qdata.contiguous()),
    ],
    ids=["an up projection in 16 bits", "of a 16-bit activation", "rows of outputs"],
)
def test_fp8_of_other_weights(change):
    mlp = in_fp8()
    neuron_major_(mlp)
    change(mlp)
    with torch.no_grad():
        (verdict,) = ao_act24.explain(mlp, torch.randn(3, 128).bfloat16())
    assert not verdict.few


@needs_scaled_mm
@pytest.mark.parametrize("sizes", [{"dim": 64}, {"hidden": 96}, {"dim": 128, "hidden": 32}], ids=str)
def test_fp8_of_other_sizes(sizes):
    """They stay as they are: torchao would copy them at each call."""
    mlp = in_fp8(**sizes)
    assert neuron_major_(mlp) == 0 and mlp.down.weight.qdata.is_contiguous()
    with torch.no_grad():
        (verdict,) = ao_act24.explain(mlp, torch.randn(3, mlp.up.in_features).bfloat16())
    assert not verdict.few


def test_fp8_where_other_kernels_would_multiply(monkeypatch):
    monkeypatch.setattr("ao_act24.neuron_major.find_spec", lambda name: name)
    mlp = in_fp8()
    assert neuron_major_(mlp) == 0
    mlp.down.weight.kernel_preference = KernelPreference.TORCH
    assert neuron_major_(mlp) == 1


def test_safetensors(tmp_path):
    """It refuses strides, as neuron_major_ says; save_pretrained and save_model do not."""
    safetensors = pytest.importorskip("safetensors.torch")
    mlp, other = by_neurons(), MLP(**SIZES)
    with pytest.raises(ValueError, match="non contiguous"):
        safetensors.save_file(mlp.state_dict(), tmp_path / "a")
    safetensors.save_file({name: t.contiguous() for name, t in mlp.state_dict().items()}, tmp_path / "a")
    other.load_state_dict(safetensors.load_file(tmp_path / "a"))
    assert torch.equal(other.down.weight, mlp.down.weight) and other.down.weight.is_contiguous()


def test_fp8_keeps_strides_through_a_state_dict():
    mlp, other = in_fp8(), in_fp8()
    neuron_major_(mlp)
    mlp.load_state_dict(other.state_dict())
    assert mlp.down.weight.qdata.stride() == (1, 128)
    assert torch.equal(mlp.down.weight.qdata.view(torch.uint8), other.down.weight.qdata.view(torch.uint8))
    assert copy.deepcopy(mlp).down.weight.qdata.stride() == (1, 128)


def test_what_does_not_fire_in_fp8_is_not_read():
    """But a neuron that fires by less than e4m3 holds is."""
    x, up = torch.eye(2, 4), torch.tensor([[1.0, 0], [-1, 0], [1 / 16, 0], [0, 0]]).repeat(1, 2)
    x, up = (t.to(torch.float8_e4m3fn) for t in (x, up))
    down = torch.randn(8, 4).to(torch.float8_e4m3fn)
    ones = [torch.ones(n) for n in (2, 4, 8)]
    out = ops_fp8.active_ffn_fp8(x, ones[0], up, ones[1], None, down, ones[2], None, torch.float16)
    y = torch.tensor([[1, 0, 1 / 256, 0], [0, 0, 0, 0]])
    y[0, 2] = (y[0, 2] * 448).to(torch.float8_e4m3fn).float() / 448
    assert relative_error(out, F.linear(y, down.float())) < 1e-3


def test_before_a_conversion_to_fp8():
    """Rows of outputs again, which fp8 takes."""
    mlp = by_neurons().to(torch.bfloat16)
    ao_act24.sparsify_(mlp, Act24Config(dtype="fp8"))
    assert mlp.down.weight.qdata.is_contiguous()


@pytest.mark.parametrize("tokens", [(3, 5), (4,), (), (0,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_in_fp8(tokens, bias):
    x, up, down = (torch.randn(*size).to(torch.float8_e4m3fn) for size in ((*tokens, 16), (8, 16), (12, 8)))
    scales = [torch.rand(tensor.shape[:-1]) for tensor in (x, up, down)]
    biases = [torch.randn(n).bfloat16() if bias else None for n in (8, 12)]
    arguments = x, scales[0], up, scales[1], biases[0], down, scales[2], biases[1], torch.bfloat16
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.ao_act24.active_ffn_fp8.default, arguments, test_utils=tests)


def e4m3(*shape):
    return torch.zeros(shape).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("at", "wrong", "message"),
    [
        (0, torch.zeros(3, 16), "x must have dtype float8_e4m3fn, got torch.float32"),
        (1, torch.zeros(4), r"x_scale must have shape \(3,\), got \(4,\)"),
        (
            2,
            torch.zeros(8, 12).to(torch.float8_e4m3fn),
            r"up must be \[H, D\] .* as in x, of shape \(3, 16\), got shape",
        ),
        (3, torch.zeros(8).double(), "up_scale must have dtype float32, got torch.float64"),
        (4, torch.zeros(7), r"up_bias must have shape \(8,\) as up has rows, got \(7,\)"),
        (
            5,
            torch.zeros(12, 4).to(torch.float8_e4m3fn),
            r"down must be \[D, H\] with H = 8 as in up, got shape \(12, 4\)",
        ),
        (6, torch.zeros(11), r"down_scale must have shape \(12,\), got \(11,\)"),
        (7, torch.zeros(12).half(), r"down_bias must have the dtype of out, torch\.bfloat16, got torch\.float16"),
        (8, torch.float32, "dtype must be bfloat16 or float16, got torch.float32"),
    ],
)
def test_errors_in_fp8(at, wrong, message):
    x, up, down = e4m3(3, 16), e4m3(8, 16), e4m3(12, 8)
    arguments = [x, torch.ones(3), up, torch.ones(8), None, down, torch.ones(12), None, torch.bfloat16]
    arguments[at] = wrong
    with pytest.raises((TypeError, ValueError), match=message):
        ops_fp8.active_ffn_fp8(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [(3, 5), (4,), (), (0,)], ids=str)
def test_opcheck(tokens, dtype):
    x, up, down = (torch.randn(*size).to(dtype) for size in ((*tokens, 16), (8, 16), (12, 8)))
    biases = torch.randn(8).to(dtype), torch.randn(12).to(dtype)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for up_bias, down_bias in (biases, (None, None)):
        arguments = x, up, up_bias, down, down_bias
        torch.library.opcheck(torch.ops.ao_act24.active_ffn.default, arguments, test_utils=tests)
        wide = [None if t is None else t.double() for t in arguments]
        want = F.linear(F.relu(F.linear(*wide[:3])).square(), *wide[3:])
        got = ops.active_ffn(*arguments)
        assert got.dtype == dtype and got.shape == want.shape
        assert not want.numel() or relative_error(got, want) < (0.01 if dtype == torch.bfloat16 else 1e-6)


def test_errors():
    x, up, down = torch.randn(3, 16), torch.randn(8, 16), torch.randn(12, 8)
    with pytest.raises(ValueError, match=r"up must be \[H, D\] with H divisible by 4 and D = 16 as in x"):
        ops.active_ffn(x, up[:, :8], None, down, None)
    with pytest.raises(ValueError, match="with H = 8 as in up"):
        ops.active_ffn(x, up, None, down[:, :4], None)
    with pytest.raises(TypeError, match=r"down must have the dtype of x, torch\.float32, got torch\.float64"):
        ops.active_ffn(x, up, None, down.double(), None)
    with pytest.raises(NotImplementedError, match="active_ffn has no gradient"):
        ops.active_ffn(x.requires_grad_(), up, None, down, None).sum().backward()
