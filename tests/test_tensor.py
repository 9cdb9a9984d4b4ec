"""Sparse24Tensor: what it can do, what it refuses, and its conversions."""

import io
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchao
from oracle import relu2_24

import ao_act24
from ao_act24 import Sparse24Tensor
from ao_act24.kernels import layout


@pytest.fixture
def h():
    return torch.randn(64, 128)


W, B = torch.randn(32, 128), torch.randn(32)


def test_from_and_to_dense(h):
    dense = relu2_24(h)
    assert torch.equal(Sparse24Tensor.from_hidden(h).to_dense(), dense)
    assert torch.equal(Sparse24Tensor.from_dense(dense).to_dense(), dense)
    pruned = Sparse24Tensor.from_dense(h, prune=True).to_dense()
    assert torch.equal(pruned, torch.where(pruned != 0, h, 0)) and (pruned != 0).sum() == h.numel() // 2
    three = Sparse24Tensor.from_hidden(h.view(4, 16, 128))
    assert three.shape == (4, 16, 128) and torch.equal(three.to_dense().view(64, 128), dense)


def test_from_dense_loses_nothing_unasked(h):
    with pytest.raises(ValueError, match=r"at most two non-zeros .* got \d+ too many: prune=True"):
        Sparse24Tensor.from_dense(h)
    with pytest.raises(ValueError, match="by 4, got 6"):
        Sparse24Tensor.from_dense(torch.zeros(2, 6))
    with pytest.raises(TypeError, match="int64"):
        Sparse24Tensor.from_dense(torch.zeros(2, 4, dtype=torch.int64))


PRODUCTS = {
    "linear": lambda s: F.linear(s, W, B),
    "linear without bias": lambda s: F.linear(s, W),
    "mm": lambda s: torch.mm(s, W.t()),
    "method mm": lambda s: s.mm(W.t()),
    "matmul": lambda s: torch.matmul(s, W.t()),
    "@": lambda s: s @ W.t(),
    "addmm": lambda s: torch.addmm(B, s, W.t()),
    "addmm without the summand": lambda s: torch.addmm(torch.full((64, 32), torch.nan), s, W.t(), beta=0),
    "addmm scaled": lambda s: torch.addmm(torch.ones(64, 32), s, W.t(), beta=2, alpha=0.5),
    "addmm of one number": lambda s: torch.addmm(torch.ones(1), s, W.t()),
    "addmm of a column": lambda s: torch.addmm(torch.ones(64, 1), s, W.t()),
    "method addmm": lambda s: torch.ones(64, 32).addmm(s, W.t()),
    "transposed twice": lambda s: s.t().t() @ W.t(),
    "right of @, transposed": lambda s: W @ s.t(),
    "right of mm, transposed": lambda s: torch.mm(W, s.transpose(0, 1)),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("grad", [False, True])
def test_products(h, product, grad):
    sparse, dense = Sparse24Tensor.from_hidden(h), relu2_24(h)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(product(sparse), product(dense))


def test_gradients_reach_values_and_operands(h):
    h.requires_grad_()
    weight, bias = W.clone().requires_grad_(), B.clone().requires_grad_()
    got = torch.autograd.grad(F.linear(Sparse24Tensor.from_hidden(h), weight, bias).sum(), (h, weight, bias))
    want = torch.autograd.grad(F.linear(relu2_24(h), weight, bias).sum(), (h, weight, bias))
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w)
    leaf = torch.randn(4, 8, requires_grad=True)
    (Sparse24Tensor.from_dense(leaf, prune=True).to_dense() * 3).sum().backward()
    assert (leaf.grad != 0).sum() == 16


@pytest.mark.parametrize(
    "copy", [lambda s: s.clone(), lambda s: s.to(torch.float64).float(), lambda s: s.bfloat16().float(), torch.clone]
)
def test_gradients_pass_copies_and_casts(h, copy):
    h.requires_grad_()
    (got,) = torch.autograd.grad(F.linear(copy(Sparse24Tensor.from_hidden(h)), W).sum(), h)
    (want,) = torch.autograd.grad(F.linear(relu2_24(h), W).sum(), h)
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-4)


def test_tensor_protocol(h):
    s = Sparse24Tensor.from_hidden(h)
    assert (s.shape, s.dtype, s.device.type, s.requires_grad) == ((64, 128), torch.float32, "cpu", False)
    assert repr(s) == "Sparse24Tensor(shape=(64, 128), dtype=torch.float32, device=cpu)"
    assert "transposed" in repr(s.t()) and s.t().shape == (128, 64)
    for transposed in (s.t(), s.T, s.mT, s.permute(1, 0), s.transpose(-1, 0)):
        assert torch.equal(transposed.to_dense(), s.to_dense().t())
    for same in (s.detach(), s.clone(), s.to("cpu"), s.contiguous()):
        assert type(same) is Sparse24Tensor and torch.equal(same.to_dense(), s.to_dense())
    for copy in (s.clone(), s.to(s.dtype, copy=True)):
        assert copy.packed.data_ptr() != s.packed.data_ptr() and copy.metadata.data_ptr() != s.metadata.data_ptr()
    assert torch.equal(s.to(torch.bfloat16).to_dense(), s.to_dense().bfloat16())
    assert s.bfloat16().dtype == s.to(dtype=torch.bfloat16).packed.dtype == torch.bfloat16
    assert s.to("meta").packed.is_meta
    names, context = s.__tensor_flatten__()
    again = Sparse24Tensor.__tensor_unflatten__({n: getattr(s, n) for n in names}, context, s.shape, s.stride())
    assert torch.equal(again.to_dense(), s.to_dense())


@pytest.mark.parametrize("transposed", [False, True])
def test_save_and_load(h, transposed):
    s = Sparse24Tensor.from_hidden(h.bfloat16())
    s, file = s.t() if transposed else s, io.BytesIO()
    torch.save({"y": s}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["y"]
    assert type(loaded) is Sparse24Tensor and torch.equal(loaded.to_dense(), s.to_dense())


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda s: s + 1, "aten.add.Tensor"),
        (lambda s: torch.relu(s), "aten.relu.default"),
        (lambda s: s.sum(), "aten.sum"),
        (lambda s: s[0], "aten.select.int"),
        (lambda s: s.view(-1), "aten.view"),
        (lambda s: torch.bmm(s[None], s[None]), "aten.unsqueeze"),
        (lambda s: F.linear(W, s), "F.linear as a weight"),
        (lambda s: s.t() @ torch.ones(64, 2), "product"),
        (lambda s: s @ s.t(), "product"),
        (lambda s: s.share_memory_(), "share_memory_"),
        (lambda s: torch.addmm(s, torch.ones(64, 2), torch.ones(2, 128)), "sparse summand"),
        (lambda s: torch.mm(s, W.t(), out=torch.empty(64, 32)), "out="),
        (lambda s: torch.addmm(B, s, W.t(), out=torch.empty(64, 32)), "out="),
        (lambda s: torch.from_dlpack(s), "__dlpack_"),
        (lambda s: s.__dlpack__(), "__dlpack__"),
    ],
)
def test_unsupported_operations_say_so(h, call, name):
    with pytest.raises(NotImplementedError, match=f"does not support .*{name}.*to_dense"):
        call(Sparse24Tensor.from_hidden(h))


def test_products_refuse_what_torch_refuses(h):
    with pytest.raises(NotImplementedError, match="mm of 3 and 2 dimensions: it takes two matrices"):
        torch.mm(Sparse24Tensor.from_hidden(h[None]), W.t())
    with pytest.raises(ValueError, match=r"input must have the dtype of mat1, torch\.float32, got torch\.float64"):
        torch.addmm(B.double(), Sparse24Tensor.from_hidden(h), W.t())
    with pytest.raises(NotImplementedError, match="addmm of 3 and 2 dimensions"):
        torch.addmm(B, Sparse24Tensor.from_hidden(h[None]), W.t())
    with pytest.raises(RuntimeError, match="expand"):
        torch.addmm(torch.ones(2, 64, 32), Sparse24Tensor.from_hidden(h), W.t())
    for swap in (lambda s: s.transpose(3, 2), lambda s: s.permute(3, 2)):
        with pytest.raises(IndexError, match="Dimension out of range"):
            swap(Sparse24Tensor.from_hidden(h))


def test_dtypes_and_other_tensors_as_targets(h):
    s = Sparse24Tensor.from_hidden(h.bfloat16())
    for cast in (lambda s: s.to(torch.int32), lambda s: s.int(), lambda s: s.type_as(torch.ones(1, dtype=torch.int32))):
        with pytest.raises(TypeError, match=r"dtype must be bfloat16, .* or float64, got torch\.int32"):
            cast(s)
    x = torch.randn(2, requires_grad=True)
    assert x.to(s).dtype == torch.bfloat16 and type(x.to(s)) is torch.Tensor and x.to(s).requires_grad
    assert Sparse24Tensor.from_hidden(h).to(s).dtype == s.to(x).to(s).dtype == torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
@pytest.mark.parametrize("move", [lambda s: s.cuda(), lambda s: s.to("cuda")])
def test_cuda_is_refused_without_a_gpu(h, move):
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        move(Sparse24Tensor.from_hidden(h))


def test_bad_parts_are_refused(h):
    packed, metadata = ao_act24.ops.relu2_sparsify(h)
    with pytest.raises(ValueError, match="metadata"):
        Sparse24Tensor(packed, metadata[:1])
    with pytest.raises(ValueError, match="two dimensions"):
        Sparse24Tensor(packed.view(4, 16, -1), metadata, True)


def build_inside(h):
    return F.linear(Sparse24Tensor.from_hidden(h), W, B)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_inside_compile(h, backend):
    s = Sparse24Tensor.from_hidden(h)
    want = F.linear(s.to_dense(), W, B)
    torch.testing.assert_close(torch.compile(build_inside, backend=backend, fullgraph=True)(h), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch would warn of a subclass without a stable hash
        compiled = torch.compile(lambda s: (F.linear(s, W, B), s @ W.t()), backend=backend, fullgraph=True)
        linear, product = compiled(s)
    torch.testing.assert_close(linear, want)
    torch.testing.assert_close(product, want - B)


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_semi_structured_round_trip(h, dtype):
    s = Sparse24Tensor.from_hidden(h.to(dtype))
    theirs = s.to_torch()
    assert isinstance(theirs, torch.sparse.SparseSemiStructuredTensor)
    assert torch.equal(theirs.to_dense(), s.to_dense())
    assert torch.equal(Sparse24Tensor.from_torch(theirs).to_dense(), s.to_dense())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda h: Sparse24Tensor.from_hidden(h), "bfloat16 or float16, got torch.float32"),
        (lambda h: Sparse24Tensor.from_hidden(h.half()[:30]), r"\(32, 64\), got \(30, 128\)"),
        (lambda h: Sparse24Tensor.from_hidden(h.half()).t(), "no transpose"),
        (lambda h: Sparse24Tensor.from_hidden(h.half().view(2, 32, 128)), "two dimensions"),
    ],
)
def test_torch_semi_structured_limits(h, make, message):
    with pytest.raises(ValueError, match=message):
        make(h).to_torch()


def test_conversions_refuse_other_types(h):
    with pytest.raises(TypeError, match="SparseSemiStructuredTensor, got Tensor"):
        Sparse24Tensor.from_torch(h)


has_float8_sparse = tuple(int(x) for x in torchao.__version__.split(".")[:2]) >= (0, 18)


@pytest.mark.skipif(not has_float8_sparse, reason="torchao 0.17 has no Float8Sparse2x4_2DData2DMetadataTensor")
def test_torchao_float8_round_trip(h):
    s = Sparse24Tensor.from_hidden(h.bfloat16())
    theirs = s.to_torchao()
    assert type(theirs).__name__ == "Float8Sparse2x4_2DData2DMetadataTensor" and theirs.shape == s.shape
    assert torch.equal(theirs.scale.flatten(), s.packed.float().amax(-1) / 448)
    assert torch.equal(layout.from_rows(layout.from_cutlass_sm90_fp8(theirs.sparse_metadata)), s.metadata)
    back = Sparse24Tensor.from_torchao(theirs)
    assert torch.equal(back.metadata, s.metadata)
    torch.testing.assert_close(back.packed, s.packed, rtol=2**-3, atol=float(theirs.scale.max()) * 2**-9)
    twice = Sparse24Tensor.from_torchao(back.to_torchao())
    torch.testing.assert_close(twice.packed, back.packed, rtol=2**-7, atol=0)
    zero = Sparse24Tensor.from_dense(torch.zeros(64, 128)).to_torchao()
    assert Sparse24Tensor.from_torchao(zero).packed.abs().sum() == 0
    with pytest.raises(ValueError, match=r"\(64, 128\), got \(32, 128\)"):
        Sparse24Tensor.from_hidden(h[:32]).to_torchao()
    with pytest.raises(TypeError, match="got Tensor"):
        Sparse24Tensor.from_torchao(h)


@pytest.mark.skipif(has_float8_sparse, reason="only older torchao lacks the class")
def test_torchao_too_old(h):
    with pytest.raises(NotImplementedError, match=r"torchao >= 0\.18"):
        Sparse24Tensor.from_hidden(h).to_torchao()
