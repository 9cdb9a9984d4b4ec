"""torch.ops.ao_act24: registration, gradients, autocast, errors."""

import itertools

import pytest
import torch
from oracle import mask24, relative_error, relu2_24

from ao_act24 import ops

F64 = torch.float64


def tensors(dtype=F64, tokens=(3, 5), hidden_dim=12, out_dim=7, requires_grad=True):
    def make(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_(requires_grad)

    h, weight, bias, grad = make(*tokens, hidden_dim), make(out_dim, hidden_dim), make(out_dim), make(*tokens, out_dim)
    packed, metadata = ops.relu2_sparsify(h.detach())
    return {
        "relu2_sparsify": (h,),
        "linear_relu2_sparsify": (grad, make(hidden_dim, out_dim), make(hidden_dim)),
        "sparsify": (h,),
        "gather": (h, metadata),
        "unpack": (packed.requires_grad_(requires_grad), metadata),
        "sparse_mm": (packed, metadata, weight, bias),
        "sampled_mm": (grad, weight, metadata),
        "relu2_ffn": (grad, make(hidden_dim, out_dim), make(hidden_dim), weight, bias, False),
    }


def without_gradients(dtype, tokens, hidden_dim, out_dim=7):
    """What the gradient of ``relu2_ffn`` is made of."""
    some = tensors(dtype, tokens, hidden_dim, out_dim, requires_grad=False)
    (packed, metadata), (grad, weight, _) = some["unpack"], some["sampled_mm"]
    rows = grad.reshape(-1, out_dim)
    wise, codes, counts, left = ops.feature_wise(packed, metadata, True, True)
    _, slots = ops.densest(counts, 2)
    return {
        "grad_hidden": (grad, weight, packed, metadata),
        "feature_wise": (packed, metadata, True, False),
        "densest": (counts, 3),
        "feature_wise_mm": (wise, codes, left, rows, rows.new_ones(2, out_dim), slots, True, True),
        "columns": (packed, metadata, torch.tensor([2, 0, 2])),
    }


NAMES = list(tensors())


@pytest.mark.parametrize("name", [*NAMES, *without_gradients(F64, (3, 5), 12)])
@pytest.mark.parametrize(
    "dtype, tokens, hidden_dim",
    [
        (torch.float32, (3, 5), 12),
        (torch.bfloat16, (4,), 16),
        (torch.float16, (), 8),
        (F64, (0,), 4),
        (F64, (2, 1, 3), 20),
    ],
)
def test_opcheck(name, dtype, tokens, hidden_dim):
    arguments = (tensors(dtype, tokens, hidden_dim) | without_gradients(dtype, tokens, hidden_dim))[name]
    torch.library.opcheck(getattr(torch.ops.ao_act24, name).default, arguments)


def test_opcheck_without_bias_and_with_strides():
    packed, metadata, weight, _ = tensors()["sparse_mm"]
    torch.library.opcheck(torch.ops.ao_act24.sparse_mm.default, (packed, metadata, weight))
    strided = torch.randn(12, 7, dtype=F64).t()
    torch.library.opcheck(torch.ops.ao_act24.sparse_mm.default, (packed, metadata, strided))
    rows = torch.randn(6, 24, dtype=F64)[::2, 4:16]
    torch.library.opcheck(torch.ops.ao_act24.relu2_sparsify.default, (rows,))


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    op = getattr(ops, name)

    def first(*args):
        result = op(*args)
        return result[0] if isinstance(result, tuple) else result

    arguments = tensors()[name]
    assert torch.autograd.gradcheck(first, arguments)
    if "relu2" not in name:
        assert torch.autograd.gradgradcheck(first, arguments)


@pytest.mark.parametrize("name", ["relu2_sparsify", "linear_relu2_sparsify", "relu2_ffn"])
def test_second_derivative_is_refused(name):
    arguments = tensors()[name]
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(getattr(ops, name)(*arguments)[0].sum(), arguments[0], create_graph=True)


@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=3)))
def test_frozen_arguments_get_no_gradient(frozen):
    packed, metadata, weight, bias = tensors()["sparse_mm"]
    inputs = (packed.detach(), weight.detach(), bias.detach())
    for tensor, is_frozen in zip(inputs, frozen):
        tensor.requires_grad_(not is_frozen)
    out = ops.sparse_mm(inputs[0], metadata, *inputs[1:])
    assert out.requires_grad == (not all(frozen))
    if out.requires_grad:
        out.sum().backward()
    assert [tensor.grad is None for tensor in inputs] == list(frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_equals_oracle(dtype):
    x, w1, w2 = (torch.randn(*shape, dtype=dtype) for shape in [(64, 32), (128, 32), (16, 128)])
    leaves = [t.requires_grad_() for t in (x, w1, w2)]
    h = torch.nn.functional.linear(x, w1)
    got = torch.autograd.grad(ops.sparse_mm(*ops.relu2_sparsify(h), w2).square().sum(), leaves)
    h = torch.nn.functional.linear(x, w1)
    want = torch.autograd.grad(torch.nn.functional.linear(relu2_24(h), w2).square().sum(), leaves)
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    assert all(relative_error(g, w) < bound for g, w in zip(got, want))
    got = torch.autograd.grad(ops.sparse_mm(*ops.linear_relu2_sparsify(x, w1), w2).square().sum(), leaves)
    assert all(relative_error(g, w) < bound for g, w in zip(got, want))


def test_bf16_error_is_no_larger_than_dense():
    """Error against fp64, of the 2:4 matmuls and of the dense bf16 ones on the same pruned input."""
    h, weight = torch.randn(256, 512).bfloat16(), torch.randn(128, 512).bfloat16()
    pruned, (packed, metadata) = relu2_24(h), ops.relu2_sparsify(h)
    exact = pruned.double() @ weight.double().t()
    dense = relative_error(pruned @ weight.t(), exact)
    assert 0 < relative_error(ops.sparse_mm(packed, metadata, weight), exact) <= dense * 1.01
    grad = torch.randn(256, 128).bfloat16()
    exact = (grad.double() @ weight.double()) * mask24(h)
    dense = relative_error((grad @ weight) * mask24(h), exact)
    sampled = ops.unpack(ops.sampled_mm(grad, weight, metadata), metadata)
    assert 0 < relative_error(sampled, exact) <= dense * 1.01


def test_root_of_the_square_is_relu_in_bf16():
    """What lets backward do without h: over every positive bf16 whose square neither overflows nor underflows."""
    h = torch.arange(0, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    h = h[(h > 2.0**-63) & (h < 2.0**63)]
    square = h.float().square().bfloat16()
    assert torch.equal(square.sqrt(), h)


def test_matmuls_are_deterministic():
    packed, metadata, weight, bias = tensors(torch.float32, (64,), 256, 64, False)["sparse_mm"]
    first = ops.sparse_mm(packed, metadata, weight, bias)
    assert all(torch.equal(ops.sparse_mm(packed, metadata, weight, bias), first) for _ in range(10))


def test_autocast():
    h = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        packed, metadata = ops.relu2_sparsify(h)
        assert packed.dtype == torch.float32  # a pointwise op keeps its input's dtype
        out = ops.sparse_mm(packed, metadata, torch.randn(6, 8), torch.randn(6))
        assert out.dtype == torch.bfloat16  # a matmul runs in autocast's, whatever mixture comes in
        assert ops.sparse_mm(packed.bfloat16(), metadata, torch.randn(6, 8)).dtype == torch.bfloat16
        assert ops.sampled_mm(torch.randn(4, 6), torch.randn(6, 8).bfloat16(), metadata).dtype == torch.bfloat16
        assert ops.sparse_mm(packed.double(), metadata, torch.randn(6, 8).double()).dtype == F64
    with torch.autocast("cpu", torch.float16):
        assert ops.sparse_mm(packed, metadata, torch.randn(6, 8)).dtype == torch.float16


NARROW = dict(tokens=(4,), hidden_dim=8, out_dim=6, requires_grad=False)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda p, m, w, b: ops.relu2_sparsify(torch.ones(2, 6)), ValueError, "last dimension of h .* by 4, got 6"),
        (lambda p, m, w, b: ops.relu2_sparsify(torch.ones(4, dtype=torch.int32)), TypeError, "h .* got torch.int32"),
        (lambda p, m, w, b: ops.relu2_sparsify(torch.tensor(1.0)), ValueError, "h .* one dimension"),
        (lambda p, m, w, b: ops.sparsify(torch.ones(2, 6)), ValueError, "dense .* got 6"),
        (lambda p, m, w, b: ops.sparse_mm(p, m, w[:, :4], b), ValueError, r"weight .* H = 8 .* \(6, 4\)"),
        (lambda p, m, w, b: ops.sparse_mm(p, m, w[0], b), ValueError, r"weight .* \(8,\)"),
        (
            lambda p, m, w, b: ops.sparse_mm(p, m, w.half(), b),
            TypeError,
            "weight .* packed, torch.float64, got torch.float16",
        ),
        (lambda p, m, w, b: ops.sparse_mm(p, m, w, b[:2]), ValueError, r"bias .* \(6,\) .* \(2,\)"),
        (lambda p, m, w, b: ops.sparse_mm(p, m, w, b.float()), TypeError, "bias .*float32"),
        (
            lambda p, m, w, b: ops.sparse_mm(p, m[:0], w, b),
            ValueError,
            r"metadata .* \(16, 32\) .* \(4, 8\), got \(0, 32\)",
        ),
        (lambda p, m, w, b: ops.sparse_mm(p, m.int(), w, b), TypeError, "metadata .* uint8, got torch.int32"),
        (lambda p, m, w, b: ops.sparse_mm(p[:, :3], m, w, b), ValueError, "packed .* even, got 3"),
        (lambda p, m, w, b: ops.sparse_mm(p, m, w.to("meta"), b), ValueError, "weight .* device .* cpu, got meta"),
        (lambda p, m, w, b: ops.unpack(p, m.repeat(1, 2)), ValueError, r"metadata .* \(16, 32\) .* got \(16, 64\)"),
        (lambda p, m, w, b: ops.gather(torch.ones(17, 12), m), ValueError, r"metadata .* \(32, 32\) .* \(17, 12\)"),
        (lambda p, m, w, b: ops.sampled_mm(torch.ones(4, 5, dtype=F64), w, m), ValueError, "weight .* D = 5"),
        (lambda p, m, w, b: ops.linear_relu2_sparsify(p, w), ValueError, r"weight .* 4 and D = 4 .* \(6, 8\)"),
        (lambda p, m, w, b: ops.linear_relu2_sparsify(p, w[:4, :4].half()), TypeError, "weight .* x, torch.float64"),
        (lambda p, m, w, b: ops.linear_relu2_sparsify(p, w[:4, :4], b), ValueError, r"bias .* \(4,\) .* \(6,\)"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(*tensors(**NARROW)["sparse_mm"])


def test_nan_and_infinity_pass_through():
    h = torch.tensor([[float("nan"), 1, 2, 3], [float("inf"), 1, 2, 3]])
    out = ops.sparse_mm(*ops.relu2_sparsify(h), torch.ones(1, 4))
    assert out[0].isnan() and out[1].isinf()


def test_nan_in_a_gradient_reaches_kept_entries_only():
    h = torch.tensor([[1.0, 2.0, 3.0, -1.0]], requires_grad=True)
    packed, metadata = ops.relu2_sparsify(h)
    ops.sparse_mm(packed, metadata, torch.ones(1, 4)).backward(torch.tensor([[float("nan")]]))
    assert h.grad.isnan().tolist() == [[False, True, True, False]]
    assert h.grad[0, 0] == 0
