"""The kernels that need no tensor cores, compiled for the CPU: their own source, on stand-ins for CUDA's threads."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ao_act24.kernels import compile, reference

BF16 = torch.bfloat16
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
                      i64 quarter, i64 width, i64 stride, bool counted) {
  const auto run = [=](auto kernel, auto* kind) {
    launch(kernel, (width + 255) / 256, (quarter + 63) / 64, packed, metadata, wise, codes, kind, left, quarter, width,
           stride);
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
    (path / "main.cpp").write_text(MAIN)
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["g++", *options, "main.cpp", "-o", "host.so"], check=True, cwd=path)
    library = ctypes.CDLL(str(path / "host.so"))

    def call(name, *arguments):
        made = [
            ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_longlong(a) for a in arguments
        ]
        getattr(library, name)(*made)

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
    ("sequences", "tokens", "hidden_dim"),
    [(1, 4, 64), (1, 130, 192), (1, 1030, 128), (1, 1072, 576), (8, 512, 128), (12, 768, 64)],
)
def test_feature_wise(sequences, tokens, hidden_dim, permuted, counted, host):
    h = hidden(tokens, hidden_dim)
    h[1, :2] = float("nan")
    packed, metadata = reference.sparsify(h.view(sequences, -1, hidden_dim))
    stride = permuted and {8: 32, 12: 96}.get(sequences, tokens // 4)
    wise, codes, totals, left = reference.feature_wise(packed, metadata, permuted, counted)
    got = poisoned(wise), poisoned(codes)
    partial = torch.full((-(-(tokens // 4) // 64), hidden_dim), 7, dtype=totals.dtype)
    zeros = poisoned(left)
    host("run_feature_wise", packed, metadata, *got, partial, zeros, tokens // 4, hidden_dim, stride, counted)
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
