"""On a GPU: dense with a reason where there is no kernel, exact in emulation, and torchao's own kernel as an oracle.

python -m pytest tests/test_cuda.py
"""

import pytest
import torch
import torch.nn.functional as F
import torchao
from oracle import relative_error, relu2_24
from torch import nn
from torch._inductor.utils import fresh_cache

import ao_act24
from ao_act24 import Act24Config, Act24Warning, Sparse24Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
EMULATE = {"act24": Act24Config(emulate=True)}


class MLP(nn.Module):
    def __init__(self, dim=64, hidden=256):
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


def oracle(mlp, x):
    return mlp.down(relu2_24(mlp.up(x)))


def test_dense_with_a_reason():
    mlp, x = MLP().cuda(), torch.randn(32, 64, device="cuda")
    (verdict,) = ao_act24.explain(mlp, x)
    assert not verdict.rewritten and "the 2:4 kernels" in verdict.reason
    with pytest.warns(Act24Warning, match="the 2:4 kernels"):
        out = torch.compile(mlp, backend="ao_act24")(x)
    torch.testing.assert_close(out, mlp(x))
    with pytest.warns(Act24Warning, match="the 2:4 kernels"):
        ao_act24.sparsify_(mlp)
    assert torch.equal(mlp(x), MLP.forward(mlp, x))


def test_a_transformed_model_that_moves_runs_dense():
    mlp, x = MLP(), torch.randn(32, 64)
    ao_act24.sparsify_(mlp)
    mlp.cuda()
    with pytest.warns(Act24Warning, match="the 2:4 kernels"):
        assert torch.equal(mlp(x.cuda()), MLP.forward(mlp, x.cuda()))
    ao_act24.unsparsify_(mlp)
    mlp.cpu()
    ao_act24.sparsify_(mlp, Act24Config(emulate=True))
    mlp.cuda()
    assert relative_error(mlp(x.cuda()), oracle(mlp, x.cuda())) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_emulation_equals_the_oracle(dtype, autocast):
    if autocast and dtype == torch.float32:
        pytest.skip("autocast has no float32 to cast to")
    mlp, x = MLP().cuda(), torch.randn(128, 64, device="cuda")
    exact = [torch.autograd.grad(oracle(mlp.double(), x.double()).square().sum(), list(mlp.parameters()))]
    mlp, x = mlp.to(torch.float32 if autocast else dtype), x.to(torch.float32 if autocast else dtype)
    compiled = torch.compile(mlp, backend="ao_act24", options=EMULATE, fullgraph=True)
    for run in (compiled, lambda x: oracle(mlp, x)):
        # a cache of its own: torch 2.11 takes a graph compiled under bf16 autocast for one under fp16
        with fresh_cache(), torch.autocast("cuda", dtype, enabled=autocast):
            out = run(x)
        exact.append(torch.autograd.grad(out.float().square().sum(), list(mlp.parameters())))
    assert out.dtype == dtype
    for want, got, reference in zip(*exact):
        assert relative_error(got, want) <= max(2 * relative_error(reference, want), 1e-5)


def test_ops_equal_the_cpu_reference_bit_by_bit():
    h = torch.randn(64, 4100, dtype=torch.bfloat16)
    h[0, :5] = torch.tensor([float("nan"), float("inf"), -0.0, float("-inf"), 0.0])
    packed, metadata = ao_act24.ops.relu2_sparsify(h)
    packed_cuda, metadata_cuda = (t.cpu() for t in ao_act24.ops.relu2_sparsify(h.cuda()))
    assert torch.equal(metadata, metadata_cuda)
    one_nan = [t.nan_to_num(nan=-1, posinf=-2).view(torch.int16) for t in (packed, packed_cuda)]
    assert torch.equal(*one_nan)


@pytest.mark.skipif(tuple(int(x) for x in torchao.__version__.split(".")[:2]) < (0, 18), reason="needs torchao >= 0.18")
def test_torchao_kernel_reads_our_conversion():
    """torchao's CUTLASS kernel multiplies our packed data and metadata; its own packer gives what we read back."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("torchao's kernel needs sm_90")
    s = Sparse24Tensor.from_hidden(torch.randn(128, 512, device="cuda", dtype=torch.bfloat16))
    theirs = s.to_torchao()
    values = Sparse24Tensor.from_torchao(theirs).to_dense()
    torch.testing.assert_close(theirs.dequantize(torch.bfloat16), values, rtol=2**-7, atol=0)
    packed_by_them = type(theirs).from_hp(s.to_dense())
    back = Sparse24Tensor.from_torchao(packed_by_them)
    torch.testing.assert_close(back.to_dense(), values, rtol=2**-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_torch_semi_structured_conversion():
    s = Sparse24Tensor.from_hidden(torch.randn(128, 512, device="cuda", dtype=torch.bfloat16))
    assert torch.equal(Sparse24Tensor.from_torch(s.to_torch()).to_dense(), s.to_dense())
