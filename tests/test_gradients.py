"""On a Hopper GPU: the gradients' kernels against the reference: bits on integers, else an error budget.

python -m pytest tests/test_gradients.py
"""

import pytest
import torch
from hopper_kernels import DTYPES, needs_hopper, random
from mlp import MLP

import ao_act24
from ao_act24.kernels import cuda, reference

pytestmark = needs_hopper


def small_integers(*shape, dtype=torch.bfloat16, most=1):
    return torch.randint(-most, most + 1, shape, device="cuda").to(dtype)


# tokens, D, H; a quarter of the tokens is a multiple of four, and not
GRADIENT_SIZES = [(1, 64, 64), (7, 64, 192), (130, 320, 512), (1283, 584, 2112), (1039, 128, 576), (4096, 256, 320)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", GRADIENT_SIZES, ids=str)
def test_the_gradient_of_the_hidden_activation(size, dtype):
    """Small integers: no sum is rounded."""
    tokens, model_dim, hidden_dim = size
    packed, metadata = reference.relu2_sparsify(small_integers(tokens, hidden_dim, dtype=dtype, most=3))
    grad, down = small_integers(tokens, model_dim, dtype=dtype), small_integers(model_dim, hidden_dim, dtype=dtype)
    got, want = (each.grad_hidden(grad, down, packed, metadata) for each in (cuda, reference))
    assert torch.equal(got, want) and want.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_root(dtype):
    """Of every value that packed can have."""
    every = torch.arange(0x7F80 if dtype == torch.bfloat16 else 0x7C00, device="cuda").to(torch.int16).view(dtype)
    packed = every[: len(every) // 32 * 32].view(-1, 32)
    metadata = reference.sparsify(torch.ones(len(packed), 64, device="cuda", dtype=dtype))[1]
    grad, down = (torch.zeros(n, 64, device="cuda", dtype=dtype) for n in (len(packed), 64))
    grad[:, 0] = down[0] = 1
    got, want = (each.grad_hidden(grad, down, packed, metadata) for each in (cuda, reference))
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("permuted", [True, False])
@pytest.mark.parametrize("size", GRADIENT_SIZES, ids=str)
def test_feature_wise(size, permuted, dtype):
    tokens, model_dim, hidden_dim = size
    h = random(tokens, hidden_dim, dtype=dtype)
    h[::3, 1::5] = -0.0
    h[tokens // 2, :8], h[0, 8:16] = float("nan"), float("-inf")
    packed, metadata = reference.sparsify(h)
    for counted in (True, False):
        got, want = (each.feature_wise(packed, metadata, permuted, counted) for each in (cuda, reference))
        for index in (0, 3):  # with a NaN
            assert torch.equal(got[index].view(torch.int16), want[index].view(torch.int16))
        assert torch.equal(got[1], want[1]) and got[2].dtype == want[2].dtype
        torch.testing.assert_close(got[2], want[2], equal_nan=True)
    packed, metadata = reference.relu2_sparsify(small_integers(tokens, hidden_dim, dtype=dtype, most=3))
    wise, codes, _, left = reference.feature_wise(packed, metadata, permuted, True)
    dense = small_integers(tokens, model_dim // 64 * 64, dtype=dtype)
    left = left * 0  # what it adds is rounded again
    exact = small_integers(24, dense.shape[1], dtype=dtype)
    for chosen in (0, 24):
        _, slots = reference.densest(torch.randint(9, (hidden_dim,), dtype=torch.int32, device="cuda"), chosen)
        for transposed in (False, True):
            arguments = (wise, codes, left, dense, exact, slots, permuted, transposed)
            assert torch.equal(cuda.feature_wise_mm(*arguments), reference.feature_wise_mm(*arguments))


@pytest.mark.parametrize(("features", "chosen"), [(0, 0), (1, 1), (12, 8), (8192, 416), (16384, 824), (65600, 3280)])
@pytest.mark.parametrize("most", [2, 5000])
def test_the_densest(features, chosen, most):
    counts = torch.randint(most, (features,), dtype=torch.int32, device="cuda")
    for got, want in zip(cuda.densest(counts, chosen), reference.densest(counts, chosen)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", GRADIENT_SIZES, ids=str)
def test_a_transposed_weight(size, dtype):
    tokens, model_dim, hidden_dim = size
    packed, metadata = reference.relu2_sparsify(random(tokens, hidden_dim, dtype=dtype))
    weight = random(hidden_dim, model_dim // 64 * 64, dtype=dtype) / hidden_dim**0.5
    got, want = (cuda.sparse_mm(packed, metadata, w) for w in (weight.t(), weight.t().contiguous()))
    assert torch.equal(got, want), "the same sums in the same order"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (3, 5, 64), (1000, 4112), (17, 36)])
def test_unpacking(shape, dtype):
    packed, metadata = reference.sparsify(random(*shape, dtype=dtype))
    assert torch.equal(cuda.unpack(packed, metadata), reference.unpack(packed, metadata))
    chosen = torch.randint(shape[-1], (11,), device="cuda")
    assert torch.equal(cuda.columns(packed, metadata, chosen), reference.columns(packed, metadata, chosen))


@pytest.mark.parametrize("weight_grads", ["dense", "sparse"])
def test_training_step(weight_grads):
    """Under torch.compile, against the same on the CPU in fp32."""
    mlp, x = MLP(dim=256, hidden=1024).cuda().bfloat16(), random(1030, 256).requires_grad_()
    config = ao_act24.Act24Config(emulate=True, weight_grads=weight_grads)
    torch.compile(mlp, backend=ao_act24.Act24Backend(config), fullgraph=True)(x).float().square().sum().backward()
    twin, y = MLP(dim=256, hidden=1024), x.detach().float().cpu().requires_grad_()
    twin.load_state_dict({name: tensor.float().cpu() for name, tensor in mlp.state_dict().items()})
    torch.compile(twin, backend=ao_act24.Act24Backend(config), fullgraph=True)(y).square().sum().backward()
    for got, want in zip((x, *mlp.parameters()), (y, *twin.parameters())):
        assert (got.grad.float().cpu() - want.grad).norm() < 0.1 * want.grad.norm()
