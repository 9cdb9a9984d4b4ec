"""A small FFN for tests of compilation, and its outputs and gradients against the oracle."""

import torch
import torch.nn.functional as F
from oracle import relative_error, relu2_24
from torch import nn


class MLP(nn.Module):
    def __init__(self, activation=lambda h: F.relu(h).square(), dim=16, hidden=32):
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(dim, hidden), nn.Linear(hidden, dim), activation

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


class Residual(MLP):
    def forward(self, x):
        return x + super().forward(x)


def oracle(mlp, x):
    return mlp.down(relu2_24(mlp.up(x)))


def check(compiled, mlp, x):
    """Output and all gradients against the oracle, and that the oracle differs from the dense model."""
    x = x.requires_grad_()
    leaves = [x, *mlp.parameters()]
    got, want = compiled(x), oracle(mlp, x)
    assert relative_error(mlp(x), want) > 1e-3
    assert relative_error(got, want) < 1e-5
    got, want = (torch.autograd.grad(out.square().sum(), leaves) for out in (got, want))
    assert all(relative_error(g, w) < 1e-5 for g, w in zip(got, want))
