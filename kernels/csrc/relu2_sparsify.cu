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

// Rows of whole sixteens, 16 bytes aligned. gridDim.y rows at a time.
extern "C" __global__ void __launch_bounds__(256)
    relu2_sparsify(const u16* __restrict__ h, i64 row_stride, u16* __restrict__ packed, u8* __restrict__ metadata, i64 rows,
                   i64 columns) {
  const i64 column = 16 * ((i64)blockIdx.x * 256 + threadIdx.x);
  if (column >= columns) return;
  for (i64 row = blockIdx.y; row < rows; row += gridDim.y) {
    const u16* from = h + row * row_stride + column;
    const uint4 left = load_streaming(from), right = load_streaming(from + 8);
    const Kept a = keep_two_of_four(left.x, left.y, left.z, left.w), b = keep_two_of_four(right.x, right.y, right.z, right.w);
    const i64 at = row * columns + column;
    *(uint4*)(packed + at / 2) = make_uint4(a.low, a.high, b.low, b.high);
    *(u16*)(metadata + at / 8) = (u16)((a.codes & 0xFF) | b.codes << 8);
  }
}

// Any hidden size divisible by 4, any alignment: one thread for each byte of metadata.
extern "C" __global__ void __launch_bounds__(256)
    relu2_sparsify_any(const u16* __restrict__ h, i64 row_stride, u16* __restrict__ packed, u8* __restrict__ metadata, i64 rows,
                       i64 columns) {
  const i64 byte = (i64)blockIdx.x * 256 + threadIdx.x, bytes = (columns + 7) / 8;
  if (byte >= bytes) return;
  for (i64 row = blockIdx.y; row < rows; row += gridDim.y) {
    const u16* from = h + row * row_stride + 8 * byte;
    const bool two = 8 * byte + 8 <= columns;  // else one group, and the padding code 4, which four zeros give
    u32 w[4] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < 4 || two) w[i / 2] |= (u32)from[i] << (16 * (i % 2));
    }
    const Kept kept = keep_two_of_four(w[0], w[1], w[2], w[3]);
    u16* to = packed + row * (columns / 2) + 4 * byte;
    to[0] = (u16)kept.low, to[1] = (u16)(kept.low >> 16);
    if (two) to[2] = (u16)kept.high, to[3] = (u16)(kept.high >> 16);
    metadata[row * bytes + byte] = (u8)kept.codes;
  }
}
