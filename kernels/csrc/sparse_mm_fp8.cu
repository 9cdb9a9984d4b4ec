// out[T, D] = (unpack(packed[T, H/2], metadata) @ weight[D, H]^T) * row_scale[T] * weight_scale[D] + bias[D]: e4m3 operands, fp32
// accumulation, 16-bit floats out. See tiles.cuh, to which two neighbouring e4m3 are one element of 16 bits.

#include "tiles.cuh"

struct SparseMM {
  const TensorMap &a_map, &lower_map, &b_map;
  const uint4* metadata;
  const u16* bias;
  u16* out;
  const float *row_scale, *weight_scale;
  const Shape& shape;

  __device__ __forceinline__ OfColumns of_columns() const { return {bias, weight_scale}; }

  __device__ __forceinline__ float2 of_rows(const Tile& tile) const {
    const int row = place_of(tile).row, last = shape.tokens - 1;
    return make_float2(__ldg(row_scale + min(row, last)), __ldg(row_scale + min(row + 8, last)));
  }

  template <class Meanwhile>
  __device__ __forceinline__ void multiply(float (&d)[TILE_N / 2], Ring& ring, const Tile& tile, const Meanwhile& meanwhile) const {
    // A warp's block of metadata, 16 rows by 256 entries, two stages; beyond the last row the last one: what comes of it is not
    // stored.
    const int block = min(tile.row / 16 + (int)thread_index() / 32, (shape.tokens - 1) / 16);
    u32 at = (u32)block * (shape.stages / 2) * 32 + thread_index() % 32;  // 32 bits count 64 GB
    uint4 next = load_metadata(metadata + at);
    for (int left = shape.stages / 2; left > 0; --left) {
      const u32 codes[4] = {of_one_row(next.x), of_one_row(next.y), of_one_row(next.z), of_one_row(next.w)};
      if (left > 1) at += 32;
      next = load_metadata(metadata + at);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const u64 a = a_descriptor(ring), b = b_descriptor(ring);
        ring.wait();
        wgmma_fence();
        wgmma_sparse_e4m3(d, a, b, codes[2 * part]);
        wgmma_sparse_e4m3(d, a + A_STEP, b + B_STEP, codes[2 * part + 1]);
        wgmma_commit();
        if (part == 0) {
          ring.next();
          continue;
        }
        wgmma_wait<0>();  // before the metadata's registers are written again: see sparse_mm.cu
        ring.release(ring.previous());
        ring.release(ring.at);
        ring.next();
      }
    }
    meanwhile();
  }

  // For 8-bit types thread q of a quad has row g + 8 (q % 2), entries 32 (q / 2) to 32 (q / 2) + 31 of each 64; in memory it has 16
  // entries of both rows. So neighbours exchange a half.
  __device__ __forceinline__ static u32 of_one_row(u32 word) {
    const u32 other = __shfl_xor_sync(~0u, word, 1);
    return thread_index() % 2 ? permute_bytes<0x7632>(other, word) : permute_bytes<0x5410>(word, other);
  }

  __device__ __forceinline__ void store(const float (&d)[TILE_N / 2], const Tile& tile, const float2& scales, const Ring& ring) const {
    const Place place = place_of(tile);
    u16* line = out + (i64)place.row * shape.columns + place.column;
    const float row_scales[2] = {scales.x, scales.y};
#pragma unroll
    for (int i = 0; i < TILE_N / 4; i += 8) {  // eight of a thread's columns
      const int column = RUN / 8 * i;
      if (i > 0 && tile.column + column >= shape.columns) return;
      const int at = place.column - tile.column + column;
      u32 words[2][4];
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const u32 biases = load_shared(ring.biases() + 2 * at + 4 * a);
        const uint2 factors = load_shared_two(ring.scales() + 4 * at + 8 * a);
        const float x = __uint_as_float(factors.x), y = __uint_as_float(factors.y);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* v = d + 2 * i + 4 * a + 2 * half;
          words[half][a] = pack_floats(v[0] * row_scales[half] * x + low_float(biases),
                                       v[1] * row_scales[half] * y + high_float(biases));
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (place.row + 8 * half >= shape.tokens) continue;
        const u32(&w)[4] = words[half];
        store_four(line + 8 * half * (i64)shape.columns + column, make_uint4(w[0], w[1], w[2], w[3]));
      }
    }
  }
};

MATMUL sparse_mm_fp8(const __grid_constant__ TensorMap packed_map, const __grid_constant__ TensorMap lower_map,
                     const __grid_constant__ TensorMap weight_map, const uint4* __restrict__ metadata,
                     const u16* __restrict__ bias, u16* __restrict__ out, const float* __restrict__ row_scale,
                     const float* __restrict__ weight_scale, const __grid_constant__ Shape shape) {
  walk(SparseMM{packed_map, lower_map, weight_map, metadata, bias, out, row_scale, weight_scale, shape}, shape);
}
