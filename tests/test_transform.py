"""``sparsify_``: the model's own modules in 2:4, in eager and under any compiler, and back again."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle import ReLU2In24, relative_error, relu2_24
from torch import nn
from torch.utils.checkpoint import checkpoint

import ao_act24
from ao_act24 import Act24Warning, sparsify_, unsparsify_

D, H = 8, 32


class ReLU2(nn.Module):
    def forward(self, h):
        return F.relu(h).square()


class FFN(nn.Module):
    def __init__(self, activation=None, bias=True, p=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(D, H, bias), nn.Linear(H, D, bias)
        self.activation, self.dropout = activation or ReLU2(), nn.Dropout(p)

    def forward(self, x):
        return self.down(self.dropout(self.activation(self.up(x))))


class Inline(FFN):
    """The activation is not a module, and so cannot be replaced by the oracle's; ``relu2`` can."""

    relu2 = staticmethod(lambda h: F.relu(h) ** 2)

    def forward(self, x):
        return self.down(self.relu2(self.up(x)))


class OracleInline(Inline):
    relu2 = staticmethod(relu2_24)


def data(*shape, grad=True, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(*(shape or (2, 6)), D).to(dtype).requires_grad_(grad)


def outcome(model, x, *args, **kwargs):
    """Output and gradients."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    model.zero_grad()
    out = model(x, *args, **kwargs)
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"out": out.detach(), "x": x.grad, **{name: grad.clone() for name, grad in gradients.items()}}


def assert_close(got, want, tolerance=1e-5):
    assert got.keys() == want.keys()
    for name in want:
        assert relative_error(got[name], want[name]) <= tolerance, name


def assert_bit_equal(got, want):
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def oracle(model):
    """A copy of ``model`` with the oracle's activation wherever a ``ReLU2`` is."""
    model = copy.deepcopy(model)
    unsparsify_(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ReLU2):
                setattr(parent, name, ReLU2In24())
    return model


def check(model, *args, x=None, sites=1, tolerance=1e-5, want=None, **kwargs):
    """``model``, not sparsified yet, must come out as ``want`` or the oracle of it does."""
    x = data() if x is None else x
    want = oracle(model) if want is None else want
    expected, dense = outcome(want, x, *args, **kwargs), outcome(copy.deepcopy(model), x, *args, **kwargs)
    assert relative_error(dense["out"], expected["out"]) > max(0.005, 3 * tolerance)  # or the test could not fail
    report = sparsify_(model)
    assert len(report.rewritten) == sites, report
    with warnings.catch_warnings():
        warnings.simplefilter("error", Act24Warning)
        assert_close(outcome(model, x, *args, **kwargs), expected, tolerance)
    return report


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)])
def test_forward_and_gradients(shape, bias, train):
    report = check(FFN(bias=bias).train(train), x=data(*shape))
    assert report.summary() == "1 of 1 FFN-like sites run in 2:4"


def test_inline_activation():
    check(Inline(), want=OracleInline())


def test_no_grad_and_inference_mode():
    model, x = FFN(), data(grad=False)
    want, dense = oracle(model)(x).detach(), model(x).detach()
    sparsify_(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert relative_error(model(x), want) <= 1e-5 < relative_error(dense, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(dtype):
    check(FFN().to(dtype), x=data(dtype=dtype), tolerance=1e-12 if dtype == torch.float64 else 1e-2)


def test_dtype_changed_afterwards():
    model = FFN()
    sparsify_(model)
    model.to(torch.float64)
    assert_close(outcome(model, data(dtype=torch.float64)), outcome(oracle(model), data(dtype=torch.float64)), 1e-12)


def test_autocast():
    model, x = FFN(), data()
    with torch.autocast("cpu", torch.bfloat16):
        check(model, x=x, tolerance=2e-2)
        assert model(x).dtype == torch.bfloat16


def test_state_is_untouched():
    model = FFN()
    keys, parameters, children = list(model.state_dict()), dict(model.named_parameters()), dict(model.named_modules())
    sparsify_(model)
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert dict(model.named_modules()) == children
    assert "sparse_mm" in inspect.getsource(model.forward)


def test_unsparsify():
    model, plain, x = FFN(), FFN(), data()
    sparsify_(model)
    assert not torch.equal(model(x), plain(x))
    assert unsparsify_(model) == 1
    assert "forward" not in vars(model)
    assert_bit_equal(outcome(model, x), outcome(plain, x))
    assert unsparsify_(model) == 0
    assert len(sparsify_(model).rewritten) == 1
    assert_close(outcome(model, x), outcome(oracle(plain), x))


def test_second_call_is_harmless():
    model, x = FFN(), data()
    sparsify_(model)
    once = outcome(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsify_(model)
    assert_bit_equal(outcome(model, x), once)
    assert unsparsify_(model) == 1
    assert_bit_equal(outcome(model, x), outcome(FFN(), x))


def test_second_call_does_not_claim_that_nothing_runs_in_24():
    model = FFN()
    sparsify_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Act24Warning)
        sparsify_(model)


def test_deepcopy_is_independent():
    model, x = FFN(), data()
    sparsify_(model)
    before = outcome(model, x)
    twin = copy.deepcopy(model)
    assert_bit_equal(outcome(twin, x), before)
    with torch.no_grad():
        twin.down.weight.mul_(2), twin.down.bias.zero_()
    assert_close(outcome(twin, x), outcome(oracle(twin), x))
    assert_bit_equal(outcome(model, x), before)
    unsparsify_(twin)
    assert not torch.equal(twin(x), oracle(twin)(x))
    assert_bit_equal(outcome(model, x), before)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [pickled, saved])
def test_pickled_module_loads_dense(through):
    model, x = FFN(), data()
    sparsify_(model)
    loaded = through(model)
    assert_bit_equal(outcome(loaded, x), outcome(FFN(), x))
    assert list(loaded.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("through", [pickled, saved])
def test_loaded_module_can_be_sparsified(through):
    model = FFN()
    sparsify_(model)
    check(through(model))


def test_load_state_dict():
    model, x, other = FFN(), data(), FFN()
    with torch.no_grad():
        other.up.weight.mul_(3), other.down.weight.neg_()
    sparsify_(model)
    assert not model.load_state_dict(other.state_dict()).missing_keys
    assert_close(outcome(model, x), outcome(oracle(other), x))
    meta = FFN().to("meta")
    sparsify_(meta)
    meta.load_state_dict(other.state_dict(), assign=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Act24Warning)  # decided on another device: dense
        assert_close(outcome(meta, x), outcome(other, x))


def test_dropout_switches_with_the_mode():
    model, plain, x = FFN(p=0.5).eval(), FFN(p=0.5), data()
    assert len(sparsify_(model).rewritten) == 1
    want = outcome(oracle(model), x)
    assert relative_error(outcome(plain.eval(), x)["out"], want["out"]) > 0.01
    for _ in range(2):
        assert_close(outcome(model.eval(), x), want)
        torch.manual_seed(5)
        got = outcome(model.train(), x)
        torch.manual_seed(5)
        assert_bit_equal(got, outcome(plain.train(), x))  # where dropout is active, the original runs


def test_dropout_in_training_is_reported():
    model, x = FFN(p=0.5).train(), data()
    report = sparsify_(model)  # no warning: in eval mode it runs in 2:4
    assert "dropout" in report.dense[0].reason and "eval mode" in report.dense[0].reason
    assert_close(outcome(model.eval(), x), outcome(oracle(FFN(p=0.5).eval()), x))


def test_monte_carlo_dropout():
    """Dropout in training mode inside a module in eval mode: the original runs, and says so once."""
    model, x = FFN(p=0.5).eval(), data()
    sparsify_(model)
    model.dropout.train()
    plain = FFN(p=0.5).eval()
    plain.dropout.train()
    torch.manual_seed(5)
    with pytest.warns(Act24Warning, match="dropout is not in the training mode"):
        got = outcome(model, x)
    torch.manual_seed(5)
    assert_bit_equal(got, outcome(plain, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    model.dropout.eval()
    assert_close(outcome(model, x), outcome(oracle(FFN().eval()), x))


def test_dropout_rate_changed():
    model, x = FFN(p=0.0).train(), data()
    sparsify_(model)
    model.dropout.p = 0.5
    plain = FFN(p=0.5).train()
    torch.manual_seed(5)
    with pytest.warns(Act24Warning, match="drops with p=0.5"):
        got = outcome(model, x)
    torch.manual_seed(5)
    assert_bit_equal(got, outcome(plain, x))


def test_hook_on_up_fires():
    model, seen = FFN(), []
    model.up.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    check(model)
    assert len(seen) == 3 and torch.equal(seen[0], seen[-1])  # oracle, dense, 2:4


def test_hook_on_up_after_sparsify():
    model, x, seen = FFN(), data(), []
    sparsify_(model)
    model.up.register_forward_hook(lambda module, args, out: seen.append(out) or out + 1)
    assert_close(outcome(model, x), outcome(oracle(model), x))
    assert len(seen) == 2


HOOKS = {
    "forward": lambda module, seen: module.register_forward_hook(lambda *_: seen.append(1)),
    "forward pre": lambda module, seen: module.register_forward_pre_hook(lambda *_: seen.append(1)),
    "full backward": lambda module, seen: module.register_full_backward_hook(lambda *_: seen.append(1)),
    "full backward pre": lambda module, seen: module.register_full_backward_pre_hook(lambda *_: seen.append(1)),
}


@pytest.mark.parametrize("after", [True, False], ids=["hooked after", "hooked before"])
@pytest.mark.parametrize("name", ["activation", "dropout", "down"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hook_on_what_is_not_called_any_more(hook, name, after):
    """The hook fires, so the original runs."""
    model, x, seen = FFN(), data(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Act24Warning)
        if not after:
            HOOKS[hook](model.get_submodule(name), seen)
        sparsify_(model)
        if after:
            HOOKS[hook](model.get_submodule(name), seen)
        got = outcome(model, x)
    assert len(seen) == 1
    assert_bit_equal(got, outcome(FFN(), x))


def test_hook_on_the_activation_warns():
    model = FFN()
    sparsify_(model)
    model.activation.register_forward_hook(lambda *_: None)
    with pytest.warns(Act24Warning, match="activation has a hook: FFN runs dense"):
        model(data())


def patch_forward(module):
    original = module.forward
    module.forward = lambda *args: original(*args) + 1


@pytest.mark.parametrize("after", [True, False], ids=["patched after", "patched before"])
@pytest.mark.parametrize("name", ["up", "activation", "dropout", "down"])
def test_forward_of_a_part_is_patched(name, after):
    """As libraries do that load weights on demand: the patched forward must run."""
    model, x = FFN(), data()
    wanted = [FFN(), oracle(model)] if name == "up" else [FFN()]  # behind a patched up projection 2:4 is possible
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Act24Warning)
        if not after:
            patch_forward(model.get_submodule(name))
        sparsify_(model)
        if after:
            patch_forward(model.get_submodule(name))
        got = outcome(model, x)
    for want in wanted:
        patch_forward(want.get_submodule(name))
    assert min(relative_error(got["out"], outcome(want, x)["out"]) for want in wanted) <= 1e-5


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


REPLACEMENTS = {
    "other weights": lambda: nn.Linear(H, D),
    "without bias": lambda: nn.Linear(H, D, bias=False),
    "wider": lambda: nn.Linear(H, 3 * D),
    "subclass": lambda: Scaled(H, D),
    "sequence": lambda: nn.Sequential(nn.Linear(H, 4), nn.Linear(4, D)),
    "identity": nn.Identity,
}


@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_down_replaced(replacement):
    """2:4 where it is a plain linear layer, dense where it is not."""
    model, x = FFN(), data()
    sparsify_(model)
    model.down = REPLACEMENTS[replacement]()
    plain = copy.deepcopy(model)
    unsparsify_(plain)
    sparse = type(model.down) is nn.Linear
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = outcome(model, x)
    assert_close(got, outcome(oracle(model) if sparse else plain, x))
    assert [str(w.message) for w in caught] == (
        [] if sparse else [f"down was replaced after sparsify_, by a {type(model.down).__name__}: FFN runs dense"]
    )


def test_down_gets_a_bias():
    """2:4 or dense, but with the bias."""
    model, x = FFN(bias=False), data()
    sparsify_(model)
    model.down = nn.Linear(H, D, bias=True)
    model.down.bias.data.fill_(10.0)
    assert relative_error(model(x), oracle(model)(x)) < 0.1


def test_up_replaced():
    model, x = FFN(), data()
    sparsify_(model)
    model.up = nn.Sequential(nn.Linear(D, 4), nn.Linear(4, H))
    assert_close(outcome(model, x), outcome(oracle(model), x))


def test_hidden_size_changed():
    """To one that 2:4 cannot do: dense."""
    model, x = FFN(), data()
    sparsify_(model)
    model.up, model.down = nn.Linear(D, 18), nn.Linear(18, D)
    plain = FFN()
    plain.up, plain.down = model.up, model.down
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Act24Warning)
        assert torch.equal(model(x), plain(x))


def test_activation_replaced():
    model, x = FFN(), data()
    sparsify_(model)
    model.activation = nn.GELU()
    with pytest.warns(Act24Warning, match="activation was replaced after sparsify_, by a GELU"):
        got = outcome(model, x)
    assert_bit_equal(got, outcome(FFN(nn.GELU()), x))


def test_quantised_afterwards():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, plain, x = FFN(), FFN(), data(grad=False)
    sparsify_(model)
    for m in (model, plain):
        quantize_(m.down, Int8WeightOnlyConfig())
    with pytest.warns(Act24Warning, match=r"down\.weight became a"):
        assert torch.equal(model(x), plain(x))


class Optional(FFN):
    def forward(self, x, scale=None, *, skip=False, times=1.0):
        if x is None:
            return None
        out = self.down(self.activation(self.up(x))) * times
        if skip:
            out = out + x
        return out if scale is None else out * scale


@pytest.mark.parametrize("kwargs", [{}, {"scale": torch.full((), 2.0)}, {"skip": True}, {"times": 3.0}], ids=str)
def test_optional_arguments(kwargs):
    """In 2:4 where the defaults hold; with any other argument the original runs."""
    model, x = Optional(), data()
    report = sparsify_(model)
    assert len(report.rewritten) == 1
    want = oracle(model) if not kwargs else Optional()
    assert_close(outcome(model, x, **kwargs), outcome(want, x, **kwargs))
    assert model(None) is None
    assert_bit_equal({"": model(x, None)}, {"": model(x)})


class TwoInputs(FFN):
    def forward(self, x, residual):
        return residual - self.down(self.activation(self.up(x)))


def test_required_arguments():
    model, x, residual = TwoInputs(), data(), torch.ones(2, 6, D)
    check(model, residual)
    want = oracle(model)(x, residual)
    for got in (model(x=x, residual=residual), model(x, residual=residual), model(residual=residual, x=x)):
        assert relative_error(got, want) <= 1e-5
    for wrong in ((x,), (x, residual, residual)):
        with pytest.raises(TypeError):
            model(*wrong)
    with pytest.raises(TypeError):
        model(x, residual, unknown=1)


class KeywordOnly(FFN):
    def forward(self, x, scale=None, *, residual):
        return residual - self.down(self.activation(self.up(x)))


def test_keyword_only_argument():
    residual = torch.ones(2, 6, D)
    model = KeywordOnly()
    check(model, residual=residual)
    with pytest.raises(TypeError, match="residual"):
        model(data(), residual)


class NoInput(FFN):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(5, D))

    def forward(self):
        return self.down(self.activation(self.up(self.tokens)))


def test_no_arguments():
    model = NoInput()
    want = oracle(model)()
    sparsify_(model)
    assert relative_error(model(), want) <= 1e-5


class Branches(FFN):
    def forward(self, x):
        return self.down(self.activation(self.up(x if x.sum() > 0 else -x)))


class Variadic(FFN):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Remembers(FFN):
    """Keeps the activation in an attribute, as for an auxiliary loss."""

    last = None

    def __init__(self):
        super().__init__()
        self.kept = None

    def forward(self, x):
        self.kept = self.activation(self.up(x))
        return self.down(self.kept)


class Counts(FFN):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("kind", [Branches, Variadic])
def test_what_cannot_be_traced_stays(kind):
    model, x = kind(), data()
    with pytest.warns(Act24Warning, match="rewrote nothing: no Linear→ReLU²→Linear block could be traced"):
        assert not sparsify_(model).verdicts
    assert "forward" not in vars(model)
    assert_bit_equal(outcome(model, x), outcome(kind(), x))


def test_activation_kept_in_an_attribute():
    model, x = Remembers(), data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Act24Warning)
        sparsify_(model)
    model(x)
    assert isinstance(model.kept, torch.Tensor)
    assert torch.equal(model.kept, model.activation(model.up(x)))


def test_side_effects_on_attributes_stay():
    model, x = Counts(), data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Act24Warning)
        sparsify_(model)
    model(x), model(x)
    assert model.calls == 2


class Shadowed(FFN):
    """The pre-activation is a second result, and ReLU works in place on it."""

    def __init__(self, relu):
        super().__init__()
        self.relu = relu

    def forward(self, x):
        h = self.up(x)
        return self.down(self.relu(h).square()) + h.sum()


@pytest.mark.parametrize("relu", [nn.ReLU(inplace=True), nn.Threshold(0.0, 0.0, inplace=True)], ids=str)
def test_in_place_module_seen_by_others(relu):
    model, x = Shadowed(relu), data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Act24Warning)
        sparsify_(model)
    assert torch.equal(model(x), Shadowed(relu)(x))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def test_nothing_to_rewrite():
    model = Dense()
    with pytest.warns(Act24Warning, match="rewrote nothing: the activation is gelu, not relu²"):
        report = sparsify_(model)
    assert [v.reason for v in report] == ["the activation is gelu, not relu²"]
    assert "forward" not in vars(model)


class Raw(nn.Module):
    """Weights as raw parameters, ``[D, H]`` and ``[H, D]``, as Flax and GPT-2 keep them."""

    relu2 = staticmethod(lambda h: torch.relu(h) ** 2)

    def __init__(self, product):
        super().__init__()
        torch.manual_seed(0)
        self.w1, self.w2 = nn.Parameter(torch.randn(D, H) / 3), nn.Parameter(torch.randn(H, D) / 3)
        self.b1, self.b2 = nn.Parameter(torch.randn(H)), nn.Parameter(torch.randn(D))
        self.product = product

    def forward(self, x):
        return self.product(self.relu2(self.product(x, self.w1, self.b1)), self.w2, self.b2)


class OracleRaw(Raw):
    relu2 = staticmethod(relu2_24)


PRODUCTS = {
    "@": lambda x, w, b: x @ w + b,
    "linear": lambda x, w, b: F.linear(x, w.T, b),
    "addmm": lambda x, w, b: torch.addmm(b, x, w),
    "matmul": lambda x, w, b: torch.matmul(x, w) + b,
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_raw_parameters(product):
    check(Raw(PRODUCTS[product]), x=data(6), want=OracleRaw(PRODUCTS[product]))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.other = nn.Parameter(torch.randn(H, D)), nn.Parameter(torch.zeros(1, 1))
        self.activation = ReLU2()

    def forward(self, x):
        return F.linear(self.activation(F.linear(x, self.weight)), self.weight.t()) + self.other


def test_tied_weights():
    check(Tied())


def test_sequential():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, H), ReLU2(), nn.Dropout(0.1), nn.Linear(H, D)).eval()
    report = check(model)
    assert report.verdicts[0].path == ""


def test_chain_of_blocks_in_one_sequential():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, H), ReLU2(), nn.Linear(H, H), ReLU2(), nn.Linear(H, D))
    check(model, sites=2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Block(nn.Module):
    """Attention in a module, an FFN inline, and, with ``extra``, one more FFN in a module."""

    def __init__(self, extra=None):
        super().__init__()
        torch.manual_seed(0)
        self.norm1, self.norm2 = nn.RMSNorm(D), nn.LayerNorm(D)
        self.attention = Attention()
        self.up, self.activation, self.down = nn.Linear(D, H), ReLU2(), nn.Linear(H, D)
        self.extra = extra

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        x = x + self.down(self.activation(self.up(self.norm2(x))))
        return x if self.extra is None else x + self.extra(x)


def test_inline_in_a_block_with_attention():
    report = check(nn.Sequential(Block(), Block()), sites=2)
    assert [v.path for v in report] == ["0", "1"]


def test_ffn_modules_in_a_model():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.mlp = Attention(), FFN()

        def forward(self, x, mask=None):
            x = x + self.attention(x)
            return x + self.mlp(x)

    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Layer())
    report = check(model, sites=2)
    assert [v.path for v in report] == ["0.mlp", "1.mlp"]
    assert unsparsify_(model) == 2


@pytest.mark.parametrize("extra, sites", [(FFN, 2), (Dense, 1)])
def test_inline_beside_a_module(extra, sites):
    """A block's own FFN is found although a child of it holds one, too, whether that is rewritten or not."""
    check(Block(extra()), sites=sites)


def test_shared_module():
    ffn = FFN()
    model = nn.Sequential(ffn, nn.Linear(D, D), ffn)
    check(model)
    assert unsparsify_(model) == 1


def test_frozen_weights():
    model = FFN()
    model.down.requires_grad_(False)
    check(model)
    assert model.down.weight.grad is None


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.ffn = FFN()

        def forward(self, x):
            return checkpoint(self.ffn, x, use_reentrant=use_reentrant)

    check(Checkpointed())


def ops_in_graphs(model, x):
    """Runs ``model`` under torch.compile and returns the ATen graphs' targets."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    targets = []

    def compiler(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler), fullgraph=True)
    return compiled, targets


def test_compiled_afterwards():
    model, x = nn.Sequential(FFN(), FFN()), data()
    sparsify_(model)
    want = outcome(oracle(model), x)
    compiled, targets = ops_in_graphs(model, x)
    got = {name.removeprefix("_orig_mod."): tensor for name, tensor in outcome(compiled, x).items()}
    assert_close(got, want)
    counts = {op: targets.count(f"ao_act24.{op}.default") for op in ("relu2_sparsify", "sparse_mm", "sampled_mm")}
    assert counts == {"relu2_sparsify": 2, "sparse_mm": 2, "sampled_mm": 2}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor", "ao_act24"])
def test_compiled_by_backend(backend):
    model, x = FFN(), data(grad=False)
    sparsify_(model)
    want = oracle(model)(x).detach()
    torch._dynamo.reset()
    with torch.no_grad(), torch.profiler.profile() as profile:
        got = torch.compile(model, backend=backend, fullgraph=True)(x)
    assert relative_error(got, want) <= 1e-5
    assert "ao_act24::sparse_mm" in {event.key for event in profile.key_averages()}
    report = ao_act24.explain(model, x)
    assert [v.rewritten for v in report] == [True]


def test_falls_back_under_compile():
    model, x = FFN(p=0.5).eval(), data(grad=False)
    sparsify_(model)
    compiled, targets = ops_in_graphs(model, x)
    assert relative_error(compiled(x), oracle(model)(x)) <= 1e-5
    assert "ao_act24.sparse_mm.default" in targets
    targets.clear()
    model.train()
    compiled(x)
    assert targets and "ao_act24.sparse_mm.default" not in targets


@pytest.mark.parametrize(
    "wrong, type_name", [(torch.relu, "builtin"), (None, "NoneType"), ([FFN()], "list"), (FFN, "type")]
)
def test_not_a_module(wrong, type_name):
    with pytest.raises(TypeError, match=f"model must be a torch.nn.Module, got .*{type_name}"):
        sparsify_(wrong)


def test_compiled_already():
    with pytest.raises(TypeError, match="model must not be compiled yet"):
        sparsify_(torch.compile(FFN()))


def test_wrong_config():
    with pytest.raises(TypeError, match="emulate"):
        sparsify_(FFN(), ao_act24.Act24Config(emulate="yes"))


class NoGrad(FFN):
    def forward(self, x):
        with torch.no_grad():
            h = self.up(x)
        return self.down(self.activation(h))


class Autocast(FFN):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.down(self.activation(self.up(x)))


class Decorated(FFN):
    @torch.no_grad()
    def forward(self, x):
        return self.down(self.activation(self.up(x)))


class AsksForGradMode(FFN):
    def forward(self, x):
        return self.down(self.activation(self.up(x))) * (1 if torch.is_grad_enabled() else 3)


class ResidualInAddmm(FFN):
    def forward(self, x):
        return torch.addmm(x, self.activation(self.up(x)), self.down.weight.t())


class WiderZeros(FFN):
    def forward(self, x):
        h = self.up(x)
        return self.down(torch.maximum(h, h.new_zeros(3, 1, 1)).square())


@pytest.mark.parametrize("kind", [NoGrad, Autocast, Decorated, AsksForGradMode, ResidualInAddmm, WiderZeros])
def test_what_tracing_cannot_see_is_left_alone(kind):
    model, x = kind(), torch.randn(6, model_dim(kind))
    with pytest.warns(Act24Warning, match="rewrote nothing"):
        sparsify_(model)
    assert "forward" not in model.__dict__
    assert torch.equal(model(x), kind.forward(model, x))


def model_dim(kind):
    return kind().up.in_features


def test_functional_transforms_run_dense():
    model, plain = FFN(), FFN()
    plain.load_state_dict(model.state_dict())
    sparsify_(model)
    x = torch.randn(6, model.up.in_features)
    got, want = (torch.func.jvp(m, (x,), (torch.ones_like(x),))[1] for m in (model, plain))
    assert want.norm() > 0 and torch.equal(got, want)
    got, want = (torch.func.grad(lambda x, m=m: m(x).sum())(x) for m in (model, plain))
    assert torch.equal(got, want)
    compiled = torch.compile(lambda x: torch.func.grad(lambda x: plain(x).sum())(x), backend="ao_act24")
    assert_close({"": compiled(x)}, {"": want})
