// The features that fire most: of counts[features] the `chosen` largest, ties to the lower feature. One block, bound by latency.
//
// index[chosen] are they, ascending; slots[features] says where in it each is, or -1.
#include "ptx.cuh"

constexpr int THREADS = 1024;

extern "C" __global__ void __launch_bounds__(THREADS)
    densest(const int* __restrict__ counts, i64* __restrict__ index, int* __restrict__ slots, i64 features, i64 chosen) {
  __shared__ int above[THREADS], equal[THREADS];
  const int thread = threadIdx.x, threads = blockDim.x;
  // Bit by bit, the largest number that as many as `chosen` reach: the least that is chosen.
  int least = 0;
  for (int bit = 30; bit >= 0; --bit) {
    const int trial = least | 1 << bit;
    int reach = 0;
    for (i64 feature = thread; feature < features; feature += threads) reach += counts[feature] >= trial;
    if (block_sum(reach) >= chosen) least = trial;
  }
  // A thread goes through neighbouring features. How many come before, of those above the least and of those equal to it?
  const i64 each = (features + threads - 1) / threads, begin = min(thread * each, features), end = min(begin + each, features);
  int mine_above = 0, mine_equal = 0;
  for (i64 feature = begin; feature < end; ++feature) mine_above += counts[feature] > least, mine_equal += counts[feature] == least;
  const i64 ties = chosen - block_sum(mine_above);
  above[thread] = mine_above, equal[thread] = mine_equal;
  __syncthreads();
  for (int step = 1; step < threads; step *= 2) {
    const int more_above = thread >= step ? above[thread - step] : 0, more_equal = thread >= step ? equal[thread - step] : 0;
    __syncthreads();
    above[thread] += more_above, equal[thread] += more_equal;
    __syncthreads();
  }
  i64 before_above = above[thread] - mine_above, before_equal = equal[thread] - mine_equal;
  for (i64 feature = begin; feature < end; ++feature) {
    const bool is_above = counts[feature] > least, is_equal = counts[feature] == least;
    const i64 place = before_above + min(before_equal, ties);
    const bool is_chosen = is_above || (is_equal && before_equal < ties);
    slots[feature] = is_chosen ? (int)place : -1;
    if (is_chosen) index[place] = feature;
    before_above += is_above, before_equal += is_equal;
  }
}
