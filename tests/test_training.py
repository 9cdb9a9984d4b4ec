"""The gradient of a whole FFN: what is saved, what is exact, and what 2:4 along tokens drops."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from mlp import Residual
from oracle import relative_error, relu2_24
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import ao_act24
from ao_act24 import Act24Config, autograd, ops
from ao_act24.kernels import reference

F64 = torch.float64
D, H = 16, 32


def operands(tokens=24, dtype=F64, hidden_dim=H, bias=True, shift=0.0):
    """x, up, up_bias, down, down_bias; ``shift`` moves the pre-activation: below zero, and there are more zeros."""
    shapes = [(tokens, D), (hidden_dim, D), (hidden_dim,), (D, hidden_dim), (D,)]
    made = [torch.randn(*shape).to(dtype) for shape in shapes]
    made[2] = made[2] + shift
    return [tensor.requires_grad_() if bias or tensor.dim() > 1 else None for tensor in made]


def want(x, up, up_bias, down, down_bias):
    return F.linear(relu2_24(F.linear(x, up, up_bias)), down, down_bias)


def gradients(function, inputs, grad):
    leaves = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    return torch.autograd.grad(function(*inputs), leaves, grad)


@pytest.mark.parametrize("feature_wise", [False, True])
@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=5))[:-1])
def test_only_what_is_asked_for(frozen, feature_wise):
    inputs = operands()
    for tensor, is_frozen in zip(inputs, frozen):
        tensor.requires_grad_(not is_frozen)
    grad = torch.randn(24, D, dtype=F64)
    got = gradients(lambda *a: ops.relu2_ffn(*a, feature_wise)[0], inputs, grad)
    exact = gradients(want, inputs, grad)
    for a, b in zip(got, exact):
        assert a.shape == b.shape and (feature_wise or relative_error(a, b) < 1e-12)


def members(group, tokens, permuted):
    """The tokens of a group, of whole fours: neighbours, or some 240 less than a quarter of all apart, or half a
    quarter; of the last ones a quarter of what that leaves over."""
    if not permuted:
        return [4 * group + i for i in range(4)]
    quarter = tokens // 4
    odd = [apart for apart in range(16, quarter + 1, 32) if apart - 16 <= quarter - min(240, quarter // 2)]
    first = odd[-1] if quarter >= 32 else 0
    begin, apart = (group, first) if group < first else (group + 3 * first, quarter - first)
    return [begin + i * apart for i in range(4)]


def oracle(y, dense, permuted, dense_features=()):
    """``y.T @ dense`` with two of every four tokens for each feature, one by one."""
    whole = y.shape[0] // 4 * 4
    kept = y.clone()
    for group in range(whole // 4):
        of_group = members(group, whole, permuted)
        for feature in set(range(y.shape[1])) - set(dense_features):
            order = sorted(range(4), key=lambda i: (-abs(float(y[of_group[i], feature])), i))
            for i in order[2:]:
                kept[of_group[i], feature] = 0
    assert torch.equal(kept[whole:], y[whole:])
    return kept.t() @ dense


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("tokens", [0, 3, 4, 7, 24, 41])
def test_feature_wise(tokens, permuted, monkeypatch):
    """The whole gradient of a weight against a loop: groups, the densest features, and tokens that make no four."""
    monkeypatch.setattr(autograd, "PERMUTED", permuted)
    packed, metadata = ops.relu2_sparsify(torch.randn(tokens, H, dtype=F64))
    hidden = packed.sqrt() * torch.randn_like(packed)  # a gradient: zero wherever y is
    x, grad = torch.randn(2, tokens, D, dtype=F64)
    y, dh = ops.unpack(packed, metadata), ops.unpack(hidden, metadata)
    for dense, counted, total in ((y, True, (y != 0).sum(0, dtype=torch.int32)), (dh, False, dh.sum(0))):
        _, _, totals, left = ops.feature_wise(*ops.sparsify(dense), permuted, counted)
        torch.testing.assert_close(totals, total)
        assert torch.equal(left[: tokens % 4], dense[tokens // 4 * 4 :])
        assert left.shape == (3, H) and not left[tokens % 4 :].any()
    densest = (y != 0).sum(0).sort(descending=True, stable=True).indices[:8]  # 5 % of 32, in whole eights
    grad_up, grad_up_bias, grad_down = autograd._feature_wise_grads(x, grad, hidden, packed, metadata, True, True, True)
    torch.testing.assert_close(grad_up, oracle(dh, x, permuted, densest.tolist()))
    torch.testing.assert_close(grad_down, oracle(y, grad, permuted, densest.tolist()).t())
    torch.testing.assert_close(grad_up_bias, dh.sum(0))


def test_without_a_split(monkeypatch):
    monkeypatch.setattr(autograd, "DENSE_SHARE", 0.0)
    inputs, grad = operands(), torch.randn(24, D, dtype=F64)
    got = gradients(lambda *a: ops.relu2_ffn(*a, True)[0], inputs, grad)
    assert all(g.shape == tensor.shape and g.isfinite().all() for g, tensor in zip(got, inputs))


def test_leading_dimensions():
    inputs = operands()
    cube = [inputs[0].detach().unflatten(0, (2, 3, 4)).requires_grad_(), *inputs[1:]]
    grad = torch.randn(24, D, dtype=F64)
    flat = gradients(lambda *a: ops.relu2_ffn(*a, True)[0], inputs, grad)
    got = gradients(lambda *a: ops.relu2_ffn(*a, True)[0], cube, grad.unflatten(0, (2, 3, 4)))
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(got, flat))


def test_sparse_enough_is_exact():
    """At most two of four tokens fire: nothing is dropped."""
    inputs = operands(tokens=64, shift=-20.0)
    x, _, up_bias = inputs[:3]
    x.data[:32] *= 0
    up_bias.data[:] = 0  # the first half of the tokens is zero, and of four tokens two are in it
    grad = torch.randn(64, D, dtype=F64)
    got = gradients(lambda *a: ops.relu2_ffn(*a, True)[0], inputs, grad)
    assert all(relative_error(*pair) < 1e-12 for pair in zip(got, gradients(want, inputs, grad)))


def dropped_share(y, permuted):
    """Of the energy of ``y``, what 2:4 along tokens drops."""
    packed, metadata = ops.sparsify(y)
    y = ops.unpack(packed, metadata)
    wise, _, _, left = ops.feature_wise(packed, metadata, permuted, True)
    return 1 - float((wise.square().sum() + left.square().sum()) / y.square().sum())


def test_permutation_on_correlated_tokens():
    """Each feature fires in runs of eight tokens: neighbours lose half of their entries, distant tokens little."""
    runs = (torch.rand(64, 256) < 0.1).repeat_interleave(8, dim=0)
    y = torch.rand(512, 256) * runs
    assert dropped_share(y, permuted=False) > 0.15 > 0.03 > dropped_share(y, permuted=True)


@pytest.mark.parametrize("tokens", [0, 4, 60, 124, 128, 132, 252, 508, 956, 1024, 1028, 1100, 1920, 4096, 16384])
def test_how_far_apart_the_tokens_of_a_group_are(tokens):
    """Each token is in one group."""
    groups = reference.in_groups(torch.arange(tokens), True)
    assert groups.tolist() == [members(group, tokens, True) for group in range(tokens // 4)]
    assert sorted(groups.flatten().tolist()) == list(range(tokens))


@pytest.mark.parametrize("length", [128, 192, 256, 320, 480, 512, 640, 768, 960, 1023, 1024, 1536, 2048, 4096])
def test_no_four_are_at_one_place(length):
    """Of any number of sequences, one after the other."""
    for sequences in range(1, 33):
        places = reference.in_groups(torch.arange(sequences * length // 4 * 4), True) % length
        assert not (places == places[:, :1]).all(1).any()


def test_no_four_are_at_one_place_where_sequences_lie_side_by_side():
    for sequences in (1, 2, 8, 32):
        places = reference.in_groups(torch.arange(sequences * 1024), True) // sequences
        assert not (places == places[:, :1]).all(1).any()


@pytest.mark.parametrize("shape", [(1100,), (2, 550), (4, 275)], ids=str)
def test_sequences(shape):
    """The whole gradient of a weight against a loop, of groups in both distances."""
    packed, metadata = ops.relu2_sparsify(torch.randn(*shape, H, dtype=F64))
    hidden, (x, grad) = packed.sqrt() * torch.randn_like(packed), torch.randn(2, *shape, D, dtype=F64)
    y, dh = (ops.unpack(each, metadata).reshape(-1, H) for each in (packed, hidden))
    densest = (y != 0).sum(0).sort(descending=True, stable=True).indices[:8].tolist()
    grad_up, _, grad_down = autograd._feature_wise_grads(x, grad, hidden, packed, metadata, True, True, True)
    torch.testing.assert_close(grad_up, oracle(dh, x.reshape(-1, D), True, densest))
    torch.testing.assert_close(grad_down, oracle(y, grad.reshape(-1, D), True, densest).t())


@pytest.mark.parametrize("length", [512, 1023, 1024])
def test_what_fires_at_one_place_of_every_sequence_is_kept(length):
    """Side by side or one after the other: nothing tells which."""
    places = torch.rand(8, length, 64, dtype=F64) * (torch.arange(length)[:, None] == 7 * torch.arange(64))
    assert dropped_share(places.flatten(0, 1), permuted=True) < 1e-12
    assert dropped_share(places.transpose(0, 1).flatten(0, 1), permuted=True) < 1e-12


def test_the_split_on_dense_features():
    """One feature of twenty always fires: with the split its gradient is exact."""
    packed, metadata = ops.relu2_sparsify(torch.where(torch.arange(160) % 20 == 3, 1.0, -1.0) * torch.rand(64, 160))
    dense = torch.randn(64, D)
    exact = dense.t() @ ops.unpack(packed, metadata)
    *_, split = autograd._feature_wise_grads(dense, dense, packed, packed, metadata, False, False, True)
    assert relative_error(split, exact) < 1e-6
    wise, codes, _, left = ops.feature_wise(packed, metadata, True, True)
    nothing, no_slots = dense[:0], torch.full((160,), -1, dtype=torch.int32)
    assert relative_error(ops.feature_wise_mm(wise, codes, left, dense, nothing, no_slots, True, True), exact) > 0.2


def test_when_every_feature_always_fires():
    """More than the split holds: of the rest half is lost. What comes out still points the same way."""
    inputs = operands(tokens=64, shift=20.0)
    grad = torch.randn(64, D, dtype=F64)
    exact, got = (gradients(lambda *a, how=how: ops.relu2_ffn(*a, how)[0], inputs, grad) for how in (False, True))
    assert all(torch.equal(got[i], exact[i]) for i in (0, 4)) and relative_error(got[2], exact[2]) < 1e-12
    for i in (1, 3):
        assert relative_error(got[i], exact[i]) > 0.1
        assert F.cosine_similarity(got[i].flatten(), exact[i].flatten(), dim=0) > 0.6


@pytest.mark.parametrize("feature_wise", [False, True])
def test_zeros_and_nan(feature_wise):
    inputs = operands(shift=-100.0)
    grad = torch.randn(24, D, dtype=F64)
    nothing = gradients(lambda *a: ops.relu2_ffn(*a, feature_wise)[0], inputs, grad)
    assert not any(g.any() for g in nothing[:4]) and torch.equal(nothing[4], grad.sum(0))
    inputs, grad[5, 3] = operands(), float("nan")
    got = gradients(lambda *a: ops.relu2_ffn(*a, feature_wise)[0], inputs, grad)
    assert got[0][5].isnan().all() and got[0][:5].isfinite().all() and got[0][6:].isfinite().all()
    assert all(g.isnan().any() for g in got[1:])


def test_a_token_does_not_see_later_ones():
    """Forward and back: only gradients of weights look across tokens."""
    inputs, grad = operands(), torch.randn(24, D, dtype=F64)
    out = ops.relu2_ffn(*inputs, True)[0]
    (dx, *_) = gradients(lambda *a: ops.relu2_ffn(*a, True)[0], inputs, grad)
    inputs[0].data[12:] = torch.randn(12, D)
    grad[12:] = torch.randn(12, D)
    assert torch.equal(ops.relu2_ffn(*inputs, True)[0][:12], out[:12])
    assert torch.equal(gradients(lambda *a: ops.relu2_ffn(*a, True)[0], inputs, grad)[0][:12], dx[:12])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("weight_grads", ["dense", "sparse"])
def test_what_is_saved(weight_grads, autocast):
    """A hidden element takes one byte of packed bf16 and an eighth of metadata. Else only rows of D are saved, and by
    autocast weights in bf16."""
    dtype = torch.float32 if autocast else torch.bfloat16
    ffn, x = Residual(dim=64, hidden=1024).to(dtype), torch.randn(256, 64, dtype=dtype, requires_grad=True)
    backend = ao_act24.Act24Backend(Act24Config(weight_grads=weight_grads))
    compiled, saved = torch.compile(ffn, backend=backend, fullgraph=True), {}

    def note(tensor):
        saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast("cpu", enabled=autocast):
            out = compiled(x)
        out.float().square().sum().backward()
    given = {tensor.data_ptr() for tensor in (x, *ffn.parameters())}
    more = [tensor for pointer, tensor in saved.items() if pointer not in given]
    weights = [tensor for tensor in more if sorted(tensor.shape) == [64, 1024]]
    assert len(weights) <= 2 * autocast
    rest = [tensor for tensor in more if tensor.shape != x.shape and not any(tensor is weight for weight in weights)]
    assert sum(tensor.nbytes for tensor in rest) == 256 * 1024 * 1.125
    assert sum(tensor.shape == x.shape for tensor in more) <= 2


@pytest.mark.parametrize("recompute", [False, True])
def test_training_steps(recompute):
    """Sparse gradients train: gradients accumulate, a fused optimiser steps, activations may be recomputed."""
    torch.manual_seed(0)
    ffns = nn.Sequential(Residual(), Residual())
    x, losses = torch.randn(4, 64, D), {}
    target = torch.tanh(x @ torch.randn(D, D))
    for weight_grads in ("dense", "sparse"):
        torch._dynamo.reset()
        torch.manual_seed(1)
        for ffn in ffns:
            ffn.up.reset_parameters(), ffn.down.reset_parameters()

        def forward(x):
            for ffn in ffns:
                x = checkpoint(ffn, x, use_reentrant=False) if recompute else ffn(x)
            return x

        model = torch.compile(forward, backend=ao_act24.Act24Backend(Act24Config(weight_grads=weight_grads)))
        optimiser = torch.optim.AdamW(ffns.parameters(), lr=1e-2, fused=True)
        for _ in range(30):
            for part in range(4):  # gradient accumulation
                F.mse_loss(model(x[part]), target[part]).div(4).backward()
            optimiser.step()
            optimiser.zero_grad()
        losses[weight_grads] = float(F.mse_loss(forward(x), target))
    assert losses["sparse"] < 0.3 and abs(losses["sparse"] - losses["dense"]) < 0.2 * losses["dense"] + 0.02
    assert losses["sparse"] != losses["dense"]


def test_any_number_of_tokens_is_one_graph():
    """From four on: fewer have no group. Against the operator called eagerly: sums are in another order."""
    torch._dynamo.reset()
    counters.clear()
    ffn, backend = Residual(), ao_act24.Act24Backend(Act24Config(weight_grads="sparse"))
    compiled = torch.compile(ffn, backend=backend, dynamic=True, fullgraph=True)
    for tokens in (24, 25, 26, 32, 7):
        x = torch.randn(tokens, D, requires_grad=True)
        leaves = [x, ffn.up.weight, ffn.up.bias, ffn.down.weight, ffn.down.bias]
        eager, exact = x + ops.relu2_ffn(*leaves, True)[0], x + want(*leaves)
        got, wanted, dense = (torch.autograd.grad(out.square().sum(), leaves) for out in (compiled(x), eager, exact))
        assert all(relative_error(*pair) < 1e-6 for pair in zip(got, wanted))
        assert relative_error(got[1], dense[1]) > 1e-3 or tokens < 24  # or the test could not fail
    assert counters["stats"]["unique_graphs"] == 1


def test_config():
    with pytest.raises(ValueError, match='weight_grads must be "dense" or "sparse", got True'):
        Act24Config(weight_grads=True)
    with pytest.raises(ValueError, match='must be "dense" for sparsify_'):
        ao_act24.sparsify_(Residual(), Act24Config(weight_grads="sparse"))
