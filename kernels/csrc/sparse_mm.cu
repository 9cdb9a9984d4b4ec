// out[T, D] = unpack(packed[T, H/2], metadata) @ weight[D, H]^T + bias[D], 16-bit floats, fp32 accumulation. See tiles.cuh.
//
// Compile-time: ELEMENT ("bf16" or "f16"), CLUSTER (a power of 2), STAGES.

#include "tiles.cuh"

struct SparseMM {
  static constexpr int A_BYTES = ROWS * K, STAGE_BYTES = A_BYTES + B_BYTES;  // half of A's columns stored, two bytes each

  const TensorMap &packed_map, &weight_map;
  const uint4* metadata;
  const u16* bias;
  u16* out;
  const Shape& shape;

  __device__ __forceinline__ void bring(u32 a, u32 b, u32 ready, int k, const Tile& tile, u32 rank) const {
    copy_box(a, packed_map, k * (K / 2), tile.row, ready);
    bring_b(b, weight_map, ready, k, tile, rank);
  }

  __device__ __forceinline__ void multiply(float (&d)[TILE_N / 2], Ring& ring, const Tile& tile, const Segment& segment) const {
    // A warp's block of metadata, 16 rows by a group; beyond the last row the last one: what comes of it is not stored.
    const int block = min(tile.row / 16 + (int)ring.thread / 32, (shape.tokens - 1) / 16);
    u32 at = (block * shape.groups + segment.first) * 32 + ring.thread % 32;  // 32 bits count 64 GB
    uint4 next = load_metadata(metadata + at);
    for (int left = segment.last - segment.first; left > 0; --left) {
      const u32 codes[4] = {next.x, next.y, next.z, next.w};
      if (left > 1) at += 32;
      next = load_metadata(metadata + at);
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const u32 a = ring.base + ring.stage * STAGE_BYTES;
        const u64 a_tile = matrix_descriptor<64>(a + ring.thread / 128 * (64 * K)), b_tile = matrix_descriptor<128>(a + A_BYTES);
        ring.wait();
        wgmma_fence();
        // Threads 0 and 1 of a quad hold the first step's codes, of columns 0-15 and 16-31, threads 2 and 3 the second's.
        wgmma_sparse<0>(d, a_tile, b_tile, codes[part]);
        wgmma_sparse<1>(d, a_tile + (32 >> 4), b_tile + (64 >> 4), codes[part]);
        wgmma_commit();
        // A stage may be filled again once it has been read. The metadata's registers may be written again only when all is
        // done: wgmma reads them while it runs, and the compiler does not know.
        if (part == 3) wgmma_wait<0>();
        else if (part > 0) wgmma_wait<1>();
        if (part > 0) ring.release(ring.previous());
        if (part == 3) ring.release(ring.stage);
        ring.next();
      }
    }
  }

  __device__ __forceinline__ void store(const float (&d)[TILE_N / 2], const Tile& tile) const {
    const Place place = place_of(tile);
    u16* line = out + (i64)place.row * shape.columns + place.column;
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      if (tile.column + 64 * s >= shape.columns) return;
      u32 biases[8] = {};
      if (bias != nullptr) load_sixteen(biases, bias + place.column + 64 * s);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        u32 words[8];
#pragma unroll
        for (int a = 0; a < 8; ++a) {
          const float* v = d + 32 * s + 4 * a + 2 * half;
          words[a] = pack_floats(v[0] + low_float(biases[a]), v[1] + high_float(biases[a]));
        }
        if (place.row + 8 * half >= shape.tokens) continue;
        u16* to = line + 8 * half * (i64)shape.columns + 64 * s;
        store_four(to, make_uint4(words[0], words[1], words[2], words[3]));
        store_four(to + 8, make_uint4(words[4], words[5], words[6], words[7]));
      }
    }
  }
};

MATMUL sparse_mm(const __grid_constant__ TensorMap packed_map, const __grid_constant__ TensorMap weight_map,
                 const uint4* __restrict__ metadata, const u16* __restrict__ bias, u16* __restrict__ out,
                 float4* __restrict__ partial, u32* __restrict__ flags, const __grid_constant__ Shape shape) {
  walk(SparseMM{packed_map, weight_map, metadata, bias, out, shape}, shape, partial, flags);
}
