// From 2:4 along features to 2:4 along tokens: of every four tokens the two largest entries, for each feature; and of each feature how
// many entries are not zero, or their sum, over the tokens of a block. Bound by memory: 1.125 bytes read and as many written an element;
// some 7 integer operations an element, of which a multiprocessor does 64 a clock, take nearly as long.
//
// The tokens of a group are `first` apart, those of groups from `first` on, whose tokens are those from 4 `first` on, `last`; or
// neighbours where `last` is 0. Of group j wise rows 2 j and 2 j + 1 keep two. A thread regroups eight features by four tokens of four
// groups; a block 256 features by 64 groups, whose codes it gathers to whole lines.
//
// Compile-time: ELEMENT ("bf16" or "f16").

#include "keep.cuh"
#include "layout.cuh"

constexpr int FEATURES = 256, GROUPS = 64;

// For a code, which bytes of two kept entries (0 to 3), or of zeros (4), four entries are: how __byte_perm makes two words of them.
__device__ __forceinline__ uint2 unpacking(u32 code) {
  const u32 bytes = 0x44444444u ^ (0x44u ^ 0x10u) << (8 * (code & 3)) ^ (0x44u ^ 0x32u) << (8 * (code >> 2));
  return make_uint2(bytes, bytes >> 16);
}

struct Counts {  // of two features, in halves: 32 at most in a thread, 256 in a block
  u32 both = 0;
  __device__ __forceinline__ void add(u32, u32 magnitude) { both += __vminu2(magnitude, 0x00010001u); }
  __device__ __forceinline__ int of(int which) const { return both >> (16 * which) & 0xFFFF; }
};

struct Sums {
  float low = 0, high = 0;
  __device__ __forceinline__ void add(u32 value, u32) { low += low_float(value), high += high_float(value); }
  __device__ __forceinline__ float of(int which) const { return which ? high : low; }
};

// Four groups from `group` on, of tokens `apart`, the first one's from `begin` on, the others' `next` after each other; eight features
// from `column` on: codes of each two features, 16 bits each.
// TOGETHER: of each token of a group the rows of all four groups are in the same half block of metadata.
template <bool TOGETHER, class Totals>
__device__ __forceinline__ void regroup(const u16* packed, const u8* metadata, u16* wise, u32 (&codes)[4], Totals (&totals)[4],
                                        const uint2* selectors, i64 group, i64 groups, i64 begin, u32 apart, int next, i64 column,
                                        i64 columns) {
  const i64 padded_columns = (columns + 255) / 256 * 256;
  uint2 twos[4][4];  // of each group, of each token: four kept entries
  u32 bytes[4][4];   // their codes
#pragma unroll
  for (int token = 0; token < 4; ++token) {
    const i64 first = begin + token * (i64)apart;
    const u8* place = metadata + 2 * metadata_half(first, padded_columns, column) + column / 8 % 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const i64 row = first + next * i;
      const bool inside = TOGETHER || group + i < groups;
      if (!TOGETHER && inside) place = metadata + 2 * metadata_half(row, padded_columns, column) + column / 8 % 2;
      twos[i][token] = inside ? __ldg((const uint2*)(packed + row * (columns / 2) + column / 2)) : make_uint2(0, 0);
      bytes[i][token] = inside ? __ldg(place + (TOGETHER ? 64 * i : 0)) : 0x44;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 v[4][4];  // of each two features, of each token
#pragma unroll
    for (int token = 0; token < 4; ++token) {
      const uint2 left = selectors[bytes[i][token] & 0xF], right = selectors[bytes[i][token] >> 4];
      v[0][token] = __byte_perm(twos[i][token].x, 0, left.x), v[1][token] = __byte_perm(twos[i][token].x, 0, left.y);
      v[2][token] = __byte_perm(twos[i][token].y, 0, right.x), v[3][token] = __byte_perm(twos[i][token].y, 0, right.y);
    }
    u32 upper[4], lower[4];
#pragma unroll
    for (int two = 0; two < 4; ++two) {
      u32 key[4];
#pragma unroll
      for (int token = 0; token < 4; ++token) {
        key[token] = __vminu2(v[two][token] & ~TOP, MOST);
        totals[two].add(v[two][token], key[token]);
      }
      const Two kept = two_of_four(key[0], key[1], key[2], key[3]);
      upper[two] = kept.first(v[two][0], v[two][1], v[two][2]), lower[two] = kept.second(v[two][1], v[two][2], v[two][3]);
      codes[two] |= kept.codes(4 * i);
    }
    if (!TOGETHER && group + i >= groups) continue;
    u16* to = wise + 2 * (group + i) * columns + column;
    store_four(to, make_uint4(upper[0], upper[1], upper[2], upper[3]));
    store_four(to + columns, make_uint4(lower[0], lower[1], lower[2], lower[3]));
  }
}

// totals: [blocks of GROUPS, columns]; left: [3, columns], zeros.
template <class Totals, class Total>
__device__ __forceinline__ void feature_wise(const u16* packed, const u8* metadata, u16* wise, uint4* wise_metadata, Total* totals,
                                             u16* left, i64 groups, i64 columns, i64 first, i64 last) {
  constexpr int LINE = 256 + 8;  // halves: a block of 16 features by 256 entries, and a shift to other banks
  __shared__ __align__(16) u16 codes[FEATURES / 16 * LINE];
  __shared__ Total warp_totals[8][FEATURES];
  __shared__ uint2 selectors[16];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const i64 column = (i64)blockIdx.x * FEATURES + 8 * lane;
  if (threadIdx.x < 16) selectors[threadIdx.x] = unpacking(threadIdx.x);
  __syncthreads();
  Totals mine[4];
#pragma unroll 1
  for (int four = warp; four < GROUPS / 4; four += 8) {  // groups
    const i64 group = (i64)blockIdx.y * GROUPS + 4 * four;
    const i64 begin = last == 0 ? 4 * group : group < first ? group : group + 3 * first;
    const u32 apart = last == 0 ? 1 : group < first ? first : last;
    u32 two_codes[4] = {};  // nothing kept of nothing: zeros keep their first two
    if (column >= columns || group >= groups) {
      for (u32& word : two_codes) word = 0x44444444u;
    } else if (apart % 4 == 0) {
      regroup<true>(packed, metadata, wise, two_codes, mine, selectors, group, groups, begin, apart, 1, column, columns);
    } else {
      regroup<false>(packed, metadata, wise, two_codes, mine, selectors, group, groups, begin, apart, last == 0 ? 4 : 1, column, columns);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int feature = 8 * lane + i;
      codes[feature / 16 * LINE + metadata_half(feature % 16, 256, 16 * four)] = (u16)(two_codes[i / 2] >> (16 * (i % 2)));
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) warp_totals[warp][8 * lane + i] = mine[i / 2].of(i % 2);
  __syncthreads();
  const i64 feature = (i64)blockIdx.x * FEATURES + threadIdx.x;
  if (feature < columns) {
    Total total = 0;  // in a fixed order
    for (int i = 0; i < 8; ++i) total += warp_totals[i][threadIdx.x];
    totals[blockIdx.y * columns + feature] = total;
    for (int token = 0; blockIdx.y == 0 && token < 3; ++token) left[token * columns + feature] = 0;
  }
  // whole lines: 32 times 16 bytes a block of 16 features
  for (int i = threadIdx.x; i < FEATURES / 16 * 32; i += 256) {
    const i64 block = (i64)blockIdx.x * (FEATURES / 16) + i / 32;
    const uint4 line = *(const uint4*)(codes + i / 32 * LINE + i % 32 * 8);
    if (block * 16 < columns) wise_metadata[(block * gridDim.y + blockIdx.y) * 32 + i % 32] = line;
  }
}

extern "C" __global__ void __launch_bounds__(256, 2)
    feature_wise_counts(const u16* __restrict__ packed, const u8* __restrict__ metadata, u16* __restrict__ wise,
                        uint4* __restrict__ wise_metadata, int* __restrict__ counts, u16* __restrict__ left, i64 groups,
                        i64 columns, i64 first, i64 last) {
  feature_wise<Counts>(packed, metadata, wise, wise_metadata, counts, left, groups, columns, first, last);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    feature_wise_sums(const u16* __restrict__ packed, const u8* __restrict__ metadata, u16* __restrict__ wise,
                      uint4* __restrict__ wise_metadata, float* __restrict__ sums, u16* __restrict__ left, i64 groups, i64 columns,
                      i64 first, i64 last) {
  feature_wise<Sums>(packed, metadata, wise, wise_metadata, sums, left, groups, columns, first, last);
}
