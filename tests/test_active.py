"""On a Hopper GPU: few tokens, of which only neurons that fire are multiplied further: exactly what dense computes.

python -m pytest tests/test_active.py
"""

import pytest
import torch
import torch.nn.functional as F
from hopper_kernels import DTYPES, needs_hopper, poison, random, untouched
from mlp import MLP
from torch._inductor.utils import fresh_cache
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

import ao_act24
from ao_act24.fp8 import rows_to_fp8
from ao_act24.kernels import cuda, reference

pytestmark = needs_hopper
TOKENS = [1, 2, 3, 4, 7, 8, 9, 15, 16]
SIZES = [(64, 64, 64), (192, 320, 128), (4096, 512, 320), (1024, 8256, 1024), (512, 65536, 4160)]  # D, H, D'
LONG = [(1, 65536, 64, 64), (8, 8192, 128, 16448), (5, 640, 2048, 8448)]  # tokens, D, H, D'


def operands(tokens, sizes=(1024, 4096, 1024), dtype=torch.bfloat16, shift=-1.6, bias=True):
    """At the default shift 95 % zeros; ``down`` is a row for each neuron in memory."""
    model_dim, hidden_dim, out_dim = sizes
    up, down = random(hidden_dim, model_dim) * model_dim**-0.5, random(hidden_dim, out_dim) * hidden_dim**-0.5
    biases = (torch.full((hidden_dim,), shift, device="cuda"), random(out_dim)) if bias else (None, None)
    tensors = (random(tokens, model_dim), up, biases[0], down, biases[1])
    x, up, up_bias, down, down_bias = (None if t is None else t.to(dtype) for t in tensors)
    return x, up, up_bias, down.t(), down_bias


def whole(tokens, sizes, dtype=torch.bfloat16):
    """Small integers, one entry in eight: nothing is rounded but the results, and those alike."""
    model_dim, hidden_dim, out_dim = sizes

    def integers(*shape):
        return (torch.randint(-1, 2, shape, device="cuda") * (torch.rand(shape, device="cuda") < 1 / 8)).to(dtype)

    x, up, down = integers(tokens, model_dim), integers(hidden_dim, model_dim), integers(hidden_dim, out_dim)
    return x, up, integers(hidden_dim), down.t(), integers(out_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_bit_by_bit(tokens, sizes, dtype):
    arguments = whole(tokens, sizes, dtype)
    want = reference.active_ffn(*arguments)
    assert torch.equal(cuda.active_ffn(*arguments), want) and want.any()
    arguments = (*arguments[:2], None, arguments[3], None)
    assert torch.equal(cuda.active_ffn(*arguments), reference.active_ffn(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "sizes"), [(tokens, sizes) for tokens, *sizes in LONG], ids=str)
def test_bit_by_bit_of_long_rows(tokens, sizes, dtype):
    """Of x, which a block keeps, and of the result: 128 columns a block."""
    arguments = whole(tokens, sizes, dtype)
    assert torch.equal(cuda.active_ffn(*arguments), reference.active_ffn(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [9.0, 0.0, -1.6, -9.0])
@pytest.mark.parametrize("tokens", [1, 4, 8, 16])
def test_no_worse_than_dense(tokens, shift, dtype):
    """Where all neurons fire, a half, a twentieth, and none."""
    x, up, up_bias, down, down_bias = arguments = operands(tokens, dtype=dtype, shift=shift)
    wide = [t.double() for t in arguments]
    exact = F.linear(F.linear(wide[0], wide[1], wide[2]).relu().square(), wide[3], wide[4])
    dense = F.linear(F.linear(x, up, up_bias).relu().square(), down, down_bias)
    error, of_dense = ((out.double() - exact).norm() for out in (cuda.active_ffn(*arguments), dense))
    assert error <= 1.02 * of_dense and error < 0.01 * exact.norm()


@pytest.mark.parametrize("tokens", [1, 3, 13])
def test_what_does_not_fire_changes_no_bit(tokens):
    """Nor does it matter what its row of ``down`` holds."""
    x, up, up_bias, down, down_bias = operands(tokens)
    want = cuda.active_ffn(x, up, up_bias, down, down_bias)
    fires = (F.linear(x.double(), up.double(), up_bias.double()) > -0.01).any(0)
    kept = fires.nonzero().flatten()
    silent = torch.full((4096 * 2,), -5.0, device="cuda").bfloat16()
    places = torch.randperm(8192, device="cuda")[: len(kept)].sort().values  # in the same order among others
    wider_up, wider_down = torch.zeros(8192, 1024, device="cuda").bfloat16(), random(8192, 1024)
    wider_down[0] = float("nan")
    wider_up[places], wider_down[places], silent[places] = up[kept], down.t()[kept], up_bias[kept]
    assert torch.equal(cuda.active_ffn(x, wider_up, silent, wider_down.t(), down_bias), want)


def test_nan_and_infinity_stay_in_their_tokens():
    x, up, up_bias, down, down_bias = operands(9)
    x[3, 5], x[6, 7] = float("nan"), float("inf")
    out = cuda.active_ffn(x, up, up_bias, down, down_bias)
    assert out[3].isnan().all() and not out[6].isfinite().any()
    rest = [0, 1, 2, 4, 5, 7, 8]
    assert out[rest].isfinite().all()


def test_a_larger_shape_strided_input_and_other_layouts():
    x, up, up_bias, down, down_bias = operands(6)
    want = cuda.active_ffn(x, up, up_bias, down, down_bias)
    assert torch.equal(cuda.active_ffn(x.view(2, 3, -1), up, up_bias, down, down_bias), want.view(2, 3, -1))
    wide = torch.zeros(6, 1030, device="cuda").bfloat16()
    wide[:, 3:-3] = x
    assert torch.equal(cuda.active_ffn(wide[:, 3:-3], up, up_bias, down, down_bias), want)
    dense = cuda.active_ffn(x, up, up_bias, down.contiguous(), down_bias)
    torch.testing.assert_close(dense, want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_the_same_bits_every_time_and_in_a_graph(tokens):
    arguments = operands(tokens, (1024, 8192, 1024))
    want = cuda.active_ffn(*arguments)
    assert all(torch.equal(cuda.active_ffn(*arguments), want) for _ in range(100))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda.active_ffn(*arguments)
    other = operands(tokens, (1024, 8192, 1024))[0]
    arguments[0].copy_(other)  # other neurons fire
    graph.replay()
    assert torch.equal(captured, cuda.active_ffn(*arguments)) and not torch.equal(captured, want)


@pytest.fixture
def any_size(monkeypatch):
    """By neurons at any size, and how often that ran; no graph of another test's rule."""
    calls, active_ffn = [], cuda.active_ffn
    monkeypatch.setattr("ao_act24.when.FEW_TOKENS", ((0, 8),))
    monkeypatch.setattr(cuda, "active_ffn", lambda *arguments: calls.append(1) or active_ffn(*arguments))
    with fresh_cache():
        yield calls


def whole_fp8(tokens, sizes, dtype=torch.bfloat16):
    """As ``whole``, with powers of two as scales: what e4m3 rounds, it rounds alike, and sums fit in fp32."""
    x, up, _, down, down_bias = whole(tokens, sizes, dtype)
    x[: tokens // 2, 1:] = 0  # small beside the others, some of them zeros
    x_scale, down_scale = (2.0 ** torch.randint(-3, 4, (n,), device="cuda") for n in (tokens, sizes[2]))
    up_scale = 2.0 ** torch.randint(0, 2, sizes[1:2], device="cuda")
    x, up, by_neurons = (tensor.to(torch.float8_e4m3fn) for tensor in (x, up, down.t()))
    up_bias = torch.zeros(sizes[1], device="cuda", dtype=dtype)
    return x, x_scale, up, up_scale, up_bias, by_neurons.t(), down_scale, down_bias, dtype


@pytest.mark.parametrize(("name", "made"), [("active_ffn", whole), ("active_ffn_fp8", whole_fp8)])
@pytest.mark.parametrize("tokens", [1, 16])
def test_every_output_is_written_and_nothing_else(tokens, name, made, monkeypatch):
    arguments = made(tokens, (384, 8256, 1152))
    want = getattr(reference, name)(*arguments)
    guards = poison(monkeypatch)
    assert torch.equal(getattr(cuda, name)(*arguments), want)
    assert len(guards) == 4 and untouched(guards)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(128, 64, 128), (384, 320, 256), (1024, 8256, 1152), (256, 65536, 4224)], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 16])
def test_fp8_bit_by_bit(tokens, sizes, dtype):
    arguments = whole_fp8(tokens, sizes, dtype)
    want = reference.active_ffn_fp8(*arguments)
    assert torch.equal(cuda.active_ffn_fp8(*arguments), want) and want.any()
    without = (*arguments[:4], None, *arguments[5:7], None, dtype)
    assert torch.equal(cuda.active_ffn_fp8(*without), reference.active_ffn_fp8(*without))


def random_fp8(tokens, sizes=(1024, 4096, 1152), shift=-1.6, dtype=torch.bfloat16):
    x, up, up_bias, down, down_bias = operands(tokens, sizes, dtype, shift)
    (x, x_scale), (up, up_scale), (down, down_scale) = (rows_to_fp8(t) for t in (x, up, down))
    return x, x_scale, up, up_scale, up_bias, down.t().contiguous().t(), down_scale, down_bias, dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [9.0, 0.0, -1.6, -9.0])
@pytest.mark.parametrize("tokens", [1, 4, 8, 16])
def test_fp8_as_the_reference(tokens, shift, dtype):
    """But for sums that are rounded in another order, which may decide between neighbours of e4m3."""
    arguments = random_fp8(tokens, shift=shift, dtype=dtype)
    got, want = cuda.active_ffn_fp8(*arguments).double(), reference.active_ffn_fp8(*arguments).double()
    assert (got - want).norm() < 0.004 * want.norm()
    fired = reference.active_ffn_fp8(*arguments[:7], None, dtype).any()
    assert bool(fired) == (shift > -9)


def test_fp8_not_a_number_stays_in_its_token_and_fits_in_16_bits():
    arguments = list(random_fp8(9))
    arguments[1] = arguments[1].clone()
    arguments[1][3], arguments[1][6] = float("nan"), 1e38
    out = cuda.active_ffn_fp8(*arguments)
    rest = [0, 1, 2, 4, 5, 7, 8]
    assert out[3].isnan().all() and not out[6].isfinite().any() and out[rest].isfinite().all()


def test_a_compiled_model_in_fp8(any_size):
    mlp = MLP(lambda h: F.relu(h).square(), dim=1024, hidden=4096).cuda().bfloat16().eval()
    torch.nn.init.constant_(mlp.up.bias, -0.7)
    quantize_(mlp, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    x = random(4, 1024)
    with torch.no_grad():
        theirs = mlp(x).double()
        up, down = ((layer.weight.dequantize().double(), layer.bias.double()) for layer in (mlp.up, mlp.down))
        want = F.linear(F.relu(F.linear(x.double(), *up)).square(), *down)
        assert ao_act24.neuron_major_(mlp) == 1
        run = torch.compile(mlp, backend="ao_act24", fullgraph=True)
        got, (code,) = torch._inductor.utils.run_and_get_code(run, x)
    assert "ao_act24_cuda.active_ffn_fp8(" in code
    assert (got.double() - want).norm() < 1.1 * (theirs - want).norm() < 0.07 * want.norm()


def test_one_call_after_another_in_a_stream():
    """A kernel starts before the one before it has ended: it must wait for its end."""
    first, second = operands(8, (1024, 8192, 1024)), operands(8, (1024, 8192, 1024), bias=False)
    inputs = [random(8, 1024).bfloat16() for _ in range(50)]

    def both(x, end):
        y = cuda.active_ffn(x, *first[1:])
        end()
        return cuda.active_ffn(y, *second[1:])

    want = [both(x, torch.cuda.synchronize) for x in inputs]
    assert all(torch.equal(a, b) for a, b in zip([both(x, lambda: None) for x in inputs], want))


def test_a_compiled_model(any_size):
    """Few tokens by the neurons that fire, many in 2:4, of one weight."""
    mlp = MLP(lambda h: F.relu(h).square(), dim=1024, hidden=4096).cuda().bfloat16().eval()
    torch.nn.init.constant_(mlp.up.bias, -0.7)
    assert ao_act24.neuron_major_(mlp) == 1
    run = torch.compile(mlp, backend="ao_act24", fullgraph=True)
    for tokens, name in ((4, "active_ffn"), (8192, "sparse_mm")):
        x = random(tokens, 1024)
        with torch.no_grad():
            got, (code,) = torch._inductor.utils.run_and_get_code(run, x)
            want = mlp(x)
        assert f"ao_act24_cuda.{name}(" in code
        assert (got.double() - want.double()).norm() < (0.005 if tokens == 4 else 0.1) * want.double().norm()


@pytest.mark.parametrize("tokens", [4, 256])
def test_in_cuda_graphs_of_torch(tokens, any_size):
    mlp = MLP(lambda h: F.relu(h).square(), dim=1024, hidden=4096).cuda().bfloat16().eval()
    ao_act24.neuron_major_(mlp)
    run = torch.compile(mlp, backend="ao_act24", mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(5):
            x = random(tokens, 1024)
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(run(x), mlp(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("batch", [1, 4])
def test_hugging_face_generates_the_same_tokens(batch, any_size):
    """Greedily, with a static cache and CUDA graphs; in fp16, whose rounding decides between few logits."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.NemotronConfig(
        vocab_size=128,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        mlp_bias=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.NemotronForCausalLM(config).cuda().half().eval()
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.mlp.up_proj.bias, -0.3)
    assert ao_act24.neuron_major_(model) == 3
    ids = torch.randint(1, 128, (batch, 16), device="cuda")
    tokens = []
    for backend in ("inductor", "ao_act24"):
        torch._dynamo.reset()
        how = transformers.CompileConfig(backend=backend, mode="reduce-overhead", fullgraph=True, dynamic=False)
        more = {"do_sample": False, "cache_implementation": "static", "compile_config": how}
        tokens.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, **more))
    assert torch.equal(*tokens) and len(set(tokens[0][0].tolist())) > 8 and any_size
