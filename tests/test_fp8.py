"""On a Hopper GPU: the fp8 kernels against the reference, bit for bit where they pack, and against torchao's matmul.

python -m pytest tests/test_fp8.py
"""

import itertools
import threading

import pytest
import torch
from hopper_kernels import DTYPES, ROWS, in_threads, made_of, needs_hopper, poison, random, untouched
from mlp import MLP
from torchao import ops as torchao_ops
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

import ao_act24
from ao_act24.fp8 import rows_to_fp8, to_torchao
from ao_act24.kernels import cuda, reference

pytestmark = needs_hopper
E4M3 = torch.float8_e4m3fn


def check_packing(h):
    """Bit by bit, but that a NaN is any NaN."""
    packed, metadata, scale = cuda.relu2_sparsify_fp8(h)
    want = reference.relu2_sparsify_fp8(h)
    assert packed.dtype == E4M3 and packed.shape == want[0].shape and scale.shape == want[2].shape
    assert torch.equal(metadata, want[1])
    torch.testing.assert_close(scale, want[2], rtol=0, atol=0, equal_nan=True)
    bits = [t.view(torch.uint8).masked_fill(t.float().isnan(), 0) for t in (packed, want[0])]
    assert torch.equal(packed.float().isnan(), want[0].float().isnan()) and torch.equal(*bits)


def poison_fp8(monkeypatch):
    """e4m3 has no masked fills: as bytes."""
    guards = poison(monkeypatch)
    poisoned = cuda._empty

    def as_bytes(shape, strides, dtype):
        found = poisoned(shape, strides, torch.uint8 if dtype == E4M3 else dtype)
        return found.view(dtype) if dtype == E4M3 else found

    monkeypatch.setattr(cuda, "_empty", as_bytes)
    return guards


def quantised(*shape):
    weight = random(*shape)
    scale = weight.float().abs().amax(-1) / 448
    return (weight.float() / scale[:, None]).to(E4M3), scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 3, 63, 64, 65, 127, 1000])
@pytest.mark.parametrize("hidden_dim", [4, 12, 16, 48, 64, 100, 1024, 4100, 8192, 8208, 16400, 32768, 40000])
def test_packing_of_any_shape(tokens, hidden_dim, dtype):
    check_packing(random(tokens, hidden_dim, dtype=dtype))
    check_packing(random(2, tokens, hidden_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_of_every_value(dtype):
    """Each beside each of some others, which decide the scale: zero, subnormal, infinite, not a number."""
    every = torch.arange(-32768, 32768, device="cuda").to(torch.int16).view(dtype)
    for others in (-1.0, 0.0, 1e-7, 1.0, 200.0, 6e4, float("nan"), float("inf")):
        rest = torch.full_like(every, others)
        for position in range(4):
            group = [rest] * 4
            group[position] = every
            check_packing(torch.stack(group, -1).reshape(-1, 4))
            check_packing(torch.stack(group, -1).reshape(-1, 16))


@pytest.mark.parametrize("hidden_dim", [512, 100])
def test_packing_of_strided_and_unaligned_rows(hidden_dim):
    wide = random(70, 2 * hidden_dim + 8)
    for start in (0, 1, 8):
        check_packing(wide[:, start : start + hidden_dim])
    check_packing(random(hidden_dim, 70).t()[:, : hidden_dim // 4 * 4])
    check_packing(random(3, 5, 2 * hidden_dim)[..., hidden_dim:])


def test_more_elements_than_32_bits_count():
    h = random(1, 1 << 15).expand((1 << 16) + 16, 1 << 15).contiguous()
    h[-1, -16:] = random(16) * 8
    packed, metadata, scale = cuda.relu2_sparsify_fp8(h)
    want = reference.relu2_sparsify_fp8(h[-16:])
    assert torch.equal(packed[-16:].view(torch.uint8), want[0].view(torch.uint8))
    assert torch.equal(metadata[-16:], want[1]) and torch.equal(scale[-16:], want[2])
    weight, weight_scale = quantised(64, 1 << 15)
    out = cuda.sparse_mm_fp8(packed, metadata, scale, weight, weight_scale, None, torch.bfloat16)
    assert torch.equal(out[:-1], out[:1].expand(out.shape[0] - 1, -1))
    last = cuda.sparse_mm_fp8(packed[-16:], metadata[-16:], scale[-16:], weight, weight_scale, None, torch.bfloat16)
    assert torch.equal(out[-16:], last)


def operands(tokens, model_dim, hidden_dim, dtype=torch.bfloat16):
    return *reference.relu2_sparsify_fp8(random(tokens, hidden_dim, dtype=dtype)), *quantised(model_dim, hidden_dim)


def check_matmul(tokens, model_dim, hidden_dim, dtype=torch.bfloat16, bias=True):
    """Against fp64, beside dense fp8 of the same data."""
    packed, metadata, scale, weight, weight_scale = operands(tokens, model_dim, hidden_dim, dtype)
    offset = random(model_dim, dtype=dtype) if bias else None
    got = cuda.sparse_mm_fp8(packed, metadata, scale, weight, weight_scale, offset, dtype)
    assert got.shape == (tokens, model_dim) and got.dtype == dtype
    dense = reference.unpack(packed.float(), metadata)
    exact = dense.double() @ weight.double().t() * scale.double()[:, None] * weight_scale.double()
    exact = exact if offset is None else exact + offset
    error = (got.double() - exact).norm()
    if tokens >= 256 and not (model_dim % 16 or hidden_dim % 16) and dtype == torch.bfloat16:  # fewer cuBLAS may refuse
        scales = {"scale_a": scale[:, None], "scale_b": weight_scale[None]}
        theirs = torch._scaled_mm(
            dense.to(E4M3), weight.t(), bias=offset, out_dtype=dtype, use_fast_accum=True, **scales
        )
        assert error <= 1.02 * (theirs.double() - exact).norm()
    assert error <= 4e-3 * exact.norm()


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 191, 193, 383, 385, 1000, 8191])
@pytest.mark.parametrize(
    ("model_dim", "hidden_dim"), [(64, 64), (320, 192), (576, 1088), (2048, 704), (4096, 256), (512, 8320)]
)
def test_matmul(tokens, model_dim, hidden_dim):
    check_matmul(tokens, model_dim, hidden_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [0, 256, 384])
def test_matmul_dtypes_and_bias(tokens, bias, dtype):
    check_matmul(tokens, 512, 512, dtype, bias)


@pytest.mark.parametrize(("model_dim", "hidden_dim"), [(7, 64), (64, 68), (12, 12), (100, 256)])
def test_sizes_that_the_kernel_does_not_take(model_dim, hidden_dim):
    check_matmul(65, model_dim, hidden_dim)
    check_matmul(0, model_dim, hidden_dim)


@pytest.mark.parametrize("hidden_dim", [64, 192, 448, 1024])
def test_where_each_value_is_multiplied(hidden_dim):
    """Small integers: no sum is rounded, so that each bit is known."""
    packed = torch.randint(-2, 3, (300, hidden_dim // 2), device="cuda").to(E4M3)
    _, metadata = reference.relu2_sparsify(random(300, hidden_dim))
    weight = torch.randint(-2, 3, (320, hidden_dim), device="cuda").to(E4M3)
    row_scale = torch.randint(1, 5, (300,), device="cuda").float()
    weight_scale = 2.0 ** torch.randint(-2, 3, (320,), device="cuda")
    got = cuda.sparse_mm_fp8(packed, metadata, row_scale, weight, weight_scale, None, torch.bfloat16)
    want = reference.sparse_mm_fp8(packed, metadata, row_scale, weight, weight_scale, None, torch.bfloat16)
    assert torch.equal(got, want)


@pytest.mark.parametrize(("tokens", "model_dim", "hidden_dim"), [(64, 64, 384), (1024, 512, 4096), (192, 2048, 1152)])
def test_torchaos_kernel_gives_the_same(tokens, model_dim, hidden_dim):
    """From our packed data, in its layout of metadata. At hidden_dim 128 torchao's kernel is wrong by 110 %."""
    packed, metadata, scale, weight, weight_scale = operands(tokens, model_dim, hidden_dim)
    try:
        theirs = to_torchao(packed, metadata, scale, torch.bfloat16)
    except NotImplementedError as error:
        pytest.skip(str(error))
    want = torchao_ops.rowwise_scaled_linear_sparse_cutlass_f8f8(
        weight, weight_scale, theirs.qdata, theirs.sparse_metadata, theirs.scale.squeeze(-1), out_dtype=torch.bfloat16
    ).t()
    got = cuda.sparse_mm_fp8(packed, metadata, scale, weight, weight_scale, None, torch.bfloat16)
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-3)


def first_operands(tokens, model_dim, hidden_dim, dtype=torch.bfloat16, whole=False):
    """Of the first matmul. ``whole``: small integers, and scales that keep all sums exact."""
    if not whole:
        return *quantised(tokens, model_dim), *quantised(hidden_dim, model_dim), random(hidden_dim, dtype=dtype), dtype
    x, weight = (torch.randint(-2, 3, (n, model_dim), device="cuda").to(E4M3) for n in (tokens, hidden_dim))
    x_scale, weight_scale = (2.0 ** torch.randint(-1, 2, (n,), device="cuda") for n in (tokens, hidden_dim))
    return x, x_scale, weight, weight_scale, torch.randint(-9, 5, (hidden_dim,), device="cuda").to(dtype), dtype


def check_first(*arguments):
    got, want = (each.linear_relu2_sparsify_fp8(*arguments) for each in (cuda, reference))
    assert [t.shape for t in got] == [t.shape for t in want] and [t.dtype for t in got] == [t.dtype for t in want]
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 127, 193, 1000, 8191])
@pytest.mark.parametrize(
    ("model_dim", "hidden_dim"),
    [(16, 64), (48, 192), (192, 576), (1040, 320), (256, 4096), (512, 8256), (7, 64), (64, 68)],
)
def test_first_matmul_bit_by_bit(model_dim, hidden_dim, tokens, dtype):
    *operands, bias, dtype = first_operands(tokens, model_dim, hidden_dim, dtype, whole=True)
    check_first(*operands, bias, dtype)
    check_first(*operands, None, dtype)


@pytest.mark.parametrize(("tokens", "model_dim", "hidden_dim"), [(384, 64, 128), (1000, 1088, 2048), (8191, 4096, 512)])
def test_first_matmul_is_no_worse_than_torchs(tokens, model_dim, hidden_dim):
    x, x_scale, weight, weight_scale, bias, dtype = first_operands(tokens, model_dim, hidden_dim)
    scales = {"scale_a": x_scale[:, None], "scale_b": weight_scale[None]}
    theirs = torch._scaled_mm(x, weight.t(), bias=bias, out_dtype=dtype, use_fast_accum=True, **scales)
    exact = x.double() @ weight.double().t() * x_scale.double()[:, None] * weight_scale.double() + bias

    def error(packed, metadata, scale):
        dense = reference.unpack(packed.float(), metadata).double() * scale.double()[:, None]
        relu = exact.clamp_min(0)
        kept = reference.unpack(reference.take(relu.square(), reference.two_largest(relu)), reference.sparsify(relu)[1])
        return (dense - kept).norm() / kept.norm()

    got = error(*cuda.linear_relu2_sparsify_fp8(x, x_scale, weight, weight_scale, bias, dtype))
    assert got <= 1.02 * error(*cuda.relu2_sparsify_fp8(theirs)) and got < 0.05


@pytest.mark.parametrize("clusters", [66, 2])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_first_matmul_in_tiles_of_any_height_in_turn(rows, clusters, monkeypatch):
    tokens = made_of(rows, monkeypatch, clusters)
    check_first(*first_operands(tokens, 320, 2176, whole=True))
    check_first(*first_operands(tokens, 1088, 1088, whole=True))


@pytest.mark.parametrize("clusters", [1, 2])
@pytest.mark.parametrize("depth", [64, 128, 256, 640, 704])
@pytest.mark.parametrize("rows", [(3, 1, 2), (1, 2, 2), (1, 1, 1)], ids=str)
def test_tiles_of_few_stages(rows, depth, clusters, monkeypatch):
    """Fewer than the ring holds, as many and more, in many tiles of a block one after another: what there is for
    columns, brought in beside the stages, is that of the tile."""
    tokens = made_of(rows, monkeypatch, clusters)
    first = x, *rest = first_operands(tokens, depth, 1088, whole=True)
    hidden, codes = reference.sparsify(x.float())
    second = hidden.to(E4M3), codes, *rest
    wanted = reference.linear_relu2_sparsify_fp8(*first), (reference.sparse_mm_fp8(*second),)
    for _ in range(20):
        got = cuda.linear_relu2_sparsify_fp8(*first), (cuda.sparse_mm_fp8(*second),)
        for a, b in zip(itertools.chain(*got), itertools.chain(*wanted)):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_first_matmul_of_a_negative_that_rounds_to_zero():
    """-2**-30 is -0 in fp16, which must not count as large."""
    x, weight = (torch.ones(64, 16, device="cuda").to(E4M3) for _ in range(2))
    weight[::4] = -weight[::4].float()
    x_scale, weight_scale = (torch.full((64,), 2.0**-17, device="cuda") for _ in range(2))
    weight_scale[1::2] = 1
    check_first(x, x_scale, weight, weight_scale, None, torch.float16)


def test_first_matmul_of_extreme_values():
    """A NaN or infinity in x reaches all of its row; in a bias, one entry of each row."""
    x, x_scale, weight, weight_scale, bias, dtype = first_operands(300, 512, 1024)
    x = x.float()
    x[5, 7], bias[100] = float("nan"), -1e30
    packed, _, scale = cuda.linear_relu2_sparsify_fp8(x.to(E4M3), x_scale, weight, weight_scale, bias, dtype)
    assert packed[5].float().isnan().all() and scale[5].isnan()
    rest = [row for row in range(300) if row != 5]
    assert packed[rest].float().isfinite().all() and scale[rest].isfinite().all()
    bias[100] = float("inf")
    packed, _, scale = cuda.linear_relu2_sparsify_fp8(x.to(E4M3), x_scale, weight, weight_scale, bias, dtype)
    want = reference.linear_relu2_sparsify_fp8(x.to(E4M3), x_scale, weight, weight_scale, bias, dtype)
    torch.testing.assert_close(scale, want[2], equal_nan=True)
    assert torch.equal(packed.float().isnan(), want[0].float().isnan())


def test_first_matmul_of_more_results_than_32_bits_count():
    x, x_scale, weight, weight_scale, bias, dtype = first_operands(1, 64, 1 << 15, whole=True)
    rows = (1 << 16) + 16
    got = cuda.linear_relu2_sparsify_fp8(
        x.view(torch.uint8).expand(rows, -1).contiguous().view(E4M3),
        x_scale.expand(rows),
        weight,
        weight_scale,
        bias,
        dtype,
    )
    want = reference.linear_relu2_sparsify_fp8(x, x_scale, weight, weight_scale, bias, dtype)
    assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8).expand(rows, -1))
    assert torch.equal(got[2], want[2].expand(rows))


def test_first_matmul_writes_all_outputs_and_nothing_else(monkeypatch):
    arguments = first_operands(8190, 512, 2048, whole=True)
    want = reference.linear_relu2_sparsify_fp8(*arguments)
    guards = poison_fp8(monkeypatch)
    got = cuda.linear_relu2_sparsify_fp8(*arguments)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want))
    assert len(guards) == 5 and untouched(guards)


def test_first_matmul_the_same_bits_every_time_and_in_a_graph():
    arguments = first_operands(1279, 1040, 2112)

    def bits():
        return [t.view(torch.uint8) for t in cuda.linear_relu2_sparsify_fp8(*arguments)]

    want = bits()
    assert all(all(map(torch.equal, bits(), want)) for _ in range(100))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = bits()
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    assert all(map(torch.equal, captured, want))


def test_operands_that_are_not_contiguous_or_aligned():
    packed, metadata, scale, weight, weight_scale = operands(400, 512, 256)
    bias = random(513)
    want = cuda.sparse_mm_fp8(packed, metadata, scale, weight, weight_scale, bias[1:].clone(), torch.bfloat16)
    shifted = torch.cat([packed.view(torch.uint8).flatten()[:1], packed.view(torch.uint8).flatten()])[1:]
    strided = torch.stack([scale, scale], -1)[:, 0]
    others = shifted.view(E4M3).view_as(packed), metadata, strided, weight.t().contiguous().t(), weight_scale, bias[1:]
    assert torch.equal(cuda.sparse_mm_fp8(*others, torch.bfloat16), want)
    x, x_scale, up, up_scale, up_bias, dtype = first_operands(400, 512, 256)
    want = cuda.linear_relu2_sparsify_fp8(x, x_scale, up, up_scale, up_bias, dtype)
    wide = torch.cat([up_bias[:1], up_bias])[1:]
    strided = x.t().contiguous().t(), torch.stack([x_scale, x_scale], -1)[:, 0], up.t().contiguous().t()
    got = cuda.linear_relu2_sparsify_fp8(*strided, up_scale, wide, dtype)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want))


def test_first_matmul_of_rows_that_are_zero_large_and_small():
    x, x_scale, weight, weight_scale, bias, dtype = first_operands(130, 64, 128, whole=True)
    x.view(torch.uint8)[:20], bias = 0, bias.clamp_max(0)
    x_scale[20:40], x_scale[40:60], x_scale[60:62] = 2.0**12, 2.0**-20, float("inf")
    weight_scale[5] = 2.0**10
    x.view(torch.uint8)[60:62] = 0x38  # ones: infinity, and no infinity times zero
    check_first(x[:60], x_scale[:60], weight, weight_scale, bias, dtype)
    got = cuda.linear_relu2_sparsify_fp8(x, x_scale, weight, weight_scale, bias, dtype)
    finite = got[2].isfinite()
    assert finite[:60].all() and finite[62:].all() and not finite[60:62].any()


def test_side_streams_and_threads_of_a_whole_ffn():
    every = [(*first_operands(3000, 1024, 1088), *quantised(1024, 1088)) for _ in range(4)]

    def ffn(*arguments):
        three = cuda.linear_relu2_sparsify_fp8(*arguments[:6])
        return cuda.sparse_mm_fp8(*three, *arguments[6:], None, torch.bfloat16)

    want = [ffn(*arguments) for arguments in every]
    got = in_threads(ffn, every, 20)
    assert all(torch.equal(out, w) for results, w in zip(got, want) for out in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_a_second_gpu():
    """Each function on tensors of a GPU that is not the current one."""
    first, (packed, metadata, scale, weight, weight_scale) = first_operands(300, 256, 512), operands(300, 256, 512)
    x, up, down = random(5, 256), random(512, 256), random(512, 256).t()
    runs = {
        "relu2_sparsify": (x,),
        "relu2_sparsify_fp8": (x,),
        "linear_relu2_sparsify": (x, up),
        "linear_relu2_sparsify_fp8": first,
        "sparse_mm": (*reference.relu2_sparsify(random(300, 512)), down),
        "sparse_mm_fp8": (packed, metadata, scale, weight, weight_scale, None, torch.bfloat16),
        "active_ffn": (x, up, None, down, None),
    }
    for name, arguments in runs.items():
        moved = [a.to("cuda:1") if isinstance(a, torch.Tensor) else a for a in arguments]
        got, want = (getattr(cuda, name)(*each) for each in (moved, arguments))
        pairs = zip(*((each if isinstance(each, tuple) else (each,)) for each in (got, want)))
        assert all(a.device.index == 1 and torch.equal(a.cpu().float(), b.cpu().float()) for a, b in pairs), name
    assert torch.cuda.current_device() == 0


@pytest.mark.filterwarnings("ignore:Float8Tensor does not implement")
@pytest.mark.parametrize("converted", ["torchao", "sparsify_"])
def test_a_model_runs_them(converted):
    """Compiled from torchao's own conversion, and by ``sparsify_`` in two steps; close to what both do on a CPU.

    Not nearer than 1.3 % (seen): a last bit of ``x`` in fp8 decides which of two like entries is kept.
    """
    mlp = MLP(dim=1024, hidden=4096).cuda().bfloat16().eval()
    torch.nn.init.constant_(mlp.up.bias, -0.3)  # 70 % zeros
    x = random(8192, 1024)
    with torch.no_grad():
        if converted == "torchao":
            quantize_(mlp, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
            run = torch.compile(mlp, backend="ao_act24", fullgraph=True)
        else:
            assert len(ao_act24.sparsify_(mlp, ao_act24.Act24Config(dtype="fp8")).rewritten) == 1
            run = mlp
        got, dense = run(x), type(mlp).forward(mlp, x)
        weight = mlp.down.weight
        packed = reference.relu2_sparsify_fp8(mlp.up(x))
        if converted == "torchao":  # x is quantised by us
            up = mlp.up.weight.qdata, mlp.up.weight.scale.flatten(), mlp.up.bias
            packed = reference.linear_relu2_sparsify_fp8(*rows_to_fp8(x), *up, x.dtype)
        want = reference.sparse_mm_fp8(*packed, weight.qdata, weight.scale.flatten(), mlp.down.bias, x.dtype)
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error < 0.02 < 0.05 < (got.double() - dense.double()).norm() / dense.double().norm()
    if converted == "torchao":
        with torch.no_grad():
            code = torch._inductor.utils.run_and_get_code(torch.compile(mlp, backend="ao_act24"), x)[1][0]
        assert "ao_act24_cuda.linear_relu2_sparsify_fp8" in code and "ao_act24_cuda.sparse_mm_fp8" in code


def test_nan_and_infinity_stay_in_their_rows():
    h = random(300, 512)
    h[5, 7], h[9, 100] = float("nan"), float("inf")
    out = cuda.sparse_mm_fp8(*cuda.relu2_sparsify_fp8(h), *quantised(320, 512), None, torch.bfloat16)
    assert out[[5, 9]].isnan().all()
    assert out[[row for row in range(300) if row not in (5, 9)]].isfinite().all()


def test_every_output_is_written_and_nothing_else(monkeypatch):
    arguments = (*operands(8190, 2048, 512), None, torch.bfloat16)
    want = cuda.sparse_mm_fp8(*arguments)
    hidden = [random(999, 1000), random(333, 4096)]
    packed = [reference.relu2_sparsify_fp8(h) for h in hidden]
    guards = poison_fp8(monkeypatch)
    assert torch.equal(cuda.sparse_mm_fp8(*arguments), want)
    for h, right in zip(hidden, packed):
        got = cuda.relu2_sparsify_fp8(h)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, right))
    assert len(guards) == 7 and untouched(guards)


@pytest.mark.parametrize("clusters", [66, 2])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_tiles_of_any_height_in_turn(rows, clusters, monkeypatch):
    tokens = made_of(rows, monkeypatch, clusters)
    check_matmul(tokens, 320, 2176)
    check_matmul(tokens, 1088, 1088)


def test_the_same_bits_every_time_in_graphs_and_on_other_streams():
    h, weight = random(1279, 2112), quantised(2112, 2112)

    def run():
        return cuda.sparse_mm_fp8(*cuda.relu2_sparsify_fp8(h), *weight, None, torch.bfloat16)

    want = run()
    assert all(torch.equal(run(), want) for _ in range(100))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    h.copy_(h.flip(0))
    graph.replay()
    assert torch.equal(captured, run()) and torch.equal(captured, want.flip(0))
    results = []

    def elsewhere():
        with torch.cuda.stream(torch.cuda.Stream()):
            results.extend(run() for _ in range(20))
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=elsewhere) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40 and all(torch.equal(result, captured) for result in results)
