// packed gradient of h = (grad[T, D] @ weight[D, H], at the entries that metadata keeps, rounded) * 2 sqrt(packed), rounded again:
// the gradient of relu(h)^2, 2:4 as its result was. A matmul (see tiles.cuh) whose result goes to memory at half its size.
//
// After the exchange a thread has 16 neighbouring columns of each 64, in two rows: whole groups of four, of which its words of
// metadata and of packed values tell which entries count and by how much.

#include "tiles.cuh"

struct GradHidden {
  const TensorMap &a_map, &lower_map, &b_map;
  const u16* packed;
  const uint4* metadata;
  u16* out;
  const Shape& shape;

  __device__ __forceinline__ OfColumns of_columns() const { return {nullptr, nullptr}; }

  __device__ __forceinline__ uint4 of_rows(const Tile& tile) const {
    const int block = min(place_of(tile).row / 16, (shape.tokens - 1) / 16);
    return __ldg(metadata + ((i64)block * shape.column_tiles + tile.column / TILE_N) * 32 + thread_index() % 32);
  }

  template <class Meanwhile>
  __device__ __forceinline__ void multiply(float (&d)[TILE_N / 2], Ring& ring, const Tile& tile, const Meanwhile& meanwhile) const {
    // What the end of the tile reads of a warp's 16 rows: two lines of packed each, and four of metadata.
    const int thread = thread_index(), first = tile.row + thread / 32 * 16, lane = thread % 32;
    const int row = first + lane / 2, column = tile.column + lane % 2 * 128;
    if (row < shape.tokens && column < shape.columns) prefetch(packed + ((i64)row * shape.columns + column) / 2);
    if (lane < 4 && first < shape.tokens) prefetch(metadata + ((i64)(first / 16) * shape.column_tiles + tile.column / TILE_N) * 32 + 8 * lane);
    multiply_dense(d, ring, shape.stages, meanwhile);
  }

  __device__ __forceinline__ void store(const float (&d)[TILE_N / 2], const Tile& tile, const uint4& rows, const Ring& ring) const {
    const Place place = place_of(tile);
    const i64 line = (i64)place.row * (shape.columns / 2) + place.column / 2;
    const u32 codes[4] = {rows.x, rows.y, rows.z, rows.w};
    const auto squares_of = [&](int s, int half) {
      const bool inside = place.row + 8 * half < shape.tokens && tile.column + 64 * s < shape.columns;
      return inside ? __ldg((const uint4*)(packed + line + 8 * half * (i64)(shape.columns / 2) + 32 * s)) : uint4();
    };
    uint4 squares[2];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      if (s > 0 && tile.column + 64 * s >= shape.columns) return;
      if (s < 2) squares[0] = squares_of(s, 0), squares[1] = squares_of(s, 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        u32 words[2][4];  // of columns 0 to 7 and 8 to 15 of the thread's
#pragma unroll
        for (int a = 0; a < 8; ++a) {
          const float* v = d + 32 * s + 4 * a + 2 * half;
          words[a % 2][a / 2] = pack_floats(v[0], v[1]);
        }
        exchange(words[0]), exchange(words[1]);
        const u32 square[4] = {squares[half].x, squares[half].y, squares[half].z, squares[half].w};
        if (s == 1 || s == 2) squares[half] = squares_of(s + 1, half);  // ahead, now that there are registers
        u32 kept[4];
#pragma unroll
        for (int group = 0; group < 4; ++group) {
          const u32 code = codes[s] >> (16 * half + 4 * group);
          const u32 selector = 0x1010 + (code & 3) * 0x22 + (code >> 2 & 3) * 0x2200;
          const u32 two = __byte_perm(words[group / 2][group % 2 * 2], words[group / 2][group % 2 * 2 + 1], selector);
          const u32 roots = pack_floats(root(low_float(square[group])), root(high_float(square[group])));
          kept[group] = pack_floats(low_float(two) * (2 * low_float(roots)), high_float(two) * (2 * high_float(roots)));
        }
        u16* to = out + line + 8 * half * (i64)(shape.columns / 2) + 32 * s;
        if (place.row + 8 * half < shape.tokens) store_four(to, make_uint4(kept[0], kept[1], kept[2], kept[3]));
      }
    }
  }
};

MATMUL grad_hidden(const __grid_constant__ TensorMap grad_map, const __grid_constant__ TensorMap lower_map,
                   const __grid_constant__ TensorMap weight_map, const u16* __restrict__ packed, const uint4* __restrict__ metadata,
                   u16* __restrict__ out, const __grid_constant__ Shape shape) {
  walk(GradHidden{grad_map, lower_map, weight_map, packed, metadata, out, shape}, shape);
}
