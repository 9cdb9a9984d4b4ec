// kept, metadata = the two largest of every four relu(h), h = (x[T, D] @ weight[H, D]^T) * x_scale[T] * weight_scale[H] + bias[H]
// rounded to 16-bit floats; and the largest of each row in each tile. e4m3 operands: see tiles.cuh, to which two neighbouring e4m3
// are one element of 16 bits.
//
// The squares become e4m3 when the largest of the whole row is known: square_to_fp8.cu. What is stored of h meanwhile is half of it,
// and h itself never is. A thread's results are as in linear_relu2_sparsify.cu.

#include "keep.cuh"
#include "tiles.cuh"

struct LinearRelu2Sparsify {
  const TensorMap &a_map, &lower_map, &b_map;
  const u16* bias;
  u16* kept;
  uint4* metadata;
  const float *x_scale, *weight_scale;
  u16* parts;
  const Shape& shape;

  __device__ __forceinline__ OfColumns of_columns() const { return {bias, weight_scale}; }

  __device__ __forceinline__ float2 of_rows(const Tile& tile) const {
    const int row = place_of(tile).row, last = shape.tokens - 1;
    return make_float2(__ldg(x_scale + min(row, last)), __ldg(x_scale + min(row + 8, last)));
  }

  template <class Meanwhile>
  __device__ __forceinline__ void multiply(float (&d)[TILE_N / 2], Ring& ring, const Tile& tile, const Meanwhile& meanwhile) const {
    multiply_dense<true>(d, ring, shape.stages, meanwhile);
  }

  __device__ __forceinline__ void store(const float (&d)[TILE_N / 2], const Tile& tile, const float2& scales, const Ring& ring) const {
    const Place place = place_of(tile);
    const int row = place.row;
    u16* line = kept + (i64)row * (shape.columns / 2) + place.column / 2;
    u32 codes[4], largest = 0;  // of row g in the low, of row g + 8 in the high half
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      codes[s] = 0x44444444u;
      if (s > 0 && tile.column + 64 * s >= shape.columns) continue;
      const int column = place.column - tile.column + 64 * s;
      u32 upper[4], lower[4], word = 0;
#pragma unroll
      for (int group = 0; group < 4; ++group) {
        const uint2 two = load_shared_two(ring.biases() + 2 * column + 8 * group);
        const u32 biases[2] = {two.x, two.y};
        const uint4 factors = load_shared_four(ring.scales() + 4 * column + 16 * group);
        const float of_columns[4] = {__uint_as_float(factors.x), __uint_as_float(factors.y), __uint_as_float(factors.z),
                                     __uint_as_float(factors.w)};
        u32 k[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* v = d + 32 * s + 8 * group + i / 2 * 4 + i % 2;
          const float one = i % 2 ? high_float(biases[i / 2]) : low_float(biases[i / 2]);
          k[i] = pack_relu(v[0] * scales.x * of_columns[i] + one, v[2] * scales.y * of_columns[i] + one);
        }
        const Two of_four = two_of_four(k[0], k[1], k[2], k[3]);
        const u32 first = of_four.first(k[0], k[1], k[2]), second = of_four.second(k[1], k[2], k[3]);
        largest = __vmaxu2(largest, __vmaxu2(first, second));
        upper[group] = permute_bytes<0x5410>(first, second);
        lower[group] = permute_bytes<0x7632>(first, second);
        word |= of_four.codes(4 * group);
      }
      codes[s] = word;
      if (row < shape.tokens) store_four(line + 32 * s, make_uint4(upper[0], upper[1], upper[2], upper[3]));
      if (row + 8 < shape.tokens) {
        store_four(line + 8 * (i64)(shape.columns / 2) + 32 * s, make_uint4(lower[0], lower[1], lower[2], lower[3]));
      }
    }
    largest = __vmaxu2(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = __vmaxu2(largest, __shfl_xor_sync(~0u, largest, 2));
    if (thread_index() % 4 == 0) {
      u16* to = parts + (i64)row * shape.column_tiles + tile.column / TILE_N;
      if (row < shape.tokens) to[0] = (u16)largest;
      if (row + 8 < shape.tokens) to[8 * (i64)shape.column_tiles] = (u16)(largest >> 16);
    }
    store_codes(metadata, codes, tile, row, shape);
  }
};

MATMUL linear_relu2_sparsify_fp8(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap lower_map,
                                 const __grid_constant__ TensorMap weight_map, const u16* __restrict__ bias,
                                 u16* __restrict__ kept, uint4* __restrict__ metadata, const float* __restrict__ x_scale,
                                 const float* __restrict__ weight_scale, u16* __restrict__ parts,
                                 const __grid_constant__ Shape shape) {
  walk(LinearRelu2Sparsify{x_map, lower_map, weight_map, bias, kept, metadata, x_scale, weight_scale, parts, shape}, shape);
}
