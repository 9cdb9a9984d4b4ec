// The features that fire most: of counts[features] the `chosen` largest, ties to the lower feature. One block, bound by latency.
//
// index[chosen] are they, ascending; slots[features] says where in it each is, or -1.
#include "ptx.cuh"

constexpr int THREADS = 1024;
constexpr int HELD = 16;  // counts of a thread in registers; any more are read again

struct Features {
  const u32* counts;
  i64 features;
  u32 held[HELD];

  __device__ __forceinline__ Features(const u32* counts, i64 features) : counts(counts), features(features) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) held[i] = at(threadIdx.x + i * blockDim.x);
  }
  __device__ __forceinline__ u32 at(i64 feature) const { return feature < features ? counts[feature] : 0; }

  // function(feature, count), a block of threads after the other.
  template <class Function>
  __device__ __forceinline__ void each(Function function) const {
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      if (i * (i64)blockDim.x < features) function(threadIdx.x + i * (i64)blockDim.x, held[i]);
    }
    for (i64 begin = HELD * (i64)blockDim.x; begin < features; begin += blockDim.x) {
      function(threadIdx.x + begin, at(threadIdx.x + begin));
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    densest(const u32* __restrict__ counts, i64* __restrict__ index, int* __restrict__ slots, i64 features, i64 chosen) {
  const Features all(counts, features);
  u32 largest = 0;
  all.each([&](i64, u32 count) { largest = max(largest, count); });
  // Two bits at a time, the largest number that as many as `chosen` reach: the least that is chosen.
  u32 least = 0;
  int shift = 30;
  while (shift && !__syncthreads_or(largest >> shift)) shift -= 2;
  for (; shift >= 0; shift -= 2) {
    int reach[3] = {};
    all.each([&](i64, u32 count) {
      for (u32 bits = 1; bits < 4; ++bits) reach[bits - 1] += count >= (least | bits << shift);
    });
    block_sums(reach);
    least |= (u32)((reach[0] >= chosen) + (reach[1] >= chosen) + (reach[2] >= chosen)) << shift;
  }
  int larger[1] = {};
  all.each([&](i64, u32 count) { larger[0] += count > least; });
  block_sums(larger);
  const i64 ties = chosen - larger[0];
  i64 all_larger = 0, all_equal = 0;
  all.each([&](i64 feature, u32 count) {
    const bool is_larger = count > least, is_equal = count == least;
    int total = is_larger | is_equal << 16;
    const int before = block_before(total);
    const i64 before_larger = all_larger + (before & 0xFFFF), before_equal = all_equal + (before >> 16);
    if (feature < features) {
      const bool is_chosen = is_larger || (is_equal && before_equal < ties);
      const i64 place = before_larger + min(before_equal, ties);
      slots[feature] = is_chosen ? (int)place : -1;
      if (is_chosen) index[place] = feature;
    }
    all_larger += total & 0xFFFF, all_equal += total >> 16;
  });
}
