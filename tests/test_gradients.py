"""On a Hopper GPU: the gradients' kernels against the reference: bits on integers, else an error budget.

python -m pytest tests/test_gradients.py
"""

import gc
import itertools

import pytest
import torch
from hopper_kernels import DTYPES, ROWS, in_threads, made_of, needs_hopper, poison, random, untouched
from mlp import MLP

import ao_act24
from ao_act24 import autograd, ops
from ao_act24.kernels import cuda, layout, reference

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
@pytest.mark.parametrize(
    "size",
    [*GRADIENT_SIZES, (512, 128, 320), (1028, 64, 64), (1100, 64, 192), (3072, 320, 576), (8184, 128, 320)],
    ids=str,
)
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
    h = small_integers(tokens, hidden_dim, dtype=dtype, most=3)
    wise, codes, _, left = reference.feature_wise(*reference.relu2_sparsify(h), permuted, True)
    dense = small_integers(tokens, model_dim // 64 * 64, dtype=dtype)
    left = left * 0  # what it adds is rounded again
    exact = small_integers(24, dense.shape[-1], dtype=dtype)
    for chosen in (0, 24):
        _, slots = reference.densest(torch.randint(9, (hidden_dim,), dtype=torch.int32, device="cuda"), chosen)
        for transposed in (False, True):
            arguments = (wise, codes, left, dense, exact, slots, permuted, transposed)
            assert torch.equal(cuda.feature_wise_mm(*arguments), reference.feature_wise_mm(*arguments))


@pytest.mark.parametrize(
    ("features", "chosen"),
    [(0, 0), (1, 1), (12, 8), (8192, 0), (8192, 416), (8192, 8192), (16384, 824), (65600, 3280), (65600, 65600)],
)
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


@pytest.mark.parametrize("tokens", [1024, 1030])  # of which two make no four
@pytest.mark.parametrize("weight_grads", ["dense", "sparse"])
def test_a_step_never_waits_for_the_gpu(weight_grads, tokens):
    """Forward, backward, optimiser and schedule: torch raises where the host would."""
    mlp, x = MLP(dim=256, hidden=1024).cuda(), random(tokens, 256)
    optimizer = torch.optim.AdamW(mlp.parameters(), fused=True)
    config = ao_act24.Act24Config(emulate=True, weight_grads=weight_grads)
    run, schedule = torch.compile(mlp, backend=ao_act24.Act24Backend(config)), ao_act24.Schedule(warmup_steps=1)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = run(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    for _ in range(3):  # dense; compiled; as all others
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        schedule.close()


def test_a_run_that_is_resumed(tmp_path):
    """As users train: fp32 weights under autocast, accumulated gradients, a fused optimiser, sequences, a warm-up."""
    data, config = random(6, 2, 8, 64, 256), ao_act24.Act24Config(emulate=True, weight_grads="sparse")

    def start():
        torch.manual_seed(0)
        mlp = MLP(dim=256, hidden=1024).cuda()
        optimizer = torch.optim.AdamW(mlp.parameters(), lr=1e-3, fused=True)
        run = torch.compile(mlp, backend=ao_act24.Act24Backend(config), fullgraph=True)
        return run, {"mlp": mlp, "optimizer": optimizer, "schedule": ao_act24.Schedule(warmup_steps=2)}

    def train(run, parts, batches):
        losses = []
        for batch in batches:
            for x in batch:
                with torch.autocast("cuda", torch.bfloat16):
                    loss = run(x).float().square().mean() / len(batch)
                loss.backward()
                losses.append(float(loss.detach()))
            parts["optimizer"].step()
            parts["optimizer"].zero_grad()
            parts["schedule"].step()
        return losses

    run, parts = start()
    want = train(run, parts, data[:4])
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "checkpoint")
    want += train(run, parts, data[4:])
    parts["schedule"].close()
    run, parts = start()
    for name, state in torch.load(tmp_path / "checkpoint").items():
        parts[name].load_state_dict(state)
    assert train(run, parts, data[4:]) == want[8:] and want[-1] < want[0]
    parts["schedule"].close()


def by_reference(monkeypatch, function, *arguments):
    """The same on the GPU without a kernel of ours."""
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "why_not", lambda *_: "the reference is asked")
        return function(*arguments)


@pytest.mark.parametrize("permuted", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 130, 1039])
def test_none_some_and_all_features_done_dense(tokens, share, permuted, monkeypatch):
    """Integers so small that nothing is rounded, not even by what is added to a result."""
    monkeypatch.setattr(autograd, "DENSE_SHARE", share)
    monkeypatch.setattr(autograd, "PERMUTED", permuted)
    packed, metadata = reference.relu2_sparsify(small_integers(tokens, 576))
    hidden = packed * small_integers(*packed.shape)  # a gradient: zero wherever packed is
    x, grad = small_integers(2, tokens, 192)
    arguments = (x, grad, hidden, packed, metadata, True, True, True)
    got = autograd._feature_wise_grads(*arguments)
    want = by_reference(monkeypatch, autograd._feature_wise_grads, *arguments)
    assert all(torch.equal(*pair) and bool(pair[1].any()) == (tokens > 0) for pair in zip(got, want))
    if share == 1:
        dense = (reference.unpack(each, metadata).float() for each in (hidden, packed))
        for grad_of_weight, of_hidden, other in zip((got[0], got[2].t()), dense, (x, grad)):
            assert torch.equal(grad_of_weight.float(), of_hidden.t() @ other.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature_wise", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_hardly_a_token(tokens, feature_wise, dtype, monkeypatch):
    """Of the whole operator, forward and backward."""
    shapes = [(tokens, 64), (192, 64), (192,), (64, 192), (64,)]
    inputs = [small_integers(*shape, dtype=dtype).requires_grad_() for shape in shapes]
    grad = small_integers(tokens, 64, dtype=dtype)

    def step():
        out = ops.relu2_ffn(*inputs, feature_wise)[0]
        return out.detach(), *torch.autograd.grad(out, inputs, grad)

    got, want = step(), by_reference(monkeypatch, step)
    assert [each.shape for each in got] == [(tokens, 64), *shapes]
    assert all(torch.equal(*pair) and bool(pair[1].any()) == (tokens > 0) for pair in zip(got, want))


def check_error(got, dense, exact, budget=1.02):
    errors = [(out.double() - exact).norm() for out in (got, dense)]
    assert 0 < errors[0] <= budget * errors[1]


EXACT_SIZES = [(1283, 576, 2112), (8191, 1024, 2048), (4096, 256, 320)]  # tokens, D, H


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", EXACT_SIZES, ids=str)
def test_the_gradient_of_the_hidden_activation_and_of_x_are_as_exact_as_dense_ones(size, dtype):
    tokens, model_dim, hidden_dim = size
    packed, metadata = cuda.relu2_sparsify(random(tokens, hidden_dim, dtype=dtype))
    grad, factor = random(tokens, model_dim, dtype=dtype), packed.sqrt() * 2
    down = random(model_dim, hidden_dim, dtype=dtype) / model_dim**0.5
    hidden = cuda.grad_hidden(grad, down, packed, metadata)
    exact = reference.gather(grad.double() @ down.double(), metadata) * factor.double()
    check_error(hidden, reference.gather(grad @ down, metadata) * factor, exact)
    up, dense = random(hidden_dim, model_dim, dtype=dtype) / hidden_dim**0.5, reference.unpack(hidden, metadata)
    check_error(cuda.sparse_mm(hidden, metadata, up.t()), dense @ up, dense.double() @ up.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("permuted", [True, False])
@pytest.mark.parametrize("size", EXACT_SIZES, ids=str)
def test_the_gradients_of_weights_are_as_exact_as_dense_ones(size, permuted, dtype):
    """On what 2:4 along tokens keeps; what the tokens left over add is rounded once more."""
    tokens, model_dim, hidden_dim = size
    whole = tokens // 4 * 4
    order = reference.in_groups(torch.arange(whole, device="cuda"), permuted).flatten()
    slots = torch.full((hidden_dim,), -1, device="cuda", dtype=torch.int32)
    for transposed, pack in ((False, reference.sparsify), (True, reference.relu2_sparsify)):  # of up, of down
        wise, codes, _, left = cuda.feature_wise(*pack(random(tokens, hidden_dim, dtype=dtype)), permuted, True)
        x = random(tokens, model_dim, dtype=dtype)
        kept = torch.cat([reference.unpack(wise.t(), codes), left[: tokens - whole].t()], 1)
        rows = torch.cat([x[order], x[whole:]])
        got = cuda.feature_wise_mm(wise, codes, left, x, x[:0], slots, permuted, transposed)
        budget = 1.02 * (1 if tokens == whole else 2**0.5)
        check_error(got.t() if transposed else got, kept @ rows, kept.double() @ rows.double(), budget)


def test_nan_and_infinity_stay_in_their_tokens():
    _, grad, up, down, packed, metadata = operands(300, 320, 512)
    grad[5, 7], grad[9, 100] = float("nan"), float("inf")
    hidden = cuda.grad_hidden(grad, down, packed, metadata)
    for each in (hidden, cuda.sparse_mm(hidden, metadata, up.t())):
        assert each[5].isnan().all() and not each[9].isfinite().any()
        assert each[[row for row in range(300) if row not in (5, 9)]].isfinite().all()


@pytest.mark.parametrize("permuted", [True, False])
def test_gradients_that_are_not_finite(permuted):
    """They reach the weights of the features that keep their token, be it with a zero, and no others; by the reference
    those of all."""
    wise, codes, _, left = cuda.feature_wise(*cuda.relu2_sparsify(random(1024, 512)), permuted, True)
    grad, slots = random(1024, 128), torch.full((512,), -1, device="cuda", dtype=torch.int32)
    order = reference.in_groups(torch.arange(1024), permuted).flatten()

    def both():
        arguments = wise, codes, left, grad, grad[:0], slots, permuted, False
        return [each.feature_wise_mm(*arguments) for each in (cuda, reference)]

    want, _ = both()
    assert want.isfinite().all()
    kept = reference.unpack(torch.ones_like(wise).t(), codes).bool()
    grad[order[37], 3], grad[order[700], 5] = float("nan"), float("inf")
    reached = torch.zeros_like(want, dtype=torch.bool)
    reached[:, 3], reached[:, 5] = kept[:, 37], kept[:, 700]
    got, theirs = both()
    assert not got[reached].isfinite().any() and torch.equal(got[~reached], want[~reached])
    assert not theirs[:, [3, 5]].isfinite().any()


FAR = 4 * 16400 + 3, 1 << 16  # tokens and H: packed, too, has more than 2**31 elements


def far():
    return cuda.relu2_sparsify(torch.randint(-3, 4, FAR, dtype=torch.int8, device="cuda").bfloat16())


def test_more_tokens_and_features_than_32_bits_count():
    """Integers whose sums are exact, against the reference of some blocks of tokens: the first, around 2**31, the last.

    The last is of three.
    """
    (tokens, hidden_dim), (packed, metadata) = FAR, far()
    grad, down, up = small_integers(tokens, 64), small_integers(64, hidden_dim), small_integers(hidden_dim, 64)
    hidden, dense = cuda.grad_hidden(grad, down, packed, metadata), cuda.unpack(packed, metadata)
    out = cuda.sparse_mm(hidden, metadata, up.t())
    for first in (0, (1 << 15) - 16, 1 << 15, (1 << 16) - 16, 1 << 16, tokens // 16 * 16):
        some = slice(first, first + 16)
        block = packed[some], metadata[some]
        assert torch.equal(dense[some], reference.unpack(*block))
        assert torch.equal(hidden[some], reference.grad_hidden(grad[some], down, *block))
        assert torch.equal(out[some], reference.sparse_mm(hidden[some], metadata[some], up.t()))
    chosen = [0, 5, hidden_dim - 1]
    got = cuda.columns(packed, metadata, torch.tensor(chosen, device="cuda"))
    assert all(torch.equal(got[:, place], dense[:, feature]) for place, feature in enumerate(chosen))


@pytest.mark.parametrize("permuted", [True, False])
def test_gradients_of_weights_with_more_elements_than_32_bits_count(permuted):
    """As above, of some groups of tokens and some features; with totals of all."""
    (tokens, hidden_dim), (packed, metadata) = FAR, far()
    quarter, (first, last) = tokens // 4, reference.group_strides(tokens // 4 * 4)
    wise, codes, counts, left = cuda.feature_wise(packed, metadata, permuted, True)
    rows = layout.to_rows(codes, hidden_dim, 4 * quarter)
    for group in (0, 4096, 8192, first - 16, first, quarter - 16):
        begin, apart = (group, first) if group < first else (group + 3 * first, last)
        firsts = [begin + i * apart if permuted else 4 * group + 16 * i for i in range(4)]
        members = (torch.cat([each[first : first + 16] for first in firsts]) for each in (packed, metadata))
        want, want_codes, _, _ = reference.feature_wise(*members, permuted, True)
        assert torch.equal(wise[2 * group : 2 * group + 32], want)
        assert torch.equal(rows[:, group // 2 : group // 2 + 8], layout.to_rows(want_codes, hidden_dim, 64))
    dense, sums = cuda.unpack(packed, metadata), cuda.feature_wise(packed, metadata, permuted, False)[2]
    assert torch.equal(counts, (dense != 0).sum(0, dtype=torch.int32))
    assert torch.equal(left, dense[-3:])
    assert torch.equal(sums, dense.sum(0, dtype=torch.float32))
    del dense, packed
    x, left = small_integers(tokens, 64), left * 0  # what it adds is rounded again
    slots = torch.full((hidden_dim,), -1, device="cuda", dtype=torch.int32)
    for transposed in (False, True):
        got = cuda.feature_wise_mm(wise, codes, left, x, x[:0], slots, permuted, transposed)
        got = got.t() if transposed else got
        for first in (0, 1 << 15, hidden_dim - 64):
            some = slice(first, first + 64)
            of_some = wise[:, some], codes[some], left[:, some], x, x[:0], slots[some]
            assert torch.equal(got[some], reference.feature_wise_mm(*of_some, permuted, False))


def operands(tokens, model_dim, hidden_dim, values=random):
    """x, grad, up, down, packed, metadata"""
    x, grad = values(2, tokens, model_dim)
    up, down = values(hidden_dim, model_dim), values(model_dim, hidden_dim)
    return [x, grad, up, down, *reference.relu2_sparsify(values(tokens, hidden_dim))]


def everything(x, grad, up, down, packed, metadata, by=cuda):
    """Each kernel of the backward in each of its forms: all outputs. Nothing is cuBLAS's, if no token is left over."""
    hidden = by.grad_hidden(grad, down, packed, metadata)
    made = [hidden, by.sparse_mm(hidden, metadata, up.t()), by.unpack(hidden, metadata)]
    for permuted in (True, False):
        of_y = wise, codes, counts, left = by.feature_wise(packed, metadata, permuted, True)
        chosen, slots = by.densest(counts, 8)
        made += [*of_y, chosen, slots, by.columns(packed, metadata, chosen)]
        made += [by.feature_wise_mm(wise, codes, left, grad, up[:8], slots, permuted, True)]
        of_dh = wise, codes, _, left = by.feature_wise(hidden, metadata, permuted, False)
        made += of_dh
        made += [by.feature_wise_mm(wise, codes, left, x, up[:8], slots, permuted, False)]
    return made


ALLOCATED = 3 + 2 * (4 + 2 + 1 + 1 + 4 + 1)  # outputs of everything


def same_bits(got, want):
    return all(torch.equal(g.view(torch.uint8), w.view(torch.uint8)) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize(("model_dim", "hidden_dim"), [(7, 64), (72, 64), (64, 68), (12, 12)])
def test_sizes_that_the_kernels_do_not_take(model_dim, hidden_dim):
    held = operands(132, model_dim, hidden_dim, small_integers)
    for got, want in zip(everything(*held), everything(*held, by=reference), strict=True):
        assert torch.equal(got, want) and got.dtype == want.dtype


@pytest.mark.parametrize("tokens", [1283, 1039, 1])  # a quarter is a multiple of four, is not, is nothing
def test_every_output_is_written_and_nothing_else(tokens, monkeypatch):
    held = operands(tokens, 576, 2112)
    want = everything(*held)
    guards = poison(monkeypatch)
    assert same_bits(everything(*held), want)
    assert len(guards) == ALLOCATED - (tokens == 1) * 2 * (4 + 1 + 4 + 1) and untouched(guards)


def test_operands_that_are_not_contiguous():
    held = operands(1280, 576, 2112)
    want = everything(*held)
    shifted = [torch.cat([each.new_zeros(1), each.flatten()])[1:].view_as(each) for each in held]
    strided = [torch.stack([each, each], -1)[..., 0] for each in held]
    assert same_bits(everything(*shifted), want) and same_bits(everything(*strided), want)


def test_the_same_bits_every_time():
    held = operands(5003, 1024, 2048)
    want = everything(*held)
    for _ in range(100):
        assert same_bits(everything(*held), want)


@pytest.mark.parametrize("clusters", [1, 3, 66])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_tiles_of_any_height_in_turn(rows, clusters, monkeypatch):
    """Rows are tokens, or features, of which there are whole 64s."""
    tokens = made_of(rows, monkeypatch, clusters)
    _, grad, up, down, packed, metadata = operands(tokens, 576, 704, small_integers)
    got, want = (each.grad_hidden(grad, down, packed, metadata) for each in (cuda, reference))
    assert torch.equal(got, want) and want.any()
    got, want = (each.sparse_mm(packed, metadata, up.t()) for each in (cuda, reference))
    assert torch.equal(got, want) and want.any()
    x, _, up, _, packed, metadata = operands(392, 576, tokens + 5 - 64, small_integers)
    for permuted, transposed in itertools.product((True, False), repeat=2):
        wise, codes, counts, left = reference.feature_wise(packed, metadata, permuted, True)
        _, slots = reference.densest(counts, 8)
        arguments = wise, codes, left, x, up[:8], slots, permuted, transposed
        got, want = (each.feature_wise_mm(*arguments) for each in (cuda, reference))
        assert torch.equal(got, want) and want.any()


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_thousands_of_launches(rows, monkeypatch):
    """Tiles of which one, two or three warpgroups work, one after another: that no wait is ever missed."""
    tokens = made_of(rows, monkeypatch, clusters=7)
    _, grad, up, down, packed, metadata = operands(tokens, 512, 1024)
    x, _, _, _, y, codes = operands(1024, 512, tokens + 5 - 64)
    wise, codes, counts, left = cuda.feature_wise(y, codes, True, True)
    _, slots = cuda.densest(counts, 8)

    def run():
        hidden = cuda.grad_hidden(grad, down, packed, metadata)
        of_weights = (cuda.feature_wise_mm(wise, codes, left, x, up[:8], slots, True, way) for way in (False, True))
        return hidden, cuda.sparse_mm(hidden, metadata, up.t()), *of_weights

    first, wrong = run(), torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(3000):
        for got, want in zip(run(), first):
            wrong += (got != want).any()
    assert not wrong


def test_side_streams_and_threads():
    held = [operands(1280, 576, 2112) for _ in range(4)]
    want = [everything(*each) for each in held]
    got = in_threads(everything, held, 10)
    assert all(same_bits(out, w) for results, w in zip(got, want) for out in results)


def test_cuda_graph():
    """Captured and replayed on a side stream, of other data each time."""
    size = 1283, 576, 2112
    held, graph, side = operands(*size), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    everything(*held)
    with torch.cuda.graph(graph, stream=side):
        out = everything(*held)
    for _ in range(3):
        for old, new in zip(held, operands(*size)):
            old.copy_(new)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            graph.replay()
        torch.cuda.current_stream().wait_stream(side)
        assert same_bits(out, everything(*held))


def test_memory_is_returned():
    held = operands(1283, 576, 2112)
    everything(*held)
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        everything(*held)
    assert torch.cuda.memory_allocated() == before
