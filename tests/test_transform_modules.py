"""``sparsify_``: which modules it reaches, however their forward is written, and which it leaves alone."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from ffn import FFN, D, H, ReLU2, assert_bit_equal, assert_close, check, data, oracle, outcome
from oracle import relative_error, relu2_24
from torch import nn

from ao_act24 import Act24Warning, sparsify_, unsparsify_


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
