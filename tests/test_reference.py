"""kernels/: the semantics by hand-written groups of four, by an independent oracle, and by properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import mask24, relu2_24

from ao_act24.kernels import layout, reference

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "group, packed, code",
    [
        ([1, 2, 3, 4], [9, 16], 0b1110),  # the two largest, in order of position
        ([4, 3, 2, 1], [16, 9], 0b0100),
        ([5, 1, 1, 6], [25, 36], 0b1100),
        ([1, 5, 6, 1], [25, 36], 0b1001),
        ([5, 1, 6, 1], [25, 36], 0b1000),
        ([1, 5, 1, 6], [25, 36], 0b1101),
        ([2, 2, 2, 2], [4, 4], 0b0100),  # ties: the lower index wins
        ([1, 2, 2, 2], [4, 4], 0b1001),
        ([3, 2, 1, 2], [9, 4], 0b0100),
        ([-1, -2, -3, -4], [0, 0], 0b0100),  # nothing positive: still a valid code
        ([-9, -1, 7, -2], [0, 49], 0b1000),  # one positive: the lowest zero fills up, not the largest negative
        ([3, -1, -1, -1], [9, 0], 0b0100),
        ([-0.0, 0.0, -0.0, 1], [0, 1], 0b1100),
        ([1, NAN, 5, 2], [NAN, 25], 0b1001),  # NaN counts as larger than anything
        ([INF, NAN, NAN, NAN], [NAN, NAN], 0b1001),
        ([1, INF, 2, -INF], [INF, 4], 0b1001),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_four_values(group, packed, code, dtype):
    got, metadata = reference.relu2_sparsify(torch.tensor(group, dtype=dtype))
    assert torch.equal(got.nan_to_num(nan=-1), torch.tensor(packed, dtype=dtype).nan_to_num(nan=-1))
    assert not torch.signbit(got[got == 0]).any(), "a zero is always +0"
    assert layout.to_rows(metadata, 1, 4).tolist() == [[code | layout.PADDING_CODE << 4]]


@pytest.mark.parametrize(
    "group, packed", [([1, -5, 3, 2], [-5, 3]), ([-1, 1, -1, 1], [-1, 1]), ([0, 0, -2, 0], [0, -2])]
)
def test_sparsify_keeps_the_largest_magnitudes(group, packed):
    assert reference.sparsify(torch.tensor(group, dtype=torch.float32))[0].tolist() == packed


def test_square_is_rounded_once():
    h = torch.tensor([1.0078125, 0.1, 3.140625, 7.0], dtype=torch.bfloat16).repeat_interleave(4)
    want = h.float().square().bfloat16().view(4, 4)[:, :2].flatten()
    assert torch.equal(reference.relu2_sparsify(h)[0], want)


floats = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, NAN, INF, -INF, 1e-30, 65504.0]),
    st.floats(width=32),
    st.integers(-3, 3).map(float),  # many ties
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(floats, min_size=4, max_size=4), min_size=1, max_size=12),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_pack_and_unpack(groups, dtype):
    h = torch.tensor(groups, dtype=torch.float64).to(dtype).flatten()
    packed, metadata = reference.relu2_sparsify(h)
    dense = reference.unpack(packed, metadata)
    assert dense.dtype == dtype and dense.shape == h.shape
    assert all((g != 0).sum() <= 2 for g in dense.view(-1, 4)), "at most two of four"
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    want = relu2_24(h)
    assert torch.equal(dense.isnan(), want.isnan())
    assert torch.equal(dense.nan_to_num(1).view(bits), want.nan_to_num(1).view(bits)), "the right two, bit for bit"
    nibbles = torch.stack((metadata & 0xF, metadata >> 4))
    assert set(nibbles.flatten().tolist()) <= set(layout.VALID_CODES), "valid codes only, padding included"
    assert metadata.shape == layout.metadata_shape(h.shape) == (16, 32)
    assert torch.equal(reference.gather(dense, metadata).view(bits), packed.view(bits)), "the round trip is bit-exact"
    assert torch.equal(reference.unpack(*reference.sparsify(dense.nan_to_num())), dense.nan_to_num()), "2:4 is kept"


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 5), st.integers(0, 6), st.integers(0, 2**32 - 1))
def test_shapes(tokens, groups, seed):
    h = torch.randn(tokens, 3, 4 * groups, generator=torch.Generator().manual_seed(seed))
    packed, metadata = reference.relu2_sparsify(h)
    assert packed.shape == (tokens, 3, 2 * groups)
    assert torch.equal(reference.unpack(packed, metadata) != 0, mask24(h) & (h > 0))


def test_every_code_decodes_to_what_was_encoded():
    index = torch.tensor([[a, b] for a in range(4) for b in range(a + 1, 4)])
    metadata = layout.encode(index)
    assert torch.equal(layout.decode(metadata, (24,)), index)
    assert layout.codes(metadata, (24,)).sort().values.tolist() == list(layout.VALID_CODES)


@pytest.mark.parametrize("tokens, hidden_dim", [(1, 4), (16, 256), (17, 260), (100, 1000)])
def test_layout_is_the_documented_one(tokens, hidden_dim):
    """And what lies outside the tensor is padding."""
    index = reference.two_largest(torch.randn(tokens, hidden_dim))
    metadata = layout.encode(index)
    assert metadata.shape == layout.metadata_shape((tokens, hidden_dim))
    padding = 0
    for token in range(metadata.shape[0]):
        for group in range(2 * metadata.shape[1]):
            entry = 4 * group
            lane, word = 4 * (token % 8) + entry // 16 % 4, entry // 64 % 4
            byte = entry // 256 * 512 + lane * 16 + word * 4 + token // 8 % 2 * 2 + entry // 8 % 2
            code = int(metadata.view(-1, 16 * metadata.shape[1])[token // 16, byte]) >> 4 * (group % 2) & 0xF
            if token < tokens and entry < hidden_dim:
                first, second = index[token, group].tolist()
                assert code == first | second << 2
            else:
                padding += 1
                assert code == layout.PADDING_CODE
    assert padding == metadata.numel() * 2 - tokens * hidden_dim // 4


def test_cutlass_layout_is_the_documented_formula():
    tokens, hidden_dim = 128, 384
    metadata = torch.randint(0, 256, (tokens, hidden_dim // 8), dtype=torch.uint8)
    flat = layout.to_cutlass_sm90_fp8(metadata).flatten()
    for m, k in [(0, 0), (1, 8), (63, 120), (64, 128), (127, 376), (100, 255)]:
        assert flat[m * 16 + k // 128 * tokens * 16 + k % 128 // 8] == metadata[m, k // 8]
    assert torch.equal(layout.from_cutlass_sm90_fp8(layout.to_cutlass_sm90_fp8(metadata)), metadata)


def test_matmuls_match_their_definitions():
    h, weight, bias, grad = torch.randn(5, 12), torch.randn(7, 12), torch.randn(7), torch.randn(5, 7)
    packed, metadata = reference.relu2_sparsify(h)
    out = reference.sparse_mm(packed.double(), metadata, weight.double(), bias.double())
    torch.testing.assert_close(out, relu2_24(h).double() @ weight.double().t() + bias)
    sampled = reference.unpack(reference.sampled_mm(grad.double(), weight.double(), metadata), metadata)
    torch.testing.assert_close(sampled, (grad.double() @ weight.double()) * mask24(h))


def fp8(rows, dtype=torch.bfloat16):
    packed, metadata, scale = reference.relu2_sparsify_fp8(torch.tensor(rows, dtype=dtype))
    assert packed.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    return packed.float(), metadata, scale


def test_fp8_scales_each_row_by_its_largest_square():
    packed, metadata, scale = fp8([[1, 2, 0, 4], [0, 0, 3, 1], [8, -9, 7, 0]])
    assert torch.equal(scale, torch.tensor([16, 9, 64.0]) / 448)
    assert torch.equal(
        packed, torch.tensor([[112, 448], [448, 48], [448, 352.0]])
    )  # 448 / 9 and 448 * 49 / 64, rounded
    assert torch.equal(
        metadata, reference.relu2_sparsify(torch.tensor([[1, 2, 0, 4], [0, 0, 3, 1], [8, -9, 7, 0.0]]))[1]
    )


def test_fp8_at_the_edges():
    packed, _, scale = fp8([[-1, 0, -2, -0.0], [1e-9, 0, 0, 0], [2e4, 100, 20, 1], [NAN, 1, 0, 0], [INF, 1, 0, 0]])
    assert torch.equal(scale[:2], torch.full((2,), 1e-12) / 448), "not less, and nothing is divided by zero"
    assert torch.equal(packed[:2], torch.zeros(2, 2)) and not packed[:2].signbit().any()
    assert packed[2, 0] == 448 and packed[2, 1] == 2.0**-6 * 0.75  # subnormal beside a large one
    assert scale[3].isnan() and packed[3].isnan().all() and packed[4, 0].isnan() and packed[4, 1] == 0
    weight, ones = torch.ones(1, 4).to(torch.float8_e4m3fn), torch.ones(1)
    h = torch.tensor([[NAN, 1, 0, 0], [INF, 1, 0, 0], [1, 1, 0, 0]])
    out = reference.sparse_mm_fp8(*reference.relu2_sparsify_fp8(h), weight, ones, None, torch.float32)
    assert out[:2].isnan().all() and out[2] == 2, "rows do not touch each other"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp8_rounds_once(dtype):
    h = torch.randn(5, 3, 64).to(dtype)
    packed, metadata, scale = reference.relu2_sparsify_fp8(h)
    assert scale.shape == (5, 3) and torch.equal(metadata, reference.relu2_sparsify(h)[1])
    kept = reference.take(h.clamp_min(0), reference.two_largest(h.clamp_min(0))).double().square()
    error = (packed.double() * scale.double().unsqueeze(-1) - kept).abs()
    step = kept * 2.0**-4  # half of the last place of three bits
    assert (error <= step.maximum(scale.double().unsqueeze(-1) * 2.0**-10) * (1 + 1e-5)).all()
    assert torch.equal(packed.float().amax(-1), torch.full((5, 3), 448.0))


def test_fp8_products_are_scaled_and_rounded_once():
    weight, bias = torch.randn(7, 64), torch.randn(7).bfloat16()
    weight_scale = weight.abs().amax(-1) / 448
    quantised = (weight / weight_scale[:, None]).to(torch.float8_e4m3fn)
    packed, metadata, scale = reference.relu2_sparsify_fp8(torch.randn(2, 9, 64))
    got = reference.sparse_mm_fp8(packed, metadata, scale, quantised, weight_scale, bias, torch.bfloat16)
    dense = reference.unpack(packed.double(), metadata) * scale[..., None]
    want = dense @ (quantised.double() * weight_scale[:, None]).t() + bias
    assert got.dtype == torch.bfloat16 and got.shape == (2, 9, 7)
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_fp8_of_nothing(shape):
    packed, metadata, scale = reference.relu2_sparsify_fp8(torch.zeros(shape))
    assert packed.shape == (shape[0], shape[1] // 2) and scale.shape == shape[:1]
    assert metadata.shape == layout.metadata_shape(shape)
