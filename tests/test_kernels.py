"""On a Hopper GPU: the forward's kernels: bits of the reference where they pack, an error budget where they multiply.

python -m pytest tests/test_kernels.py
"""

import re
import threading

import pytest
import torch
import torch.nn.functional as F
from hopper_kernels import DTYPES, ROWS, in_threads, made_of, needs_hopper, poison, random, untouched
from torch import nn
from torch._inductor.utils import fresh_cache, run_and_get_code

import ao_act24
from ao_act24 import when
from ao_act24.kernels import cuda, layout, reference

pytestmark = needs_hopper


def check_packing(h):
    """Bit by bit, but that a NaN is any NaN."""
    got, want = cuda.relu2_sparsify(h), reference.relu2_sparsify(h)
    assert [t.shape for t in got] == [t.shape for t in want]
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0].isnan(), want[0].isnan())
    bits = [t.masked_fill(t.isnan(), 0).view(torch.int16) for t in (got[0], want[0])]
    assert torch.equal(*bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 3, 63, 64, 65, 127, 1000])
@pytest.mark.parametrize("hidden_dim", [4, 12, 16, 48, 64, 100, 1024, 4100])
def test_packing_of_any_shape(tokens, hidden_dim, dtype):
    check_packing(random(tokens, hidden_dim, dtype=dtype))
    check_packing(random(2, tokens, hidden_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_dim", [4112, 68])  # of whole sixteens, and not
def test_packing_of_many_tokens(hidden_dim, dtype):
    check_packing(random(8191, hidden_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_of_every_value(dtype):
    every = torch.arange(-32768, 32768, device="cuda").to(torch.int16).view(dtype)
    for others in (-1.0, 0.0, 1.0, float("nan"), float("inf"), -0.0):
        rest = torch.full_like(every, others)
        for position in range(4):
            group = [rest] * 4
            group[position] = every
            check_packing(torch.stack(group, -1).reshape(-1, 16))
    few = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, float("nan"), -float("nan"), float("inf"), 6e-8], device="cuda").to(
        dtype
    )
    check_packing(torch.cartesian_prod(few, few, few, few).reshape(-1, 4))
    check_packing(torch.cartesian_prod(few, few, few, few).repeat(16, 1).reshape(-1, 64))


def test_packing_of_strided_rows():
    wide = random(70, 3, 512)
    for h in (
        wide[:, 1],
        wide[::3, 0, :256],
        wide[:, :, 4:260],
        wide[:, :, 1:17],
        wide.transpose(0, 1),
        wide[:, 0, ::2],
    ):
        check_packing(h)
    check_packing(random(1, 64).expand(5, 64))


def test_more_elements_than_32_bits_count():
    h = random(1, 1 << 16).expand((1 << 15) + 16, 1 << 16).contiguous()
    h[-1, -16:] = random(16)
    packed, metadata = cuda.relu2_sparsify(h)
    want, codes = reference.relu2_sparsify(h[-16:])
    assert torch.equal(packed[-16:], want) and torch.equal(metadata[-16:], codes)
    assert torch.equal(packed[12345], packed[0]) and torch.equal(metadata[1600:1616], metadata[:16])
    weight = random(8, 1 << 16) / 256
    out = cuda.sparse_mm(packed, metadata, weight)
    assert torch.equal(out[:-1], out[:1].expand(out.shape[0] - 1, -1))
    del h
    torch.testing.assert_close(out[-16:], cuda.sparse_mm(packed[-16:], metadata[-16:], weight), rtol=1e-2, atol=1e-3)


def test_packing_of_any_size_with_more_elements_than_32_bits_count():
    h = random(1, (1 << 16) + 4).expand((1 << 15) + 16, -1).contiguous()
    h[-1, -16:] = random(16)
    packed, metadata = cuda.relu2_sparsify(h)
    want, codes = reference.relu2_sparsify(h[-16:])
    assert torch.equal(packed[-16:], want) and torch.equal(metadata[-16:], codes)
    assert torch.equal(packed[12345], packed[0]) and torch.equal(metadata[1600:1616], metadata[:16])


def test_results_with_more_elements_than_32_bits_count():
    h, weight = random(1, 64).expand((1 << 20) + 16, 64).contiguous(), random(2056, 64)
    h[-1] = random(64)
    packed, metadata = cuda.relu2_sparsify(h)
    out = cuda.sparse_mm(packed, metadata, weight)
    assert torch.equal(out[:-1], out[:1].expand(out.shape[0] - 1, -1))
    assert torch.equal(out[-16:], cuda.sparse_mm(packed[-16:], metadata[-16:], weight))


def test_the_first_matmul_with_more_elements_than_32_bits_count():
    x, weight = random(1, 64).expand((1 << 15) + 16, 64).contiguous(), random(1 << 16, 64)
    x[-1] = random(64)
    packed, metadata = cuda.linear_relu2_sparsify(x, weight)
    want, codes = cuda.linear_relu2_sparsify(x[-16:], weight)
    assert torch.equal(packed[-16:], want) and torch.equal(metadata[-16:], codes)
    assert torch.equal(packed[12345], packed[0]) and torch.equal(metadata[1600:1616], metadata[:16])


def check_matmul(tokens, model_dim, hidden_dim, dtype=torch.bfloat16, bias=True):
    packed, metadata = reference.relu2_sparsify(random(tokens, hidden_dim, dtype=dtype))
    weight = random(model_dim, hidden_dim, dtype=dtype) / hidden_dim**0.5
    offset = random(model_dim, dtype=dtype) if bias else None
    got = cuda.sparse_mm(packed, metadata, weight, offset)
    dense = reference.unpack(packed, metadata)
    exact = F.linear(dense.double(), weight.double(), None if offset is None else offset.double())
    errors = [(out.double() - exact).norm() for out in (got, F.linear(dense, weight, offset))]
    assert got.shape == (tokens, model_dim)
    assert errors[0] <= 1.02 * errors[1]  # both are rounding of the result; sums in another order round other ones up
    if got.numel():
        worst = [(out.double() - exact).abs().max() for out in (got, F.linear(dense, weight, offset))]
        assert worst[0] <= 2 * worst[1]


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 191, 193, 383, 385, 1000, 8191])
@pytest.mark.parametrize(("model_dim", "hidden_dim"), [(8, 64), (264, 192), (576, 1088), (2056, 704), (4096, 256)])
def test_matmul(tokens, model_dim, hidden_dim):
    check_matmul(tokens, model_dim, hidden_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [256, 384])
def test_matmul_dtypes_and_bias(tokens, bias, dtype):
    check_matmul(tokens, 512, 512, dtype, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 63, 65, 127, 193, 385, 8191])
@pytest.mark.parametrize(("model_dim", "hidden_dim"), [(8, 64), (72, 192), (256, 1088), (520, 4096)])
def test_the_first_matmul_packs_the_bits_of_its_result(tokens, model_dim, hidden_dim, bias, dtype):
    """Small integers: no sum is rounded, so that its bits are known, and many are ties."""
    x = torch.randint(-2, 3, (tokens, model_dim), device="cuda").to(dtype)
    weight = torch.randint(-1, 2, (hidden_dim, model_dim), device="cuda").to(dtype)
    offset = torch.randint(-3, 4, (hidden_dim,), device="cuda").to(dtype) if bias else None
    want = reference.linear_relu2_sparsify(x, weight, offset)
    for got, right in zip(cuda.linear_relu2_sparsify(x, weight, offset), want):
        assert torch.equal(got, right)


def test_the_first_matmul_is_as_exact_as_a_dense_one():
    """Over what both keep, zeros included: where rounding decides between two entries, they may differ."""
    x, weight = random(3000, 2048), random(4096, 2048) / 2048**0.5
    exact = F.linear(x.double(), weight.double()).clamp_min(0).square()
    got, dense = cuda.linear_relu2_sparsify(x, weight), reference.relu2_sparsify(F.linear(x, weight))
    kept = [layout.decode(metadata, exact.shape) for _, metadata in (got, dense)]
    both = (kept[0] == kept[1]).flatten(-2)
    assert both.float().mean() > 0.99 and got[0].any()
    want = reference.take(exact, kept[1])
    errors = [(packed.double() - want)[both].norm() for packed, _ in (got, dense)]
    assert errors[0] <= 1.02 * errors[1]
    for _ in range(100):
        assert all(torch.equal(*pair) for pair in zip(cuda.linear_relu2_sparsify(x, weight), got))


def test_the_first_matmul_with_nan_and_infinity():
    x, weight = random(300, 256), random(512, 256)
    x[5, 7], x[9, 100] = float("nan"), float("inf")
    packed, _ = cuda.linear_relu2_sparsify(x, weight)
    assert packed[5].isnan().all() and (packed[9].isinf() | packed[9].isnan() | (packed[9] == 0)).all()
    rest = [row for row in range(300) if row not in (5, 9)]
    assert packed[rest].isfinite().all()


@pytest.mark.parametrize(("model_dim", "hidden_dim"), [(7, 64), (64, 68), (12, 12), (64, 0)])
def test_sizes_that_the_first_matmul_does_not_take(model_dim, hidden_dim):
    x, weight = random(65, model_dim), random(hidden_dim, model_dim)
    want = cuda.relu2_sparsify(F.linear(x, weight))
    assert all(torch.equal(*pair) for pair in zip(cuda.linear_relu2_sparsify(x, weight), want))
    assert cuda.linear_relu2_sparsify(x[:0], weight)[0].shape == (0, hidden_dim // 2)


@pytest.mark.parametrize(("model_dim", "hidden_dim"), [(7, 64), (64, 68), (12, 12), (0, 64)])
def test_sizes_that_the_kernel_does_not_take(model_dim, hidden_dim):
    check_matmul(65, model_dim, hidden_dim)
    assert cuda.sparse_mm(*cuda.relu2_sparsify(random(0, hidden_dim)), random(model_dim, hidden_dim)).shape == (
        0,
        model_dim,
    )


def test_operands_that_are_not_contiguous():
    packed, metadata = cuda.relu2_sparsify(random(400, 512))
    weight, bias = random(512, 256), random(257)
    want = cuda.sparse_mm(packed, metadata, weight.t().contiguous(), bias[1:].clone())
    assert torch.equal(cuda.sparse_mm(packed, metadata, weight.t(), bias[1:]), want)
    shifted = torch.cat([packed.new_zeros(1), packed.flatten()])[1:].view_as(packed)
    assert torch.equal(cuda.sparse_mm(shifted, metadata, weight.t(), bias[1:]), want)


def test_every_output_is_written_and_nothing_else(monkeypatch):
    packed, metadata = reference.relu2_sparsify(random(8190, 512))
    weight = random(2048, 512)
    want = cuda.sparse_mm(packed, metadata, weight)
    h = random(999, 1000)
    codes = reference.relu2_sparsify(h)
    x, up = random(1279, 512), random(2112, 512)
    first = cuda.linear_relu2_sparsify(x, up)
    guards = poison(monkeypatch)
    assert torch.equal(cuda.sparse_mm(packed, metadata, weight), want)
    assert all(torch.equal(*pair) for pair in zip(cuda.relu2_sparsify(h), codes))
    assert all(torch.equal(*pair) for pair in zip(cuda.linear_relu2_sparsify(x, up), first))
    assert len(guards) == 5 and untouched(guards)


def test_a_negative_that_rounds_to_zero_is_a_zero():
    """-2**-30 is -0 in fp16, which must not count as large; and what is too large for fp16 is infinite."""
    x = torch.full((64, 64), 2.0**-10, device="cuda", dtype=torch.float16)
    weight = torch.zeros(64, 64, device="cuda", dtype=torch.float16)
    weight[0::4, 0], weight[1::4, 0], weight[2::4, 0] = -(2.0**-20), 1.0, 0.5
    weight[0::4, 1:] = 0
    want = reference.linear_relu2_sparsify(x, weight)
    assert all(torch.equal(*pair) for pair in zip(cuda.linear_relu2_sparsify(x, weight), want))
    x[:, 0], weight[3::4, 0] = 30000.0, 30000.0
    want = reference.linear_relu2_sparsify(x, weight)
    got = cuda.linear_relu2_sparsify(x, weight)
    assert got[0].isinf().any() and all(torch.equal(*pair) for pair in zip(got, want))


def test_nan_and_infinity_stay_in_their_rows():
    h = random(300, 512)
    h[5, 7], h[9, 100] = float("nan"), float("inf")
    out = cuda.sparse_mm(*cuda.relu2_sparsify(h), random(264, 512).abs())
    assert out[5].isnan().all() and (out[9] == float("inf")).all()
    rest = [row for row in range(300) if row not in (5, 9)]
    assert out[rest].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_not_finite(dtype):
    """They reach the tokens that keep what they multiply, be it a zero, and no others: better than dense, where each
    zero times NaN is NaN."""
    packed, metadata = cuda.relu2_sparsify(random(300, 512, dtype=dtype))
    weight = random(320, 512, dtype=dtype)
    want = cuda.sparse_mm(packed, metadata, weight)
    assert want.isfinite().all()
    kept = reference.unpack(torch.ones_like(packed), metadata).bool()
    reached = torch.zeros_like(want, dtype=torch.bool)
    weight[3, 17], weight[5, 100] = float("nan"), float("inf")
    reached[:, 3], reached[:, 5] = kept[:, 17], kept[:, 100]
    got = cuda.sparse_mm(packed, metadata, weight)
    assert not got[reached].isfinite().any() and torch.equal(got[~reached], want[~reached])
    assert not reference.sparse_mm(packed, metadata, weight)[:, [3, 5]].isfinite().any()


def test_the_same_bits_every_time():
    packed, metadata = cuda.relu2_sparsify(random(5000, 2048))
    weight = random(2048, 2048)
    want = cuda.sparse_mm(packed, metadata, weight)
    for _ in range(100):
        assert torch.equal(cuda.sparse_mm(packed, metadata, weight), want)


@pytest.mark.parametrize("clusters", [1, 3, 66])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_tiles_of_any_height_in_turn(rows, clusters, monkeypatch):
    tokens = made_of(rows, monkeypatch, clusters)
    check_matmul(tokens, 520, 704)
    x, weight = torch.randint(-2, 3, (2, 1200, 328), device="cuda").bfloat16()
    x, weight = x[:tokens] if tokens <= 1200 else x.repeat(2, 1)[:tokens], weight[:1088].sign()
    want = reference.linear_relu2_sparsify(x, weight)
    assert all(torch.equal(*pair) for pair in zip(cuda.linear_relu2_sparsify(x, weight), want))


@pytest.mark.parametrize("clusters", [1, 2])
@pytest.mark.parametrize("depth", [64, 128, 256, 320, 384])
@pytest.mark.parametrize("rows", [(3, 1, 2), (1, 2, 2), (1, 1, 1)], ids=str)
def test_tiles_of_few_stages(rows, depth, clusters, monkeypatch):
    """Fewer than the ring holds, as many and more, in many tiles of a block one after another: biases, brought in
    beside the stages, are those of the tile. Small integers, so that no sum is rounded."""
    tokens = made_of(rows, monkeypatch, clusters)
    x, up = (torch.randint(-1, 2, (n, depth), device="cuda").bfloat16() for n in (tokens, 1088))
    bias = torch.randint(-9, 3, (1088,), device="cuda").bfloat16()
    hidden = reference.sparsify(x)
    first, second = reference.linear_relu2_sparsify(x, up, bias), reference.sparse_mm(*hidden, up, bias)
    for _ in range(20):
        assert all(map(torch.equal, cuda.linear_relu2_sparsify(x, up, bias), first))
        assert torch.equal(cuda.sparse_mm(*hidden, up, bias), second)


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_thousands_of_launches(rows, monkeypatch):
    """Tiles of which one, two or three warpgroups work, one after another: that no wait is ever missed."""
    tokens = made_of(rows, monkeypatch, clusters=7)
    x, up, down = random(tokens, 512), random(1024, 512) / 512**0.5, random(1024, 1024) / 32
    first = cuda.linear_relu2_sparsify(x, up)
    second = cuda.sparse_mm(*first, down)
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(3000):
        again = cuda.linear_relu2_sparsify(x, up)
        out = cuda.sparse_mm(*again, down)
        for got, want in zip((*again, out), (*first, second)):
            wrong += (got != want).any()
    assert not wrong


def test_threads_that_follow_each_other():
    """They have the same identity, as Python counts, and each its own idea of a current context."""
    h, failed = random(64, 256), []

    def run():
        try:
            cuda.relu2_sparsify(h)
        except RuntimeError as error:
            failed.append(error)

    for _ in range(3):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert not failed


def test_side_streams_and_threads():
    operands = [(random(3000, 1024), random(1088, 1024), random(1024, 1088)) for _ in range(4)]

    def ffn(x, up, down):
        return cuda.sparse_mm(*cuda.linear_relu2_sparsify(x, up), down)

    want = [ffn(*operand) for operand in operands]
    got = in_threads(ffn, operands, 20)
    assert all(torch.equal(out, w) for results, w in zip(got, want) for out in results)


def test_cuda_graph():
    h, up, down = random(3000, 1024), random(1088, 1024), random(1024, 1088)

    def run():
        return cuda.sparse_mm(*cuda.linear_relu2_sparsify(h, up), down), *cuda.relu2_sparsify(h)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(3):
        h.copy_(random(3000, 1024))
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(out, run()))


def test_memory_is_returned():
    packed, metadata = cuda.relu2_sparsify(random(5000, 2048))
    weight = random(2048, 2048)
    cuda.sparse_mm(packed, metadata, weight)
    x = random(5000, 2048)
    cuda.linear_relu2_sparsify(x, weight)
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        cuda.sparse_mm(packed, metadata, weight)
        cuda.linear_relu2_sparsify(x, weight)
    assert torch.cuda.memory_allocated() == before


class MLP(nn.Module):
    def __init__(self, dim=2048, hidden=8192):
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


def outputs(mlp, x):
    """In 2:4, from the reference, and dense."""
    h = mlp.up(x)
    return reference.sparse_mm(*reference.relu2_sparsify(h), mlp.down.weight, mlp.down.bias), mlp(x)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_inductor_calls_them_itself(mode):
    mlp, always = MLP(256, 1024).cuda().bfloat16(), ao_act24.Act24Backend(ao_act24.Act24Config(emulate=True))
    compiled = torch.compile(mlp, backend=always, mode=mode, fullgraph=True)
    with torch.no_grad(), fresh_cache():
        _, (code, *_) = run_and_get_code(compiled, random(600, 256))
        assert "ao_act24_cuda.sparse_mm(" in code and "= torch.ops.ao_act24" not in code
        for _ in range(5):
            x = random(600, 256)
            want, _ = outputs(mlp, x)
            assert (compiled(x) - want).norm() < 1e-2 * want.norm()


def test_few_tokens_run_the_code_of_plain_inductor():
    """So they are as fast: what a benchmark sees between the two is noise."""
    mlp, x, codes = MLP().cuda().bfloat16(), random(512, 2048), []
    for backend in ("inductor", "ao_act24"):
        torch._dynamo.reset()
        compiled = torch.compile(mlp, backend=backend, dynamic=False, fullgraph=True)
        with torch.no_grad(), fresh_cache():
            _, (code,) = run_and_get_code(compiled, x)
        codes.append(re.sub(r"/\S+|AOT ID: .*", "", code))  # paths, and how many graphs there were before
    assert codes[0] == codes[1] and "ao_act24" not in codes[0]


@pytest.mark.parametrize("way", ["backend", "sparsify_", "both"])
def test_a_model_uses_them_where_they_pay(way, monkeypatch):
    mlp = MLP().cuda().bfloat16()
    eager = MLP().cuda().bfloat16()
    eager.load_state_dict(mlp.state_dict())
    run = mlp
    if way != "backend":
        ao_act24.sparsify_(mlp)
    if way != "sparsify_":
        run = torch.compile(mlp, backend="ao_act24" if way == "backend" else "inductor", fullgraph=True)
    least = when.least_tokens(2048, 8192, when.MAX_TRAINING_WASTE)
    many, few = random(least, 2048), random(2049, 2048)
    with torch.no_grad():
        sparse, dense = outputs(eager, many)
        got = run(many)
        assert (got - sparse).norm() < 0.2 * (dense - sparse).norm()
        torch.testing.assert_close(run(few), eager(few), rtol=2e-2, atol=2e-2)
    out = run(many)
    out.sum().backward()
    if way == "backend":
        assert (out - sparse).norm() < 0.2 * (dense - sparse).norm() and ao_act24.explain(eager, many).rewritten
        with torch.no_grad():
            (verdict,) = ao_act24.explain(eager, few)
        assert "and at some fewer, got 2049" in verdict.reason
    else:  # training is faster in one operator only, which no module makes
        torch.testing.assert_close(out, eager(many), rtol=2e-2, atol=2e-2)
