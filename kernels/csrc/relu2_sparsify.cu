// packed, metadata = the two largest of every four relu(h)^2, 16-bit floats. Bound by memory: 2 bytes read and 1.125
// written an element; about 6 integer operations an element, which fit under that.
//
// Compile-time: ELEMENT ("bf16" or "f16").

#include "keep.cuh"
#include "layout.cuh"

// Of eight neighbours: four kept values in two words, and two codes in a byte.
struct Packed {
  u32 low, high, codes;
};

__device__ __forceinline__ Packed pack(u32 w0, u32 w1, u32 w2, u32 w3) {
  w0 = relu(w0), w1 = relu(w1), w2 = relu(w2), w3 = relu(w3);
  const Kept kept = keep_two_of_four(permute_bytes<0x5410>(w0, w2), permute_bytes<0x7632>(w0, w2), permute_bytes<0x5410>(w1, w3),
                                     permute_bytes<0x7632>(w1, w3));
  return {permute_bytes<0x5410>(kept.first, kept.second), permute_bytes<0x7632>(kept.first, kept.second),
          (kept.codes | kept.codes >> 12) & 0xFF};
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
      const Packed a = pack(left[half].x, left[half].y, left[half].z, left[half].w);
      const Packed b = pack(right[half].x, right[half].y, right[half].z, right[half].w);
      codes[half] = a.codes | b.codes << 8;
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
    const Packed kept = pack(w[0], w[1], w[2], w[3]);
    u16* to = packed + row * (columns / 2) + column / 2;
    if (left > 0) to[0] = (u16)kept.low, to[1] = (u16)(kept.low >> 16);
    if (left > 4) to[2] = (u16)kept.high, to[3] = (u16)(kept.high >> 16);
    const i64 word = metadata_word(row / 16, padded_columns, row % 8, column);
    metadata[4 * word + row % 16 / 8 * 2 + column / 8 % 2] = (u8)kept.codes;
  }
}
