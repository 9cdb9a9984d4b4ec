// packed, metadata, scale = the two largest of every four relu(h)^2, by rows scaled to e4m3: in one read of h. Bound by memory: 2
// bytes read and 0.625 written an element.
//
// Compile-time: ELEMENT ("bf16" or "f16"), EACH: how many times 16 columns a thread holds.

#include "fp8.cuh"
#include "keep.cuh"
#include "layout.cuh"

// Of eight neighbours: four kept values, and two codes in a byte.
struct Packed {
  u32 values, codes;
};

// `w` are relu(h), and `inverse` is of the scale.
__device__ __forceinline__ Packed pack(u32 w0, u32 w1, u32 w2, u32 w3, float inverse) {
  const u32 k0 = permute_bytes<0x5410>(w0, w2), k1 = permute_bytes<0x7632>(w0, w2);
  const u32 k2 = permute_bytes<0x5410>(w1, w3), k3 = permute_bytes<0x7632>(w1, w3);
  const Two two = two_of_four(k0, k1, k2, k3);
  const u32 first = two.first(k0, k1, k2), second = two.second(k1, k2, k3), codes = two.codes(0);
  const u32 low = scaled_squares(low_float(first), low_float(second), inverse);
  const u32 high = scaled_squares(high_float(first), high_float(second), inverse);
  return {low | high << 16, (codes | codes >> 12) & 0xFF};
}

__device__ __forceinline__ u32 larger_half(u32 word) { return max(word & 0xFFFF, word >> 16); }

// Rows of whole sixteens, 16 bytes aligned. A block packs rows g and g + 8 of a block of 16, a thread 16 columns of both, and
// again every blockDim.x times 16 columns. What lies outside is zeros, whose code is the one to pad with.
extern "C" __global__ void __launch_bounds__(512)
    relu2_sparsify_fp8(const u16* __restrict__ h, i64 row_stride, u8* __restrict__ packed, u32* __restrict__ metadata,
                       float* __restrict__ scale, i64 rows, i64 columns) {
  const i64 row = (i64)blockIdx.x / 8 * 16 + blockIdx.x % 8, padded_columns = (columns + 255) / 256 * 256;
  u32 words[EACH][2][8], largest = 0;  // of row g in the low, of row g + 8 in the high half
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const i64 column = 16 * ((i64)threadIdx.x + i * blockDim.x);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 left = {}, right = {};
      if (row + 8 * half < rows && column < columns) {
        const u16* from = h + (row + 8 * half) * row_stride + column;
        left = load_streaming(from), right = load_streaming(from + 8);
      }
      const u32 read[8] = {left.x, left.y, left.z, left.w, right.x, right.y, right.z, right.w};
#pragma unroll
      for (int word = 0; word < 8; ++word) words[i][half][word] = read[word];
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    u32 two = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
#pragma unroll
      for (int word = 0; word < 8; ++word) {
        words[i][half][word] = relu(words[i][half][word]);
        two = __vmaxu2(two, words[i][half][word]);
      }
    }
    largest |= larger_half(two) << (16 * half);
  }
  largest = block_max2(largest);
  const float scales[2] = {scale_of(largest & 0xFFFF), scale_of(largest >> 16)};
  const float inverses[2] = {1 / scales[0], 1 / scales[1]};
  if (threadIdx.x < 2 && row + 8 * threadIdx.x < rows) scale[row + 8 * threadIdx.x] = threadIdx.x ? scales[1] : scales[0];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const i64 column = 16 * ((i64)threadIdx.x + i * blockDim.x);
    if (column >= padded_columns) return;
    u32 codes[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32(&w)[8] = words[i][half];
      const Packed a = pack(w[0], w[1], w[2], w[3], inverses[half]), b = pack(w[4], w[5], w[6], w[7], inverses[half]);
      codes[half] = a.codes | b.codes << 8;
      u8* to = packed + (row + 8 * half) * (columns / 2) + column / 2;
      if (row + 8 * half < rows && column < columns) store_two(to, make_uint2(a.values, b.values));
    }
    metadata[metadata_word(row / 16, padded_columns, row % 8, column)] = codes[0] | codes[1] << 16;
  }
}

// Any hidden size divisible by 4, any alignment: a block for each row, which it reads twice, and a thread for each byte of metadata.
extern "C" __global__ void __launch_bounds__(256)
    relu2_sparsify_fp8_any(const u16* __restrict__ h, i64 row_stride, u8* __restrict__ packed, u8* __restrict__ metadata,
                           float* __restrict__ scale, i64 rows, i64 columns) {
  const i64 row = blockIdx.x, padded_columns = (columns + 255) / 256 * 256;
  const u16* from = h + row * row_stride;
  u32 largest = 0;
  for (i64 column = threadIdx.x; row < rows && column < columns; column += blockDim.x) {
    largest = __vmaxu2(largest, relu(from[column]));
  }
  const float scale_here = scale_of(block_max2(largest)), inverse = 1 / scale_here;
  if (threadIdx.x == 0 && row < rows) scale[row] = scale_here;
  for (i64 column = 8 * (i64)threadIdx.x; column < padded_columns; column += 8 * blockDim.x) {
    const i64 left = row < rows ? columns - column : 0;  // else zeros, whose code is the one to pad with
    u32 w[4] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < left) w[i / 2] |= (u32)from[column + i] << (16 * (i % 2));
    }
    const Packed kept = pack(relu(w[0]), relu(w[1]), relu(w[2]), relu(w[3]), inverse);
    u8* to = packed + row * (columns / 2) + column / 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (2 * i < left) to[i] = (u8)(kept.values >> (8 * i));
    }
    const i64 word = metadata_word(row / 16, padded_columns, row % 8, column);
    metadata[4 * word + row % 16 / 8 * 2 + column / 8 % 2] = (u8)kept.codes;
  }
}
