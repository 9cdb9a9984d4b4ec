"""FFNs of torchao's fp8 weights: through every way in, and converted by ``sparsify_``; what stays dense, and why.

The oracle multiplies in fp32 what it rounds by itself; torchao's Float8Tensor is what it starts from.
"""

import copy
import importlib
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from mlp import MLP
from oracle import mask24, relative_error
from torch import nn
from torchao.quantization import Float8Tensor, PerRow, PerTensor
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs
from torchao_fp8 import needs_scaled_mm

import ao_act24
from ao_act24 import Act24Config, Act24Warning, fp8, ops_fp8
from ao_act24.passes import graph_modules, rewrite_graph

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
FP8 = Act24Config(dtype="fp8")
EMULATED = Act24Config(dtype="fp8", emulate=True)
CLOSE = 4e-3  # two roundings to bfloat16
pytestmark = [needs_scaled_mm, pytest.mark.filterwarnings("ignore:Float8Tensor does not implement")]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def dense_mlp(dtype=BF16, shift=-0.5, **sizes):
    """Of normally distributed ``h``, shifted: 69 % zeros, at -1.28 90 %."""
    mlp = MLP(**{"dim": 64, "hidden": 256, **sizes})
    nn.init.normal_(mlp.up.weight, std=mlp.up.in_features**-0.5)
    nn.init.constant_(mlp.up.bias, shift)
    return mlp.to(dtype).eval()


def convert(mlp, how=fp8.to_fp8):
    for linear in (mlp.up, mlp.down):
        linear.weight = nn.Parameter(how(linear.weight.detach()), requires_grad=False)
    return mlp


def data(*tokens, dim=64, dtype=BF16):
    return torch.randn(*(tokens or (48,)), dim, dtype=dtype)


def oracle(mlp, x):
    h, weight = mlp.up(x), mlp.down.weight
    kept = torch.where(mask24(h), F.relu(h).float().square(), 0)
    scale = kept.amax(-1, keepdim=True).clamp_min(1e-12) / 448
    rounded = (kept / scale).to(E4M3).float()
    out = rounded @ weight.qdata.float().t() * scale * weight.scale.flatten()
    return (out + (0 if mlp.down.bias is None else mlp.down.bias.float())).to(x.dtype)


def rewritten(model, config=None, dynamic=None):
    """Dynamo's graphs, rewritten and run as they are: Inductor rounds torchao's part otherwise."""

    def backend(gm, example_inputs):
        for module in graph_modules(gm):
            rewrite_graph(module.graph, config or Act24Config())
            module.graph.lint()
            module.recompile()
        return gm.forward

    return torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("tokens", [(48,), (2, 3, 5), (1,), (0,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_converted_model(bias, tokens, dtype):
    mlp = convert(dense_mlp(dtype))
    if not bias:
        mlp.down.bias = None
    x = data(*tokens, dtype=dtype)
    got, want = rewritten(mlp)(x), oracle(mlp, x)
    assert got.dtype == dtype and got.shape == want.shape
    if x.numel():
        assert relative_error(got, want) <= CLOSE < relative_error(mlp(x), want)


def test_by_the_backend_and_by_the_pass():
    mlp, x = convert(dense_mlp()), data()
    want = oracle(mlp, x)
    by_backend = torch.compile(mlp, backend="ao_act24", fullgraph=True)(x)
    torch._dynamo.reset()
    by_pass = torch.compile(mlp, options={"pre_grad_custom_pass": ao_act24.Act24Pass()}, fullgraph=True)(x)
    assert torch.equal(by_backend, by_pass)
    assert relative_error(by_backend, want) < 0.05  # Inductor rounds x to fp8 otherwise
    calls = torch._inductor.utils.run_and_get_code(torch.compile(mlp, backend="ao_act24"), x)[1]
    assert "ao_act24.relu2_sparsify_fp8" in calls[0] and "ao_act24.sparse_mm_fp8" in calls[0]


def test_any_number_of_tokens_in_one_graph():
    mlp = convert(dense_mlp())
    run = rewritten(mlp, dynamic=True)
    for tokens in (48, 7, 64):
        x = data(tokens)
        assert relative_error(run(x), oracle(mlp, x)) <= CLOSE
    assert "sparse_mm_fp8" in ao_act24.capture_graphs(mlp, data(), dynamic=True).after[0]


def test_only_the_second_weight_is_in_fp8():
    mlp, x = dense_mlp(), data()
    mlp.down.weight = nn.Parameter(fp8.to_fp8(mlp.down.weight), requires_grad=False)
    assert relative_error(rewritten(mlp)(x), oracle(mlp, x)) <= CLOSE


def test_widened_in_between():
    mlp, x = convert(dense_mlp()), data()
    mlp.activation = lambda h: F.relu(h.float()).square().to(BF16)
    assert relative_error(rewritten(mlp)(x), oracle(mlp, x)) <= CLOSE


def reason(model, x, config=None):
    (verdict,) = ao_act24.explain(model, x, config=config)
    assert verdict.rewritten == (not verdict.reason)
    return verdict.reason


def from_hp(**changed):
    how = {"granularity": PerRow(), **fp8._how(), **changed}
    return lambda weight: Float8Tensor.from_hp(weight, **how)


def activation(**changed):
    return from_hp(act_quant_kwargs=fp8.QuantizeTensorToFloat8Kwargs(**changed))


NOT_BY_ROWS = "the down projection's weight is in fp8, but not as 2:4 takes it: "


@pytest.mark.parametrize(
    "how, why",
    [
        (
            from_hp(
                granularity=PerTensor(), act_quant_kwargs=fp8.QuantizeTensorToFloat8Kwargs(granularity=PerTensor())
            ),
            "its scales are of blocks [64, 256], of the activation PerTensor()",
        ),
        (from_hp(act_quant_kwargs=None), "its activation stays in 16 bits"),
        (activation(float8_dtype=torch.float8_e5m2), "it is in torch.float8_e4m3fn, torch.float8_e5m2"),
        (activation(hp_value_ub=1.0), "the activation's scale is bounded"),
        (activation(hp_value_lb=1.0), "the activation's scale is bounded"),
        (
            from_hp(mm_config=fp8.Float8MMConfig(use_fast_accum=False)),
            "its products are not accumulated fast (use_fast_accum=False)",
        ),
    ],
)
def test_other_fp8_weights_stay_dense(how, why):
    mlp = dense_mlp()
    mlp.down.weight = nn.Parameter(how(mlp.down.weight.detach()), requires_grad=False)
    assert reason(mlp, data()) == NOT_BY_ROWS + why


def test_gradients_keep_it_dense():
    mlp = convert(dense_mlp())
    with torch.enable_grad():
        assert reason(mlp, data()) == "fp8 has no gradients: in 2:4 it runs under torch.no_grad()"
    assert reason(mlp, data()) == ""


def test_dtypes_that_it_does_not_take():
    mlp = convert(dense_mlp())
    mlp.down.bias = nn.Parameter(mlp.down.bias.float())
    want = "the down projection's bias must have the dtype of its result, torch.bfloat16, got torch.float32"
    assert reason(mlp, data()) == want
    wide = convert(dense_mlp(torch.float32))
    assert reason(wide, data(dtype=torch.float32)) == "fp8 takes bfloat16 and float16 activations, got torch.float32"


def test_weights_of_16_bits_belong_to_the_model():
    """In a compiled graph, that is; to study what fp8 would do, they are converted at each call."""
    mlp, x = dense_mlp(), data()
    got = reason(mlp, x, FP8)
    assert got.startswith('the weights are not in fp8 yet: sparsify_(model, Act24Config(dtype="fp8")), or torchao')
    assert reason(mlp, x, EMULATED) == ""
    assert torch.equal(rewritten(mlp, EMULATED)(x), rewritten(convert(copy.deepcopy(mlp)))(x))
    for config in (FP8, EMULATED):
        half, wide = dense_mlp(torch.float16), dense_mlp(torch.float32)
        got = reason(half, data(dtype=torch.float16), config)
        assert got == "only bfloat16 weights are converted to fp8, got torch.float16"
        got = reason(wide, data(dtype=torch.float32), config)
        assert got == "only bfloat16 weights are converted to fp8, got torch.float32"
        got = reason(dense_mlp(hidden=264), x, config)
        assert got == "only weights of sizes divisible by 16 are converted to fp8, got 264"


def test_sparsify_converts_what_it_rewrites():
    model = nn.Sequential(nn.Linear(64, 64), dense_mlp(), nn.Linear(64, 8)).to(BF16).eval()
    x, want = data(), copy.deepcopy(model)
    convert(want[1])
    want = want[2](oracle(want[1], want[0](x)))
    report = ao_act24.sparsify_(model, FP8)
    assert [(v.name, v.rewritten, v.dtype) for v in report] == [("1", True, "float8_e4m3fn")]
    in_fp8 = [name for name, parameter in model.named_parameters() if isinstance(parameter, Float8Tensor)]
    assert in_fp8 == ["1.up.weight", "1.down.weight"]
    assert not any(parameter.requires_grad for parameter in (model[1].up.weight, model[1].down.weight))
    assert relative_error(model(x), want) <= CLOSE
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
    (verdict,) = ao_act24.explain(model, x)
    assert (verdict.path, verdict.rewritten, verdict.dtype) == ("1", True, "float8_e4m3fn")
    assert ao_act24.unsparsify_(model) == 1 and isinstance(model[1].up.weight, Float8Tensor)
    assert relative_error(model(x), want) > CLOSE


@pytest.mark.parametrize("how", [fp8.to_fp8, None], ids=["to_fp8", "torchao"])
def test_each_way_takes_a_converted_model(how):
    """torchao's own tensors have scales in bfloat16, and no lower bound of those of the activation."""
    mlp, x = convert(dense_mlp(), how or from_hp(act_quant_kwargs=QuantizeTensorToFloat8Kwargs())), data()
    before, want = list(mlp.parameters()), oracle(mlp, x)
    got = torch.compile(mlp, backend="ao_act24", fullgraph=True)(x)
    assert relative_error(got, want) < 0.03, "Inductor rounds x to fp8 otherwise"
    assert relative_error(rewritten(mlp)(x), want) <= CLOSE
    assert len(ao_act24.sparsify_(mlp).rewritten) == 1
    assert all(a is b for a, b in zip(mlp.parameters(), before, strict=True))
    assert relative_error(mlp(x), want) <= CLOSE


class Functional(nn.Module):
    """Weights of its own."""

    def __init__(self):
        super().__init__()
        mlp = dense_mlp()
        self.up_weight, self.bias, self.down_weight = mlp.up.weight, mlp.up.bias, mlp.down.weight

    def forward(self, x):
        return F.linear(F.relu(F.linear(x, self.up_weight, self.bias)).square(), self.down_weight)


class Tied(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.first, self.other = Functional(), other
        other.weight = self.first.down_weight

    def forward(self, x):
        return self.first(x) + self.other(self.first(x)).sum()


class SecondFFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.bias = dense_mlp().up, nn.Parameter(torch.zeros(64, dtype=BF16))

    def forward(self, x):
        return F.linear(F.relu(self.up(x)).square(), self.weight, self.bias)


class BufferedWeight(Functional):
    def __init__(self):
        super().__init__()
        weight = self.down_weight.detach()
        del self.down_weight
        self.register_buffer("down_weight", weight)


class ByInputs(Functional):
    def __init__(self):
        super().__init__()
        self.up_weight = nn.Parameter(self.up_weight.t().contiguous())

    def forward(self, x):
        return F.linear(F.relu(x @ self.up_weight + self.bias).square(), self.down_weight)


class AlsoRead(Functional):
    def forward(self, x):
        return super().forward(x) + self.down_weight.float().square().sum().to(x.dtype)


class CastOnItsWay(Functional):
    def forward(self, x):
        y = F.relu(F.linear(x, self.up_weight, self.bias)).float().square().half().to(x.dtype)
        return F.linear(y, self.down_weight)


class WideBias(Functional):
    def forward(self, x):
        return F.linear(F.relu(F.linear(x, self.up_weight, self.bias)).square(), self.down_weight, self.wide)

    def __init__(self):
        super().__init__()
        self.wide = nn.Parameter(torch.zeros(64))


class NoisyInTraining(Functional):
    def forward(self, x):
        h = F.linear(x, self.up_weight, self.bias)
        return F.linear(F.relu(h + torch.randn_like(h) if self.training else h).square(), self.down_weight)


@pytest.mark.parametrize("other", [SecondFFN, lambda: nn.Linear(256, 64, bias=False)], ids=["an FFN", "a linear layer"])
def test_a_shared_weight_stays_shared(other):
    model, x = Tied(other()), data()
    dense = copy.deepcopy(model)
    converted = isinstance(model.other, SecondFFN)
    if converted:
        assert len(ao_act24.sparsify_(model, FP8).rewritten) == 2
        assert isinstance(model.first.down_weight, Float8Tensor)
        assert relative_error(model.first(x), dense.first(x)) < 0.2
    else:
        with pytest.warns(Act24Warning, match=r"sparsify_ converts parameters \[outputs, inputs\] that nothing but"):
            ao_act24.sparsify_(model, FP8)
        assert torch.equal(model.first(x), dense.first(x))
    assert model.other.weight is model.first.down_weight


@pytest.mark.filterwarnings("ignore:ao_act24.sparsify_ rewrote nothing")
@pytest.mark.parametrize("kind", [BufferedWeight, ByInputs, AlsoRead, CastOnItsWay, WideBias, NoisyInTraining])
@pytest.mark.parametrize("config", [FP8, EMULATED], ids=["fp8", "emulated"])
def test_sparsify_converts_nothing_that_then_stays_dense(kind, config):
    model, x = kind().eval(), data()
    before, want = [*model.parameters(), *model.buffers()], None if kind is WideBias else model(x)
    report = ao_act24.sparsify_(model, config)
    assert not report.rewritten
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], before, strict=True))
    assert kind is WideBias or torch.equal(model(x), want)


def test_sparsify_says_what_it_does_not_convert():
    for model, why in (
        (dense_mlp(torch.float16), "only bfloat16 weights are converted to fp8, got torch.float16"),
        (dense_mlp(hidden=258), "the hidden size must be divisible by 4, got 258"),
        (dense_mlp(hidden=264), "only weights of sizes divisible by 16 are converted to fp8, got 264"),
        (ByInputs(), "sparsify_ converts parameters"),
    ):
        with pytest.warns(Act24Warning, match=why):
            ao_act24.sparsify_(model, FP8)
        assert not any(isinstance(parameter, Float8Tensor) for parameter in model.parameters())


def test_sparsify_again_in_fp8():
    mlp, x = dense_mlp(), data()
    ao_act24.sparsify_(mlp)
    in_bf16 = mlp(x)
    (verdict,) = ao_act24.sparsify_(mlp, FP8)
    assert verdict.dtype == "float8_e4m3fn" and not torch.equal(mlp(x), in_bf16)
    assert relative_error(mlp(x), oracle(mlp, x)) <= CLOSE


def test_rows_of_zeros():
    """torchao's own conversion makes NaN of them."""
    mlp, x = dense_mlp(), data()
    with torch.no_grad():
        mlp.up.weight[5] = mlp.down.weight[3] = x[7] = 0
        mlp.up.bias[:128] = -100
    ao_act24.sparsify_(mlp, FP8)
    for out in (mlp(x), type(mlp).forward(mlp, x), rewritten(mlp)(x)):
        assert out.isfinite().all() and torch.equal(out[:, 3], mlp.down.bias[3].expand(len(x)))
    zero = dense_mlp()
    with torch.no_grad():
        zero.down.weight.zero_()
    (layer,) = ao_act24.measure(zero, x, config=FP8).layers
    assert (layer.error, layer.fp8_error) == (0, 0)


def test_a_token_of_zeros_that_torchao_quantises():
    """It has NaN of it, as dense has, and of no other."""
    mlp, x = convert(dense_mlp(), activation()), data()
    x[7] = 0
    want = mlp(x).isnan()
    assert want[7].all() and want.sum() == want.shape[1]
    compiled = rewritten(mlp)(x)
    ao_act24.sparsify_(mlp)
    for out in (compiled, mlp(x)):
        assert torch.equal(out.isnan(), want)


@pytest.mark.parametrize(
    "change, given, message",
    [
        (
            lambda mlp: None,
            {"dtype": torch.float16},
            r"the input became torch\.float16, in fp8 it must be torch\.bfloat16",
        ),
        (lambda mlp: mlp.down.bias.data.__class__, {"dtype": torch.float32}, r"the input became torch\.float32"),
        (
            lambda mlp: setattr(mlp.down, "bias", nn.Parameter(mlp.down.bias.half())),
            {},
            r"down\.bias became torch\.float16",
        ),
        (
            lambda mlp: setattr(
                mlp.down, "weight", nn.Parameter(activation(hp_value_ub=1.0)(torch.ones(64, 256).to(BF16)), False)
            ),
            {},
            "down.weight is in fp8, but the activation's scale is bounded",
        ),
    ],
    ids=["fp16 input", "fp32 input", "fp16 bias", "a bounded weight"],
)
def test_other_dtypes_after_sparsify_run_dense(change, given, message):
    mlp, x = dense_mlp(), data(**given)
    ao_act24.sparsify_(mlp, FP8)
    change(mlp)
    try:
        want = type(mlp).forward(mlp, x)
    except RuntimeError:
        want = None  # nor does torchao take it
    with pytest.warns(Act24Warning, match=message):
        if want is None:
            with pytest.raises(RuntimeError):
                mlp(x)
        else:
            assert torch.equal(mlp(x), want)


def test_autocast():
    """torchao's tensors ignore it."""
    mlp, x = convert(dense_mlp()), data()
    want = oracle(mlp, x)
    with torch.autocast("cpu", BF16):
        assert relative_error(rewritten(mlp)(x), want) < 0.03, "x is rounded to fp8 otherwise"
        assert reason(dense_mlp(), data(dtype=torch.float32), EMULATED) == (
            "the input must have the dtype of the result, as torchao ignores autocast, got torch.float32"
        )


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_operators_ignore_autocast(dtype):
    """The sums of the reference do not fit in fp16."""
    x, up, down = (torch.full(size, 448.0).to(torch.float8_e4m3fn) for size in ((4, 64), (64, 64), (8, 64)))
    scales = [torch.full(t.shape[:1], 1 / 64) for t in (x, up, down)]
    packed = ops_fp8.relu2_sparsify_fp8(torch.ones(4, 64).to(BF16))

    def run():
        yield from ops_fp8.linear_relu2_sparsify_fp8(x, scales[0], up, scales[1], None, torch.float16)
        yield ops_fp8.sparse_mm_fp8(*packed, down, scales[2], None, BF16)
        yield ops_fp8.active_ffn_fp8(x, scales[0], up, scales[1], None, down, scales[2] * 1e-6, None, BF16)

    want = list(run())
    with torch.autocast("cpu", dtype):
        got = list(run())
    assert all(torch.equal(a.float(), b.float()) and b.float().isfinite().all() for a, b in zip(got, want))


@pytest.mark.parametrize("why", ["slower here", ""])
def test_nothing_is_converted_that_would_stay_dense_for_another_reason(why, monkeypatch):
    """What sparsify_ asks at last is whether the weights are in fp8."""
    monkeypatch.setattr(importlib.import_module("ao_act24.passes.judge"), "why_dense", lambda *_: why)
    mlp = dense_mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Act24Warning)
        ao_act24.sparsify_(mlp, FP8)
    assert isinstance(mlp.down.weight, Float8Tensor) == isinstance(mlp.up.weight, Float8Tensor) == (not why)
    if why:
        assert reason(mlp, data(), FP8) == why


def test_only_the_second_bias_is_trained():
    mlp = convert(dense_mlp()).requires_grad_(False)
    mlp.down.bias.requires_grad_()
    with torch.enable_grad():
        assert reason(mlp, data()) == "fp8 has no gradients: in 2:4 it runs under torch.no_grad()"


def test_a_product_with_a_transposed_weight():
    mlp, x = convert(dense_mlp()), data()
    mlp.down.bias = None
    got = rewritten(lambda x: F.relu(mlp.up(x)).square() @ mlp.down.weight.t())(x)
    assert relative_error(got, oracle(mlp, x)) <= CLOSE


def test_state_dict_is_saved_and_loaded():
    mlp, x = dense_mlp(), data()
    ao_act24.sparsify_(mlp, FP8)
    file = io.BytesIO()
    torch.save(mlp.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    converted = dense_mlp()
    ao_act24.sparsify_(converted, FP8)
    assert not torch.equal(converted(x), mlp(x))
    converted.load_state_dict(state)
    assert torch.equal(converted(x), mlp(x))
    dense = dense_mlp()
    dense.load_state_dict(state, assign=True)
    ao_act24.sparsify_(dense)
    assert torch.equal(dense(x), mlp(x))


def test_what_changes_after_sparsify_runs_dense():
    x = data()
    mlp = dense_mlp()
    ao_act24.sparsify_(mlp, FP8)
    with torch.enable_grad(), pytest.warns(Act24Warning, match="fp8 has no gradients: in 2:4 .*: MLP runs dense"):
        assert torch.equal(mlp(x), type(mlp).forward(mlp, x))
    plain = nn.Parameter(mlp.down.weight.dequantize())
    mlp.down.weight = plain
    with pytest.warns(Act24Warning, match="down.weight became a Parameter"):
        assert torch.equal(mlp(x), type(mlp).forward(mlp, x))
    later = dense_mlp()
    ao_act24.sparsify_(later)
    convert(later)
    with pytest.warns(Act24Warning, match="down.weight became a Float8Tensor"):
        assert torch.equal(later(x), type(later).forward(later, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error", Act24Warning)
        assert torch.equal(torch.compile(later, backend="aot_eager")(x), later(x))


def test_measure():
    """fp8 alone, 2:4 alone, both: of a model in 16 bits as it would be, and of one in fp8 as it is."""
    mlp, x = dense_mlp(shift=-1.28), data(256)
    converted = convert(copy.deepcopy(mlp))
    (layer,) = ao_act24.measure(mlp, x, config=FP8).layers
    exact, dense, sparse = mlp(x), converted(x), rewritten(converted)(x)
    assert layer.error == pytest.approx(relative_error(sparse, dense))
    assert layer.fp8_error == pytest.approx(relative_error(dense, exact))
    assert layer.fp8_error_in_24 == pytest.approx(relative_error(sparse, exact))
    assert 0 < layer.error < layer.fp8_error, "at 90 % zeros 2:4 adds less than fp8 itself"
    assert 0.88 < layer.zeros < 0.92
    (now,) = (after := ao_act24.measure(converted, x)).layers
    assert (now.error, now.zeros, now.dropped) == (layer.error, layer.zeros, layer.dropped)
    same_weights = copy.deepcopy(mlp)
    for linear, in_fp8 in ((same_weights.up, converted.up), (same_weights.down, converted.down)):
        linear.weight = nn.Parameter(in_fp8.weight.dequantize())
    assert now.fp8_error == pytest.approx(relative_error(dense, same_weights(x))), "of what its weights stand for"
    assert 0.5 * layer.fp8_error < now.fp8_error < layer.fp8_error
    whole = ao_act24.measure(mlp, x, config=FP8, loss=lambda out: out.float().square().mean())
    assert whole.layers[0].tokens == 256, "counted once"
    assert whole.error_in_16_bits == pytest.approx(relative_error(sparse, exact))
    assert whole.loss_in_16_bits == pytest.approx(float(exact.float().square().mean()))
    assert whole.output_error == pytest.approx(layer.error) and "over 16 bits" in str(whole)
    assert after.error_in_16_bits is None and after.loss_in_16_bits is None
    assert "fp8 alone" in str(after) and "across tokens" not in str(after)
    ao_act24.sparsify_(converted)
    assert ao_act24.measure(converted, x).layers[0].error == layer.error
    already = ao_act24.measure(converted, x, config=FP8)
    assert already.error_in_16_bits is None and already.loss_in_16_bits is None, "it is in fp8 as it is called"
    (sixteen,) = ao_act24.measure(mlp, x).layers
    assert sixteen.fp8_error is None and sixteen.fp8_error_in_24 is None


def test_config():
    with pytest.raises(ValueError, match=r'dtype must be None or "fp8", got torch\.bfloat16'):
        Act24Config(dtype=BF16)
    with pytest.raises(ValueError, match=r'weight_grads must be "dense" with dtype "fp8".* got "sparse"'):
        Act24Config(dtype="fp8", weight_grads="sparse")
