// packed, metadata = the two largest of every four relu(h)^2, h = x[T, D] @ weight[H, D]^T + bias[H] rounded to 16-bit floats:
// a matmul (see tiles.cuh) whose result never goes to memory but packed.
//
// A thread's results (see tiles.cuh) are whole groups of four in 16 columns of two rows, whose kept values fill 16 bytes and
// whose codes are just what it has to store as metadata.

#include "keep.cuh"
#include "tiles.cuh"

struct LinearRelu2Sparsify {
  const TensorMap &a_map, &lower_map, &b_map;
  const u16* bias;
  u16* packed;
  uint4* metadata;
  const Shape& shape;

  __device__ __forceinline__ OfColumns of_columns() const { return {bias, nullptr}; }

  __device__ __forceinline__ NoRows of_rows(const Tile& tile) const { return {}; }

  template <class Meanwhile>
  __device__ __forceinline__ void multiply(float (&d)[TILE_N / 2], Ring& ring, const Tile& tile, const Meanwhile& meanwhile) const {
    multiply_dense(d, ring, shape.stages, meanwhile);
  }

  __device__ __forceinline__ void store(const float (&d)[TILE_N / 2], const Tile& tile, const NoRows&, const Ring& ring) const {
    const Place place = place_of(tile);
    const int row = place.row;
    u16* line = packed + (i64)row * (shape.columns / 2) + place.column / 2;
    u32 codes[4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      codes[s] = 0x44444444u;
      if (s > 0 && tile.column + 64 * s >= shape.columns) continue;
      const u32 biases = ring.biases() + 2 * (place.column - tile.column + 64 * s);
      u32 upper[4], lower[4], word = 0;
#pragma unroll
      for (int group = 0; group < 4; ++group) {
        const uint2 four_biases = load_shared_two(biases + 8 * group);
        const u32 two[2] = {four_biases.x, four_biases.y};
        u32 k[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* v = d + 32 * s + 8 * group + i / 2 * 4 + i % 2;
          const float one = i % 2 ? high_float(two[i / 2]) : low_float(two[i / 2]);
          k[i] = pack_relu(v[0] + one, v[2] + one);
        }
        const Kept kept = keep_two_of_four(k[0], k[1], k[2], k[3], 4 * group);
        upper[group] = permute_bytes<0x5410>(kept.first, kept.second);
        lower[group] = permute_bytes<0x7632>(kept.first, kept.second);
        word |= kept.codes;
      }
      codes[s] = word;
      if (row < shape.tokens) store_four(line + 32 * s, make_uint4(upper[0], upper[1], upper[2], upper[3]));
      if (row + 8 < shape.tokens) {
        store_four(line + 8 * (i64)(shape.columns / 2) + 32 * s, make_uint4(lower[0], lower[1], lower[2], lower[3]));
      }
    }
    store_codes(metadata, codes, tile, row, shape);
  }
};

MATMUL linear_relu2_sparsify(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap lower_map,
                             const __grid_constant__ TensorMap weight_map, const u16* __restrict__ bias,
                             u16* __restrict__ packed, uint4* __restrict__ metadata, const __grid_constant__ Shape shape) {
  walk(LinearRelu2Sparsify{x_map, lower_map, weight_map, bias, packed, metadata, shape}, shape);
}
