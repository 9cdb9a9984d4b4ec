// out[T, D] = unpack(packed[T, H/2], metadata) @ weight[D, H]^T + bias[D], 16-bit floats, fp32 accumulation. See tiles.cuh.
//
// With B_MN, weight is [H, D]: the gradient of x, or a weight that has a row for each neuron. With A_MN besides, packed is [T/2, H],
// metadata [H, T], weight [T, D] and out [H, D], or TRANSPOSED [D, H], two of every four tokens being kept for each feature: the gradient
// of a weight. Features whose slot is not negative get that row of `exact` instead.

#include "tiles.cuh"

struct SparseMM {
  const TensorMap &a_map, &lower_map, &b_map, &last_map;
  const uint4* metadata;
  const u16* bias;
  u16* out;
  const u16* exact;
  const int* slots;
  const Shape& shape;

  __device__ __forceinline__ OfColumns of_columns() const { return {A_MN ? nullptr : bias, nullptr}; }

  __device__ __forceinline__ int2 of_rows(const Tile& tile) const {
    const int row = place_of(tile).row;
    if (!A_MN || TRANSPOSED || row >= shape.tokens) return {-1, -1};
    return {__ldg(slots + row), __ldg(slots + row + 8)};
  }

  template <class Meanwhile>
  __device__ __forceinline__ void multiply(float (&d)[TILE_N / 2], Ring& ring, const Tile& tile, const Meanwhile& meanwhile) const {
    // A warp's block of metadata, 16 rows by a group; beyond the last row the last one: what comes of it is not stored.
    const int block = min(tile.row / 16 + (int)thread_index() / 32, (shape.tokens - 1) / 16);
    u32 at = (u32)block * (shape.stages / 4) * 32 + thread_index() % 32;  // 32 bits count 64 GB
    uint4 next = load_metadata(metadata + at);
    for (int left = shape.stages / 4; left > 0; --left) {
      const u32 codes[4] = {next.x, next.y, next.z, next.w};
      if (left > 1) at += 32;
      next = load_metadata(metadata + at);
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const u64 a = a_descriptor(ring), b = b_descriptor(ring);
        ring.wait();
        wgmma_fence();
        // Threads 0 and 1 of a quad hold the first step's codes, of columns 0-15 and 16-31, threads 2 and 3 the second's.
        wgmma_sparse<0, A_MN, B_MN>(d, a, b, codes[part]);
        wgmma_sparse<1, A_MN, B_MN>(d, a + A_STEP, b + B_STEP, codes[part]);
        wgmma_commit();
        // A stage may be filled again once it has been read. The metadata's registers may be written again only when all is
        // done: wgmma reads them while it runs, and the compiler does not know.
        if (part == 3) wgmma_wait<0>();
        else if (part > 0) wgmma_wait<1>();
        if (part > 0) ring.release(ring.previous());
        if (part == 3) ring.release(ring.at);
        ring.next();
      }
    }
    meanwhile();
  }

  __device__ __forceinline__ void store(const float (&d)[TILE_N / 2], const Tile& tile, const int2& rows, const Ring& ring) const {
    if (TRANSPOSED) return store_transposed(d, tile);
    const Place place = place_of(tile);
    u16* line = out + (i64)place.row * shape.columns + place.column;
    const int slot[2] = {rows.x, rows.y};
#pragma unroll
    for (int i = 0; i < TILE_N / 4; i += 8) {  // eight of a thread's columns
      const int column = RUN / 8 * i;
      if (tile.column + column >= shape.columns) return;
      const uint4 biases = A_MN ? uint4() : biases_of(ring.biases() + 2 * column, place.column - tile.column);
      const u32 two[4] = {biases.x, biases.y, biases.z, biases.w};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        u32 words[4];
#pragma unroll
        for (int a = 0; a < 4; ++a) {
          const float* v = d + 2 * i + 4 * a + 2 * half;
          words[a] = pack_floats(v[0] + low_float(two[a]), v[1] + high_float(two[a]));
        }
        if (B_MN) exchange(words);
        if (place.row + 8 * half >= shape.tokens) continue;
        uint4 eight = make_uint4(words[0], words[1], words[2], words[3]);
        if (slot[half] >= 0) eight = __ldg((const uint4*)(exact + (i64)slot[half] * shape.columns + place.column + column));
        store_four(line + 8 * half * (i64)shape.columns + column, eight);
      }
    }
  }

  // Of a thread's eight columns, before they are exchanged.
  __device__ __forceinline__ static uint4 biases_of(u32 biases, int first) {
    if (!B_MN) return load_shared_four(biases + 2 * first);
    const u32 words = biases + thread_index() % 4 * 4;
    return make_uint4(load_shared(words), load_shared(words + 16), load_shared(words + 32), load_shared(words + 48));
  }

  // Of eight rows.
  __device__ __forceinline__ bool any_slot(int first) const {
    const int4 low = __ldg((const int4*)(slots + first)), high = __ldg((const int4*)(slots + first + 4));
    return (low.x & low.y & low.z & low.w & high.x & high.y & high.z & high.w) >= 0;
  }

  // Words of eight rows of `column` and, each two further on, of the eighth column after it: see below.
  __device__ __forceinline__ void replace(u32 (&words)[8], int first, int column) const {
#pragma unroll
    for (int row = 0; row < 8; ++row) {
      const int slot = __ldg(slots + first + row);
      if (slot < 0) continue;
      const u16* from = exact + (i64)slot * shape.columns + column;
#pragma unroll
      for (int other = 0; other < 2; ++other) {
        u32& word = words[row / 4 * 4 + row / 2 % 2 + 2 * other];
        const u32 value = __ldg(from + 8 * other);
        word = row % 2 ? (word & 0xFFFF) | value << 16 : (word & 0xFFFF0000) | value;
      }
    }
  }

  // A warp has 16 rows, which fill a sector of each column. Rows are whole sixteens here, columns whole 64s.
  __device__ __forceinline__ void store_transposed(const float (&d)[TILE_N / 2], const Tile& tile) const {
    const int thread = thread_index(), row = tile.row + thread / 32 * 16, q = thread % 4;
    if (row >= shape.tokens) return;
    const int first = row + q % 2 * 8, column = tile.column + q / 2 * 16 + thread % 32 / 4;
    u16* line = out + (i64)column * shape.tokens + first;
    const bool replaced = any_slot(first);
#pragma unroll
    for (int i = 0; i < TILE_N / 4; i += 8) {  // 32 of a warp's columns
      if (tile.column + 4 * i >= shape.columns) return;
      u32 words[8];
#pragma unroll
      for (int a = 0; a < 4; ++a) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* v = d + 2 * i + 4 * a + 2 * half;
          words[2 * a + half] = transpose(pack_floats(v[0], v[1]));  // of column 8 a + thread / 4, rows 8 half + 2 q and one on
        }
      }
      // Threads 0 and 2 of a quad get the upper eight rows, 1 and 3 the lower, of two columns each.
      swap_words(words, 1, 1), swap_words(words, 2, 4);
      if (replaced) replace(words, first, column + 4 * i);
      u16* to = line + 4 * i * (i64)shape.tokens;
      store_four(to, make_uint4(words[0], words[1], words[4], words[5]));
      store_four(to + 8 * (i64)shape.tokens, make_uint4(words[2], words[3], words[6], words[7]));
    }
  }
};

MATMUL sparse_mm(const __grid_constant__ TensorMap packed_map, const __grid_constant__ TensorMap lower_map,
                 const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap last_map,
                 const uint4* __restrict__ metadata, const u16* __restrict__ bias, u16* __restrict__ out,
                 const u16* __restrict__ exact, const int* __restrict__ slots, const __grid_constant__ Shape shape) {
  walk(SparseMM{packed_map, lower_map, weight_map, last_map, metadata, bias, out, exact, slots, shape}, shape);
}
