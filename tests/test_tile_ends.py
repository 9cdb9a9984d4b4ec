"""The ends of the matmuls' tiles, compiled for the CPU: their own source, given the products that tensor cores leave.

Which thread has which element, what neighbours exchange, and where all goes: on sizes whose tiles end within rows,
columns and blocks of metadata. The products themselves, and what brings in their operands, need a GPU.
"""

import ctypes
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_host import built, pointer, poisoned

from ao_act24.kernels import compile, plans, reference, schedule

BF16 = torch.bfloat16
# What tiles.cuh and the kernels name beside what stand_in.h has. Shared memory beside the stages begins at 0.
STAND_INS = """
#include "stand_in.h"
#define __maxnreg__(...)
#define __cluster_dims__(...)
#define __grid_constant__
struct TensorMap {};
struct int2 { int x, y; };
struct int4 { int x, y, z, w; };
inline u32 thread_index() { return threadIdx.x; }
inline int uniform(u32 value) { return (int)value; }
inline void barrier_arrive(u32, u32) {}
inline void barrier_wait(u32, u32) {}
inline void copy_box(u32, const TensorMap&, int, int, int, u32) {}
inline void copy_box_to(u16, u32, const TensorMap&, int, int, int, int, int, u32) {}
template <class T> T load(u32 shared) { T value; memcpy(&value, arena + shared, sizeof(T)); return value; }
inline u32 load_shared(u32 shared) { return load<u32>(shared); }
inline uint2 load_shared_two(u32 shared) { return load<uint2>(shared); }
inline uint4 load_shared_four(u32 shared) { return load<uint4>(shared); }
inline void store_shared_four(u32 shared, uint4 four) { memcpy(arena + shared, &four, 16); }
template <int BYTES> u64 mn_major_descriptor(u32) { return 0; }
template <int BYTES> u64 k_major_descriptor(u32) { return 0; }
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int LEFT> void wgmma_wait() {}
template <int, bool, bool> void wgmma_sparse(float (&)[128], u64, u64, u32) {}
template <bool, bool> void wgmma_dense(float (&)[128], u64, u64) {}
inline void wgmma_dense_e4m3(float (&)[128], u64, u64) {}
inline void wgmma_sparse_e4m3(float (&)[128], u64, u64, u32) {}
inline float __uint_as_float(u32 bits) { float value; memcpy(&value, &bits, 4); return value; }
inline uint4 load_metadata(const uint4* pointer) { return *pointer; }
inline void prefetch(const void*) {}
inline float root(float x) { return std::sqrt(x); }
inline u32 pack_relu(float low, float high) { return relu(pack_floats(low, high)); }
inline u32 transpose(u32 word) {  // thread 4 r + c has columns 2 c and 2 c + 1 of row r, and gets rows of column r
  return of_warp(word, [](auto of) {
    const int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    const auto element = [&](int row) { return of(4 * row + r / 2) >> (16 * (r % 2)) & 0xFFFF; };
    return element(2 * c) | element(2 * c + 1) << 16;
  });
}
"""
# In place of what multiplies. Warps come one after another: what they show each other they show within one.
WALK = """
inline const float* products;  // [tokens, columns]
template <class Kernel>
void walk(const Kernel& kernel, const Shape& shape) {
  const int lane = threadIdx.x;
  const Ring ring = {0, 0, 0, 0};
  __syncwarp();
  Tile tile;
  for (int rank = 0; rank < CLUSTER; ++rank) {
    for (int position = 0; tile_at(shape, position, 1, 0, rank, tile); ++position) {
      for (int i = lane; i < TILE_N; i += 32) {
        const OfColumns all = kernel.of_columns();
        const bool there = tile.column + i < shape.columns;
        const u16 bias = all.bias != nullptr && there ? all.bias[tile.column + i] : 0;
        const float scale = all.scale != nullptr && there ? all.scale[tile.column + i] : 1;
        memcpy(arena + ring.biases() + 2 * i, &bias, 2), memcpy(arena + ring.scales() + 4 * i, &scale, 4);
      }
      __syncwarp();
      for (int warp = 0; warp < 4 * tile.height; ++warp) {
        threadIdx.x = 32 * warp + lane;
        const int g = lane / 4, q = lane % 4;
        float d[TILE_N / 2];
        for (int i = 0; i < TILE_N / 2; ++i) {  // as wgmma leaves them: columns 8 a + 2 q + b of rows g and g + 8
          const int a = i / 4, b = i % 2, row = tile.row + 16 * warp + g + 8 * (i / 2 % 2);
          const int inside = B_MN ? 8 * a + 2 * q + b : 8 * a / RUN * RUN + RUN / 4 * q + 2 * (a % (RUN / 8)) + b;
          const bool there = row < shape.tokens && tile.column + inside < shape.columns;
          d[i] = there ? products[(i64)row * shape.columns + tile.column + inside] : 7;
        }
        const auto rows = kernel.of_rows(tile);
        kernel.store(d, tile, rows, ring);
        __syncwarp();
      }
      threadIdx.x = lane;
    }
  }
}
"""
RUN = """
extern "C" void run_%s(const float* of_products, const Shape* shape, %s) {
  products = of_products;
  std::vector<std::thread> threads;
  for (int lane = 0; lane < 32; ++lane) {
    threads.emplace_back([=] {
      threadIdx = {lane, 0};
      %s;
    });
  }
  for (auto& thread : threads) thread.join();
}
"""
NONE = "TensorMap(), TensorMap(), TensorMap()"
SPARSE = (
    "const uint4* metadata, const u16* bias, u16* out, const u16* exact, const int* slots",
    f"sparse_mm({NONE}, TensorMap(), metadata, bias, out, exact, slots, *shape)",
)
ENTRIES = {  # parameters and call, by source
    "sparse_mm": SPARSE,
    "linear_relu2_sparsify": (
        "const u16* bias, u16* packed, uint4* metadata",
        f"linear_relu2_sparsify({NONE}, bias, packed, metadata, *shape)",
    ),
    "grad_hidden": (
        "const u16* packed, const uint4* metadata, u16* out",
        f"grad_hidden({NONE}, packed, metadata, out, *shape)",
    ),
    "sparse_mm_fp8": (
        "const uint4* metadata, const u16* bias, u16* out, const float* row_scale, const float* weight_scale",
        f"sparse_mm_fp8({NONE}, metadata, bias, out, row_scale, weight_scale, *shape)",
    ),
    "linear_relu2_sparsify_fp8": (
        "const u16* bias, u16* kept, uint4* metadata, const float* x_scale, const float* weight_scale, u16* parts",
        f"linear_relu2_sparsify_fp8({NONE}, bias, kept, metadata, x_scale, weight_scale, parts, *shape)",
    ),
}


@pytest.fixture(scope="module")
def end(tmp_path_factory):
    """Run the end of each tile: ``end(name, products, *pointers)``."""
    path = tmp_path_factory.mktemp("ends")
    for name in ("layout.cuh", "keep.cuh", "schedule.cuh", *(f"{source}.cu" for source in ENTRIES)):
        shutil.copy(compile.CSRC / name, path)
    shutil.copy(Path(__file__).parent / "stand_in.h", path)
    (path / "ptx.cuh").write_text("#pragma once\n" + STAND_INS)
    tiles = (compile.CSRC / "tiles.cuh").read_text()
    begin = tiles.index("template <class Kernel>\n__device__ __forceinline__ void walk(")
    (path / "tiles.cuh").write_text(tiles[:begin] + WALK)

    def build(name):
        source, defines = plans.source(name), plans.matmul_defines(name, BF16)
        lines = [f"#define {macro} {value}" for macro, value in defines.items()]
        code = "\n".join(['#include "ptx.cuh"', *lines, f'#include "{source}.cu"', RUN % (name, *ENTRIES[source])])
        (path / f"{name}.cpp").write_text(code)
        return built(path, name, f"{name}.cpp")

    with ThreadPoolExecutor(2) as pool:
        libraries = dict(zip(plans.DEFINES, pool.map(build, plans.DEFINES)))

    def call(name, products, *tensors):
        shape, clusters = schedule.share_out(*products.shape, 4, 1)
        assert clusters == 1
        getattr(libraries[name], f"run_{name}")(pointer(products), ctypes.byref(shape), *map(pointer, tensors))

    return call


def integers(*shape, most=3):
    return torch.randint(-most, most + 1, shape).float()


SIZES = [(1, 64), (13, 192), (200, 320), (389, 576)]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_packing(size, with_bias, end):
    h, bias = torch.randn(size), torch.randn(size[1]).to(BF16)
    want = reference.relu2_sparsify((h + bias.float() if with_bias else h).to(BF16))
    got = [*map(poisoned, want)]
    end("linear_relu2_sparsify", h, bias if with_bias else None, *got)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("name", ["sparse_mm", "sparse_mm_mn"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_results(size, name, end):
    products, bias = integers(*size), integers(size[1]).to(BF16)
    for each in (bias, None):
        want = (products if each is None else products + each.float()).to(BF16)
        got = poisoned(want)
        end(name, products, None, each, got, None, None)
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", [name for name in plans.DEFINES if "wise" in name])
@pytest.mark.parametrize("size", [(64, 64), (192, 128), (448, 320)], ids=str)
def test_gradients_of_weights(size, name, end):
    """Some features' rows come from elsewhere."""
    products, slots = integers(*size), torch.full(size[:1], -1, dtype=torch.int32)
    chosen = torch.randperm(size[0])[: size[0] // 8]
    exact, slots[chosen] = integers(len(chosen), size[1]).to(BF16), torch.arange(len(chosen), dtype=torch.int32)
    want = products.to(BF16)
    want[chosen] = exact
    want = want.t().contiguous() if "transposed" in name else want
    got = poisoned(want)
    end(name, products, None, None, got, exact, slots)
    assert torch.equal(got, want)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_gradient_of_the_hidden_activation(size, end):
    products = integers(*size)
    packed, metadata = reference.relu2_sparsify(integers(*size).to(BF16))
    want = reference.gather(products.to(BF16), metadata) * (packed.sqrt() * 2)
    got = poisoned(want)
    end("grad_hidden", products, packed, metadata, got)
    assert torch.equal(got, want)


def powers(count):
    return 2.0 ** torch.randint(-2, 3, (count,))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_results_in_fp8(size, end):
    products, bias, row_scale, weight_scale = integers(*size), integers(size[1]).to(BF16), *map(powers, size)
    want = (products * row_scale[:, None] * weight_scale + bias.float()).to(BF16)
    got = poisoned(want)
    end("sparse_mm_fp8", products, None, bias, got, row_scale, weight_scale)
    assert torch.equal(got, want)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_packing_in_fp8(size, end):
    """Before squares become e4m3: what is kept of relu(h), and the largest of each row in each tile."""
    products, bias, x_scale, weight_scale = torch.randn(size).half().float(), integers(size[1]), *map(powers, size)
    relu = (products * x_scale[:, None] * weight_scale + bias).to(BF16).clamp_min(0)
    parts = torch.stack([tile.amax(1) for tile in relu.split(schedule.TILE_COLUMNS, 1)], 1)
    want = *reference.sparsify(relu), parts
    got = kept, metadata, largest = [*map(poisoned, want)]
    end("linear_relu2_sparsify_fp8", products, bias.to(BF16), kept, metadata, x_scale, weight_scale, largest)
    assert all(map(torch.equal, got, want))
