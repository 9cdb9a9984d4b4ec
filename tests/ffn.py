"""Small FFN modules for the tests of ``sparsify_``, and what to compare of them."""

import copy
import warnings

import torch
import torch.nn.functional as F
from oracle import ReLU2In24, relative_error, relu2_24
from torch import nn

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
