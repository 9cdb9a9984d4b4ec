"""The kernels without wgmma, compiled for the CPU: their own source, on stand-ins for CUDA's threads and warps."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ao_act24.kernels import compile, reference

BF16, NAN = torch.bfloat16, float("nan")
MAIN = """
#include "relu2_sparsify.cu"
#include "feature_wise.cu"
#include "unpack.cu"
#include "densest.cu"
namespace fp8 {
#define EACH 2
#include "relu2_sparsify_fp8.cu"
#include "square_to_fp8.cu"
}
extern "C" {
void run_pack(const u16* h, i64 stride, u16* packed, u32* metadata, i64 rows, i64 columns, bool any) {
  const i64 width = (columns + 255) / 256 * 256, padded = (rows + 15) / 16 * 16;
  if (any) launch(relu2_sparsify_any, (width + 2047) / 2048, padded, h, stride, packed, (u8*)metadata, rows, columns);
  else launch(relu2_sparsify, (width + 4095) / 4096, padded / 2, h, stride, packed, metadata, rows, columns);
}
void run_pack_fp8(const u16* h, i64 stride, u8* packed, u32* metadata, float* scale, i64 rows, i64 columns, bool any) {
  const i64 padded = (rows + 15) / 16 * 16;
  if (any) launch(fp8::relu2_sparsify_fp8_any, padded, 1, h, stride, packed, (u8*)metadata, scale, rows, columns);
  else launch(fp8::relu2_sparsify_fp8, padded / 2, 1, h, stride, packed, metadata, scale, rows, columns);
}
void run_square_to_fp8(const u16* kept, const u16* parts, u8* packed, float* scale, i64 rows, i64 width, i64 tiles) {
  launch(fp8::square_to_fp8, rows, 1, kept, parts, packed, scale, width, tiles);
}
void run_feature_wise(const u16* packed, const u8* metadata, u16* wise, uint4* codes, void* totals, u16* left,
                      i64 blocks, i64 groups, i64 width, i64 first, i64 last, bool counted) {
  const auto run = [=](auto kernel, auto* kind) {
    launch(kernel, (width + 255) / 256, blocks, packed, metadata, wise, codes, kind, left, groups, width,
           first, last);
  };
  if (counted) run(feature_wise_counts, (int*)totals);
  else run(feature_wise_sums, (float*)totals);
}
void run_densest(const u32* counts, i64* index, int* slots, i64 features, i64 chosen) {
  launch(densest, 1, 1, counts, index, slots, features, chosen);
}
void run_unpack(const u16* packed, const u16* metadata, u16* dense, i64 rows, i64 width) {
  launch(unpack, (width + 4095) / 4096, rows, packed, metadata, dense, rows, width);
}
void run_columns(const u16* packed, const u32* metadata, const i64* index, u16* dense, i64 rows, i64 width,
                 i64 chosen) {
  launch(columns, (chosen + 255) / 256, (rows + 15) / 16, packed, metadata, index, dense, rows, width, chosen);
}
}
"""

# Stages are few, so that rings come round; of the second kernel blocks have eight warps side by side, or one.
ACTIVE = """
#define UP_STAGES 3
#define DOWN_STAGES 4
#include "fp8.cuh"
""" + "".join(
    f"""
namespace active_{fp8}_{eights}_{column_warps} {{
#define FP8 {fp8}
#define EIGHTS {eights}
#define COLUMN_WARPS {column_warps}
#include "active.cu"
#undef FP8
#undef EIGHTS
#undef COLUMN_WARPS
}}
extern "C" void run_active_{fp8}_{eights}_{column_warps}(
    const u16* x, const u16* up, const u16* up_bias, const u16* down, const u16* down_bias, const float* x_scale,
    const float* up_scale, const float* down_scale, u16* y, u8* active, u32* largest, u16* out, i64 tokens,
    i64 model_dim, i64 hidden_dim, i64 out_dim, i64 blocks, i64 cluster) {{
  using namespace active_{fp8}_{eights}_{column_warps};
  launch(active_relu2, blocks, 1, x, up, up_bias, x_scale, up_scale, y, active, largest, tokens, model_dim,
         hidden_dim / 16);
  const i64 clusters = (out_dim + 64 * {column_warps} - 1) / (64 * {column_warps});
  launch_clusters(active_mm, cluster, cluster * clusters, 1, y, (const u32*)active, (const u16*)largest, down,
                  down_scale, down_bias, out, tokens, hidden_dim, out_dim, blocks);
}}
"""
    for fp8 in (0, 1)
    for eights, column_warps in ((1, 1), (1, 8), (2, 1), (2, 8))
)


def built(path, name, *sources):
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["g++", *options, *sources, "-o", f"{name}.so"], check=True, cwd=path)
    return ctypes.CDLL(str(path / f"{name}.so"))


def pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    path = tmp_path_factory.mktemp("host")
    for name in (
        "relu2_sparsify.cu",
        "feature_wise.cu",
        "unpack.cu",
        "densest.cu",
        "relu2_sparsify_fp8.cu",
        "square_to_fp8.cu",
        "fp8.cuh",
        "keep.cuh",
        "layout.cuh",
    ):
        shutil.copy(compile.CSRC / name, path)
    shutil.copy(Path(__file__).parent / "stand_in.h", path / "ptx.cuh")
    here = (compile.CSRC / "active.cu").read_text()
    dynamic = "extern __shared__ __align__(128) u8 shared[];"
    assert here.count(dynamic) == 2
    (path / "active.cu").write_text(here.replace(dynamic, "u8* const shared = arena;").replace('extern "C"', ""))
    (path / "main.cpp").write_text(MAIN)
    (path / "few.cpp").write_text(ACTIVE)
    library = built(path, "host", "main.cpp", "few.cpp")

    def call(name, *arguments):
        getattr(library, name)(*(ctypes.c_longlong(a) if isinstance(a, int) else pointer(a) for a in arguments))

    return call


def same_bits(got, want):
    return got.shape == want.shape and torch.equal(got.view(torch.int16), want.view(torch.int16))


def poisoned(like):
    return torch.full_like(like, 7)


def hidden(tokens, hidden_dim):
    h = torch.randn(tokens, hidden_dim).to(BF16)
    h[::3, 1::5], h[::2, 2::7] = -0.0, 1.0
    h[tokens // 2, :3], h[0, 8:12] = float("inf"), float("-inf")
    return h


@pytest.mark.parametrize("any_size", [False, True])
@pytest.mark.parametrize(("tokens", "hidden_dim"), [(1, 16), (33, 272), (20, 4112)])
def test_packing(tokens, hidden_dim, any_size, host):
    wide = hidden(tokens, hidden_dim + 8)
    h = wide[:, 8:]
    packed, metadata = reference.relu2_sparsify(h)
    got = poisoned(packed), poisoned(metadata)
    host("run_pack", h, h.stride(0), *got, tokens, hidden_dim, any_size)
    assert same_bits(got[0], packed) and torch.equal(got[1], metadata)


@pytest.mark.parametrize("any_size", [False, True])
@pytest.mark.parametrize(("tokens", "hidden_dim"), [(1, 16), (33, 272), (20, 4112), (18, 8192)])
def test_packing_to_fp8(tokens, hidden_dim, any_size, host):
    wide = hidden(tokens, hidden_dim + 8)
    wide[1:2], wide[2:3] = -1, 1e-9  # a row of zeros, and one of which nothing is left
    wide[3:4, 9] = 1e4  # one value beside which others are subnormal or vanish
    wide[4:5, 10], wide[5:6, 11] = float("nan"), float("inf")
    h = wide[:, 8:]
    packed, metadata, scale = reference.relu2_sparsify_fp8(h)
    got = poisoned(packed.view(torch.uint8)), poisoned(metadata), poisoned(scale)
    host("run_pack_fp8", h, h.stride(0), *got, tokens, hidden_dim, any_size)
    torch.testing.assert_close(got[2], scale, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got[1], metadata)
    values = got[0].view(torch.float8_e4m3fn).float(), packed.float()
    torch.testing.assert_close(*values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("tokens", "hidden_dim"), [(1, 64), (33, 576), (6, 16384), (3, 32768)])
def test_squaring_to_fp8(tokens, hidden_dim, host):
    """Of what was kept of relu(h), and the largest of each tile: the same as packing h itself."""
    h = hidden(tokens, hidden_dim)
    h[1:2], h[2:3] = -1, 1e-9
    h[3:4, 10] = float("nan")
    relu = torch.where(h.isnan(), float("nan"), h.clamp_min(0))  # without a sign, as the first kernel leaves it
    kept = reference.take(relu, reference.two_largest(relu))
    parts = torch.nn.functional.pad(relu.view(torch.int16), (0, -hidden_dim % 256)).unflatten(1, (-1, 256)).amax(-1)
    packed, _, scale = reference.relu2_sparsify_fp8(h)
    got = poisoned(packed.view(torch.uint8)), poisoned(scale)
    host("run_square_to_fp8", kept, parts.contiguous(), *got, tokens, hidden_dim // 2, parts.shape[1])
    torch.testing.assert_close(got[1], scale, rtol=0, atol=0, equal_nan=True)
    values = got[0].view(torch.float8_e4m3fn).float(), packed.float()
    torch.testing.assert_close(*values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("permuted", [True, False])
@pytest.mark.parametrize(
    ("tokens", "hidden_dim"),
    [(4, 64), (130, 192), (260, 64), (1030, 128), (1072, 576), (1087, 64), (2048, 64)],
)
def test_feature_wise(tokens, hidden_dim, permuted, counted, host):
    h = hidden(tokens, hidden_dim)
    h[1, :2] = float("nan")
    packed, metadata = reference.sparsify(h)
    groups = tokens // 4
    strides = reference.group_strides(4 * groups) if permuted else (0, 0)
    wise, codes, totals, left = reference.feature_wise(packed, metadata, permuted, counted)
    got = poisoned(wise), poisoned(codes)
    partial = torch.full((-(-(tokens // 4) // 64), hidden_dim), 7, dtype=totals.dtype)
    zeros = poisoned(left)
    sizes = len(partial), groups, hidden_dim
    host("run_feature_wise", packed, metadata, *got, partial, zeros, *sizes, *strides, counted)
    assert same_bits(got[0], wise) and torch.equal(got[1], codes)
    assert not zeros.any()
    rest = (left != 0).sum(0) if counted else left.float().sum(0)
    torch.testing.assert_close((partial.sum(0) + rest).to(totals.dtype), totals, equal_nan=True)


@pytest.mark.parametrize(("tokens", "hidden_dim"), [(1, 16), (33, 272), (5, 4112)])
def test_unpacking(tokens, hidden_dim, host):
    packed, metadata = reference.sparsify(hidden(tokens, hidden_dim))
    want = reference.unpack(packed, metadata)
    got = poisoned(want)
    host("run_unpack", packed, metadata, got, tokens, hidden_dim)
    assert same_bits(got, want)
    index = torch.randint(hidden_dim, (11,))
    some = poisoned(want[:, :11].contiguous())
    host("run_columns", packed, metadata, index, some, tokens, hidden_dim, 11)
    assert same_bits(some, reference.columns(packed, metadata, index))


@pytest.mark.parametrize("features, chosen", [(576, 0), (576, 8), (576, 64), (576, 576), (4800, 240)])
@pytest.mark.parametrize("most", [1, 3, 40, 2**31 - 1])
def test_the_densest(most, features, chosen, host):
    counts = torch.randint(most, (features,), dtype=torch.int32)  # with many ties, and with few
    index, slots = reference.densest(counts, chosen)
    got = poisoned(index), poisoned(slots)
    host("run_densest", counts, *got, features, chosen)
    assert torch.equal(got[0], index) and torch.equal(got[1], slots)


FEW = [  # tokens, D, H, D', blocks of the first kernel, of a cluster of the second, and warps side by side
    (1, 64, 64, 64, 4, 1, 1),
    (3, 576, 192, 192, 5, 2, 1),
    (8, 1088, 64, 128, 3, 3, 8),
    (9, 128, 320, 576, 7, 1, 8),
    (16, 64, 1152, 64, 2, 3, 1),
    (2, 64, 128, 64, 1, 5, 8),
    (1, 64, 16448, 64, 8, 2, 1),  # more than a word of bits for a thread
]


def few_operands(tokens, model_dim, hidden_dim, out_dim):
    """Small integers: sums are exact. Half of the neurons are silent."""
    sizes = (tokens, model_dim), (hidden_dim, model_dim), (hidden_dim, out_dim), (hidden_dim,), (out_dim,)
    x, up, down, up_bias, down_bias = (torch.randint(-1, 2, size).float() for size in sizes)
    up[:, 8:] *= torch.rand(hidden_dim, model_dim - 8) < 0.1
    up_bias[torch.rand(hidden_dim) < 0.5] = -1000
    return x, up, down, up_bias, down_bias


def run_few(host, fp8, arguments, tokens, model_dim, hidden_dim, out_dim, blocks, cluster, column_warps):
    each = 1 + fp8
    between = torch.full((hidden_dim, -(-tokens // 8) * 8), 7, dtype=torch.int16), torch.zeros(hidden_dim // 8).byte()
    largest, out = torch.zeros(blocks, between[0].shape[1]).to(torch.int16), torch.full((tokens, out_dim), 7).to(BF16)
    sizes = tokens, model_dim // each, hidden_dim, out_dim // each, blocks, cluster
    host(f"run_active_{fp8}_{-(-tokens // 8)}_{column_warps}", *arguments, *between, largest, out, *sizes)
    return out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", FEW, ids=str)
def test_few_tokens(sizes, bias, host):
    x, up, down, *biases = (t.to(BF16) for t in few_operands(*sizes[:4]))
    if not bias:
        biases = None, None
    got = run_few(host, 0, (x, up, biases[0], down, biases[1], None, None, None), *sizes)
    want = reference.active_ffn(x, up, biases[0], down.t(), biases[1])
    assert same_bits(got, want) and want.any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", FEW, ids=str)
def test_few_tokens_in_fp8(sizes, bias, host):
    tokens, model_dim, hidden_dim, out_dim, *how = sizes
    sizes = tokens, 2 * model_dim, hidden_dim, 2 * out_dim
    x, up, down, *biases = few_operands(*sizes)
    biases = [b.to(BF16) if bias else None for b in biases]
    x, up, down = (t.to(torch.float8_e4m3fn) for t in (x, up, down))
    scales = [
        2.0 ** torch.randint(*between, (n,))
        for between, n in (((-3, 4), tokens), ((0, 2), hidden_dim), ((-3, 4), 2 * out_dim))
    ]
    if bias:
        scales[0].fill_(1)
    got = run_few(host, 1, (x, up, biases[0], down, biases[1], *scales), *sizes, *how)
    want = reference.active_ffn_fp8(x, scales[0], up, scales[1], biases[0], down.t(), scales[2], biases[1], BF16)
    assert same_bits(got, want) and want.any()


@pytest.mark.parametrize("cluster", [1, 2])
def test_few_tokens_read_no_silent_neuron(cluster, host):
    """Nor does it change a bit of the others' sums where it stands. A sixteen that is not whole has zeros besides."""
    sizes = 3, 64, 128, 64
    x, up, down, up_bias, down_bias = (t.to(BF16) for t in few_operands(*sizes))
    fire = torch.arange(1, 118, 2)
    up_bias.fill_(-1000)[fire] = 3
    down.fill_(NAN)[fire] = torch.randn(59, 64).to(BF16)
    got = run_few(host, 0, (x, up, up_bias, down, down_bias, None, None, None), *sizes, 3, cluster, 1)
    wider = [torch.full(size, value).to(BF16) for size, value in (((256, 64), 0.0), ((256, 64), NAN), ((256,), -9.0))]
    for wide, tensor in zip(wider, (up, down, up_bias)):
        wide[fire + 64 * (fire > 30)] = tensor[fire]
    wide = run_few(
        host, 0, (x, wider[0], wider[2], wider[1], down_bias, None, None, None), 3, 64, 256, 64, 3, cluster, 1
    )
    assert same_bits(got, wide) and got.isfinite().all()
    silent = run_few(
        host, 0, (x, up, torch.full_like(up_bias, -1000), down, down_bias, None, None, None), *sizes, 3, cluster, 1
    )
    assert same_bits(silent, down_bias.expand(3, -1))
