// packed, metadata = the two largest of every four relu(h)^2, 16-bit floats. Bound by memory: 2 bytes read and 1.125
// written an element; about 6 integer operations an element, which fit under that.
//
// For a group k0 k1 k2 k3 (relu already applied, so the bits order as integers) the two largest, ties to the lower index:
//   {0, 1}  if min(k0, k1) >= max(k2, k3)
//   {2, 3}  if min(k2, k3) >  max(k0, k1)
//   else the larger of each half: k0 if k0 >= k1, k2 if k2 >= k3.
// Two groups go through together, one in each half of 32-bit words.
//
// Compile-time: ELEMENT ("bf16" or "f16").

#include "ptx.cuh"

constexpr u32 TOP = 0x80008000u;

// The top bit of each half is set where a >= b. Halves below 0x8000.
__device__ __forceinline__ u32 at_least(u32 a, u32 b) { return (a | TOP) - b; }

// All bits of each half from its top bit.
__device__ __forceinline__ u32 spread(u32 word) { return permute_bytes<0xBB99>(word, 0); }

__device__ __forceinline__ u32 choose(u32 mask, u32 yes, u32 no) { return (yes & mask) | (no & ~mask); }

// Eight neighbours: four kept values in two words, and two codes in a byte.
struct Kept {
  u32 low, high, codes;
};

__device__ __forceinline__ Kept keep_two_of_four(u32 w0, u32 w1, u32 w2, u32 w3) {
  w0 = relu(w0), w1 = relu(w1), w2 = relu(w2), w3 = relu(w3);
  const u32 k0 = permute_bytes<0x5410>(w0, w2), k1 = permute_bytes<0x7632>(w0, w2);
  const u32 k2 = permute_bytes<0x5410>(w1, w3), k3 = permute_bytes<0x7632>(w1, w3);
  const u32 max01 = __vmaxu2(k0, k1), min01 = __vminu2(k0, k1), max23 = __vmaxu2(k2, k3), min23 = __vminu2(k2, k3);
  const u32 both01 = at_least(min01, max23), not23 = at_least(max01, min23);
  const u32 first0 = at_least(k0, k1), first2 = at_least(k2, k3);
  // The bits of idx0 and idx1, each in the top bit of a half.
  const u32 low0 = ~first0 & ~both01 & not23, high0 = ~not23;
  const u32 low1 = both01 | ~first2 | ~not23, high1 = ~both01;
  const u32 value0 = square(choose(spread(high0), k2, choose(spread(low0), k1, k0)));
  const u32 value1 = square(choose(spread(high1), choose(spread(low1), k3, k2), k1));
  const u32 codes = (low0 & TOP) >> 15 | (high0 & TOP) >> 14 | (low1 & TOP) >> 13 | (high1 & TOP) >> 12;
  return {permute_bytes<0x5410>(value0, value1), permute_bytes<0x7632>(value0, value1), codes | codes >> 12};
}

// Where metadata keeps the codes of 16 columns of rows g and g + 8 of a block: a word of it. See layout.py.
__device__ __forceinline__ i64 metadata_word(i64 block, i64 padded_columns, int g, i64 column) {
  const int q = column / 16 % 4, word = column / 64 % 4;
  return (block * (padded_columns / 256) + column / 256) * 128 + (g * 4 + q) * 4 + word;
}

// Rows of whole sixteens, 16 bytes aligned. A thread packs 16 columns of rows g and g + 8 of a block of 16 rows, gridDim.y
// such pairs at a time. What lies outside is zeros, whose code is the one to pad with.
extern "C" __global__ void __launch_bounds__(256)
    relu2_sparsify(const u16* __restrict__ h, i64 row_stride, u16* __restrict__ packed, u32* __restrict__ metadata, i64 rows,
                   i64 columns) {
  const i64 column = 16 * ((i64)blockIdx.x * 256 + threadIdx.x), padded_columns = (columns + 255) / 256 * 256;
  if (column >= padded_columns) return;
  for (i64 pair = blockIdx.y; pair < (rows + 15) / 16 * 8; pair += gridDim.y) {
    const i64 row = pair / 8 * 16 + pair % 8;
    const bool inside[2] = {row < rows && column < columns, row + 8 < rows && column < columns};
    uint4 left[2] = {}, right[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u16* from = h + (row + 8 * half) * row_stride + column;
      if (inside[half]) left[half] = load_streaming(from), right[half] = load_streaming(from + 8);
    }
    u32 codes[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Kept a = keep_two_of_four(left[half].x, left[half].y, left[half].z, left[half].w);
      const Kept b = keep_two_of_four(right[half].x, right[half].y, right[half].z, right[half].w);
      codes[half] = (a.codes & 0xFF) | (b.codes & 0xFF) << 8;
      u16* to = packed + (row + 8 * half) * (columns / 2) + column / 2;
      if (inside[half]) store_four(to, make_uint4(a.low, a.high, b.low, b.high));
    }
    metadata[metadata_word(pair / 8, padded_columns, pair % 8, column)] = codes[0] | codes[1] << 16;
  }
}

// Any hidden size divisible by 4, any alignment: one thread for each byte of metadata.
extern "C" __global__ void __launch_bounds__(256)
    relu2_sparsify_any(const u16* __restrict__ h, i64 row_stride, u16* __restrict__ packed, u8* __restrict__ metadata, i64 rows,
                       i64 columns) {
  const i64 column = 8 * ((i64)blockIdx.x * 256 + threadIdx.x), padded_columns = (columns + 255) / 256 * 256;
  if (column >= padded_columns) return;
  for (i64 row = blockIdx.y; row < (rows + 15) / 16 * 16; row += gridDim.y) {
    const u16* from = h + row * row_stride + column;
    const i64 left = row < rows ? columns - column : 0;  // else zeros, whose code is the one to pad with
    u32 w[4] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < left) w[i / 2] |= (u32)from[i] << (16 * (i % 2));
    }
    const Kept kept = keep_two_of_four(w[0], w[1], w[2], w[3]);
    u16* to = packed + row * (columns / 2) + column / 2;
    if (left > 0) to[0] = (u16)kept.low, to[1] = (u16)(kept.low >> 16);
    if (left > 4) to[2] = (u16)kept.high, to[3] = (u16)(kept.high >> 16);
    const i64 word = metadata_word(row / 16, padded_columns, row % 8, column);
    metadata[4 * word + row % 16 / 8 * 2 + column / 8 % 2] = (u8)kept.codes;
  }
}
