// From 2:4 along features to 2:4 along tokens: of every four tokens the two largest entries, for each feature; and how many entries
// of each feature are not zero, and their sums over the tokens of a block. Bound by memory: 1.125 bytes read and as many written an element.
//
// Group j is made of tokens j, j + Q, j + 2 Q, j + 3 Q (or 4 j to 4 j + 3), of which wise rows 2 j and 2 j + 1 keep two. A thread
// regroups four features by four tokens of four groups; a block 128 features by 64 groups, whose codes it gathers to whole lines.
//
// Compile-time: ELEMENT ("bf16" or "f16").

#include "keep.cuh"
#include "layout.cuh"

constexpr int FEATURES = 128, GROUPS = 64;

extern "C" __global__ void __launch_bounds__(256)
    feature_wise(const u16* __restrict__ packed, const u16* __restrict__ metadata, u16* __restrict__ wise,
                 uint4* __restrict__ wise_metadata, int* __restrict__ counts, float* __restrict__ sums, i64 quarter, i64 columns,
                 i64 permuted) {
  __shared__ __align__(16) u16 codes[FEATURES / 16 * 256];
  __shared__ int nonzero[FEATURES];
  __shared__ float warp_sums[8][FEATURES];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const i64 column = (i64)blockIdx.x * FEATURES + 4 * lane, padded_columns = (columns + 255) / 256 * 256;
  const bool inside = column < columns;
  for (int i = threadIdx.x; i < FEATURES; i += 256) nonzero[i] = 0;
  __syncthreads();
  int count[4] = {};
  float sum[4] = {};
  for (int four = warp; four < GROUPS / 4; four += 8) {  // groups
    u32 half_codes[4] = {};                              // of each feature, four groups
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const i64 group = (i64)blockIdx.y * GROUPS + 4 * four + i;
      u32 left[4] = {}, right[4] = {};  // of each token, features 0 and 1, and 2 and 3
      if (inside && group < quarter) {
#pragma unroll
        for (int token = 0; token < 4; ++token) {
          const i64 row = permuted ? group + token * quarter : 4 * group + token;
          const u32 two = __ldg((const u32*)(packed + row * (columns / 2) + column / 2));
          const u32 code = __ldg(metadata + metadata_half(row, padded_columns, column)) >> (column / 4 % 4 * 4);
          const u64 entries = (u64)(two & 0xFFFF) << (16 * (code & 3)) | (u64)(two >> 16) << (16 * (code >> 2 & 3));
          left[token] = (u32)entries, right[token] = (u32)(entries >> 32);
        }
      }
      u32 first[2], second[2];
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const u32* v = pair ? right : left;
        u32 key[4];
#pragma unroll
        for (int token = 0; token < 4; ++token) {
          key[token] = __vminu2(v[token] & ~TOP, MOST);
          sum[2 * pair] += low_float(v[token]), sum[2 * pair + 1] += high_float(v[token]);
          count[2 * pair] += (v[token] & 0x7FFF) != 0, count[2 * pair + 1] += (v[token] & 0x7FFF0000) != 0;
        }
        const Two kept = two_of_four(key[0], key[1], key[2], key[3]);
        first[pair] = kept.first(v[0], v[1], v[2]), second[pair] = kept.second(v[1], v[2], v[3]);
        const u32 both = kept.codes();
        half_codes[2 * pair] |= (both & 0xF) << (4 * i), half_codes[2 * pair + 1] |= (both >> 16 & 0xF) << (4 * i);
      }
      if (inside && group < quarter) {
        *(uint2*)(wise + 2 * group * columns + column) = make_uint2(first[0], first[1]);
        *(uint2*)(wise + (2 * group + 1) * columns + column) = make_uint2(second[0], second[1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // a block of 16 features by 256 entries is 256 halves
      const int feature = 4 * lane + i;
      codes[feature / 16 * 256 + metadata_half(feature % 16, 256, 16 * four)] = (u16)half_codes[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) atomicAdd(nonzero + 4 * lane + i, count[i]), warp_sums[warp][4 * lane + i] = sum[i];
  __syncthreads();
  const i64 feature = blockIdx.x * (i64)FEATURES + threadIdx.x;
  if (threadIdx.x < FEATURES && feature < columns) {
    float total = 0;  // in a fixed order
    for (int i = 0; i < 8; ++i) total += warp_sums[i][threadIdx.x];
    sums[blockIdx.y * columns + feature] = total;
    atomicAdd(counts + feature, nonzero[threadIdx.x]);
  }
  // whole lines: 32 times 16 bytes a block of 16 features
  for (int i = threadIdx.x; i < FEATURES / 16 * 32; i += 256) {
    const i64 block = (i64)blockIdx.x * (FEATURES / 16) + i / 32;
    if (block * 16 < columns) wise_metadata[(block * gridDim.y + blockIdx.y) * 32 + i % 32] = ((const uint4*)codes)[i];
  }
}
