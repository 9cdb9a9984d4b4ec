"""The fp8 operators: registration, errors, no gradients, what the compiler makes of them."""

import pytest
import torch
from torchao.quantization.quantize_ import workflows

from ao_act24 import fp8, ops_fp8

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
fp8_sparse_is_missing = not hasattr(workflows, "Float8Sparse2x4_2DData2DMetadataTensor")  # before torchao 0.18


def operands(tokens=(3, 5), hidden_dim=12, out_dim=7, dtype=BF16):
    packed, metadata, row_scale = ops_fp8.relu2_sparsify_fp8(torch.randn(*tokens, hidden_dim).to(dtype))
    weight, bias = torch.randn(out_dim, hidden_dim).to(E4M3), torch.randn(out_dim).to(dtype)
    return packed, metadata, row_scale, weight, torch.rand(out_dim), bias, dtype


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("tokens, hidden_dim", [((3, 5), 12), ((4,), 16), ((), 8), ((0,), 4)])
def test_opcheck(tokens, hidden_dim, dtype):
    """But for the schema's test, which computes with its arguments: there is no arithmetic on e4m3."""
    tests = {"test_utils": ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")}
    h = torch.randn(*tokens, hidden_dim).to(dtype)
    torch.library.opcheck(torch.ops.ao_act24.relu2_sparsify_fp8.default, (h,), **tests)
    arguments = operands(tokens, hidden_dim, dtype=dtype)
    torch.library.opcheck(torch.ops.ao_act24.sparse_mm_fp8.default, arguments, **tests)
    torch.library.opcheck(torch.ops.ao_act24.sparse_mm_fp8.default, (*arguments[:5], None, dtype), **tests)


def linear_operands(tokens=(3, 5), dim=12, hidden_dim=8, dtype=BF16):
    x, weight = torch.randn(*tokens, dim).to(E4M3), torch.randn(hidden_dim, dim).to(E4M3)
    return x, torch.rand(tokens), weight, torch.rand(hidden_dim), torch.randn(hidden_dim).to(dtype), dtype


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("tokens", [(3, 5), (4,), (), (0,)], ids=str)
def test_opcheck_of_the_first_matmul(tokens, dtype):
    tests = {"test_utils": ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")}
    arguments = linear_operands(tokens, dtype=dtype)
    op = torch.ops.ao_act24.linear_relu2_sparsify_fp8.default
    torch.library.opcheck(op, arguments, **tests)
    torch.library.opcheck(op, (*arguments[:4], None, dtype), **tests)


def test_the_first_matmul_is_the_packing_of_its_result():
    x, x_scale, weight, weight_scale, bias, dtype = linear_operands((7,), 32, 64)
    h = x.double() @ weight.double().t() * x_scale.double().unsqueeze(-1) * weight_scale.double() + bias.double()
    got = ops_fp8.linear_relu2_sparsify_fp8(x, x_scale, weight, weight_scale, bias, dtype)
    want = ops_fp8.relu2_sparsify_fp8(h.to(dtype))
    assert all(a.dtype == b.dtype and torch.equal(a.float(), b.float()) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "position, value, error, message",
    [
        (0, torch.zeros(3, 5, 12), TypeError, "x must have dtype float8_e4m3fn, got torch.float32"),
        (1, torch.ones(3, 5, 1), ValueError, "x_scale must have shape .3, 5., got .3, 5, 1."),
        (2, torch.zeros(8, 12), TypeError, "weight must have dtype float8_e4m3fn, got torch.float32"),
        (2, torch.zeros(8, 16).to(E4M3), ValueError, "weight must be .H, D. with H divisible by 4 and D as in x"),
        (
            2,
            torch.zeros(6, 12).to(E4M3),
            ValueError,
            "weight must be .H, D. with H divisible by 4 .* got shape .6, 12.",
        ),
        (3, torch.ones(8).double(), TypeError, "weight_scale must have dtype float32, got torch.float64"),
        (4, torch.ones(8), TypeError, "bias must have the dtype of h, torch.bfloat16, got torch.float32"),
        (5, torch.float32, TypeError, "dtype must be bfloat16 or float16, got torch.float32"),
        (1, torch.ones(3, 5, device="meta"), ValueError, "x_scale must be on the device of x, cpu, got meta"),
    ],
)
def test_errors_of_the_first_matmul(position, value, error, message):
    arguments = list(linear_operands())
    arguments[position] = value
    with pytest.raises(error, match=message):
        ops_fp8.linear_relu2_sparsify_fp8(*arguments)


NAMES = ("packed", "metadata", "row_scale", "weight", "weight_scale", "bias", "dtype")


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("packed", torch.zeros(3, 5, 6), TypeError, "packed must have dtype float8_e4m3fn, got torch.float32"),
        (
            "packed",
            torch.zeros(3, 5, 7).to(E4M3),
            ValueError,
            "packed must be .* H divisible by 4, got shape .3, 5, 7.",
        ),
        ("metadata", torch.zeros(16, 32), TypeError, "metadata must have dtype uint8, got torch.float32"),
        ("metadata", torch.zeros(15, 32, dtype=torch.uint8), ValueError, "metadata must have shape .16, 32."),
        ("row_scale", torch.ones(3, 5).double(), TypeError, "row_scale must have dtype float32, got torch.float64"),
        ("row_scale", torch.ones(3, 5, 1), ValueError, "row_scale must have shape .3, 5., got .3, 5, 1."),
        ("weight", torch.zeros(7, 12).to(BF16), TypeError, "weight must have dtype float8_e4m3fn, got torch.bfloat16"),
        ("weight", torch.zeros(7, 16).to(E4M3), ValueError, "weight must be .D, H. with H = 12 as in packed"),
        ("weight_scale", torch.ones(7, 1), ValueError, "weight_scale must have shape .7,., got .7, 1."),
        ("bias", torch.ones(7), TypeError, "bias must have the dtype of out, torch.bfloat16, got torch.float32"),
        ("bias", torch.ones(8).to(BF16), ValueError, "bias must have shape .7,. as weight has rows, got .8,."),
        ("dtype", torch.float32, TypeError, "dtype must be bfloat16 or float16, got torch.float32"),
        ("weight", torch.zeros(7, 12, device="meta").to(E4M3), ValueError, "weight must be on the device of packed"),
    ],
)
def test_errors_name_the_argument(name, value, error, message):
    arguments = dict(zip(NAMES, operands())) | {name: value}
    with pytest.raises(error, match=message):
        ops_fp8.sparse_mm_fp8(*arguments.values())


@pytest.mark.parametrize(
    "h, error, message",
    [
        (torch.zeros(3, 8), TypeError, "the dtype of h must be bfloat16 or float16, got torch.float32"),
        (torch.zeros(3, 6).to(BF16), ValueError, "the last dimension of h must be divisible by 4, got 6"),
        (torch.tensor(1.0).to(BF16), ValueError, "h must have at least one dimension, got a scalar"),
    ],
)
def test_errors_of_packing(h, error, message):
    with pytest.raises(error, match=message):
        ops_fp8.relu2_sparsify_fp8(h)


def test_no_gradient_is_no_silent_zero():
    h = torch.randn(4, 8).to(BF16).requires_grad_()
    packed, metadata, row_scale = ops_fp8.relu2_sparsify_fp8(h)
    weight = torch.ones(3, 8).to(E4M3)
    out = ops_fp8.sparse_mm_fp8(packed, metadata, row_scale, weight, torch.ones(3), None, BF16)
    with pytest.raises(NotImplementedError, match="the fp8 operators have no gradient: fp8 is for inference"):
        out.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    weight, scale, bias = torch.randn(7, 64).to(E4M3), torch.rand(7), torch.randn(7).to(BF16)

    def ffn(h):
        return ops_fp8.sparse_mm_fp8(*ops_fp8.relu2_sparsify_fp8(h * 2), weight, scale, bias, BF16) + 1

    compiled = torch.compile(ffn, fullgraph=True, dynamic=dynamic)
    for tokens in (3, 5, 8):
        h = torch.randn(2, tokens, 64).to(BF16)
        torch.testing.assert_close(compiled(h), ffn(h), rtol=2**-7, atol=1e-2)


def test_lossless_to_torchao_and_back():
    packed, metadata, scale = ops_fp8.relu2_sparsify_fp8(torch.randn(128, 512).to(BF16))
    if fp8_sparse_is_missing:
        with pytest.raises(NotImplementedError, match=r"torchao >= 0\.18"):
            fp8.to_torchao(packed, metadata, scale, BF16)
        return
    theirs = fp8.to_torchao(packed, metadata, scale, BF16)
    assert type(theirs).__name__ == "Float8Sparse2x4_2DData2DMetadataTensor"
    assert (theirs.shape, theirs.dtype) == ((128, 512), BF16) and torch.equal(theirs.scale, scale.unsqueeze(-1))
    back = fp8.from_torchao(theirs)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(back, (packed, metadata, scale)))
    for tokens, hidden_dim in ((32, 512), (64, 64)):
        with pytest.raises(ValueError, match=rf"divisible by \(64, 128\), got \({tokens}, {hidden_dim // 2}\)"):
            fp8.to_torchao(*ops_fp8.relu2_sparsify_fp8(torch.randn(tokens, hidden_dim).to(BF16)), BF16)
    with pytest.raises(TypeError, match="got Tensor"):
        fp8.from_torchao(packed)
