// Which two of four to keep, for two groups at once: one in the low and one in the high halves of words.
//
// For a group k0 k1 k2 k3 (no sign bits, so that bits order as integers) the two largest, ties to the lower index:
//   {0, 1}  if min(k0, k1) >= max(k2, k3)
//   {2, 3}  if min(k2, k3) >  max(k0, k1)
//   else the larger of each half: k0 if k0 >= k1, k2 if k2 >= k3.
#pragma once

#include "ptx.cuh"

constexpr u32 TOP = 0x80008000u;

// The top bit of each half is set where a >= b. Halves below 0x8000.
__device__ __forceinline__ u32 at_least(u32 a, u32 b) { return a - b + TOP; }

// All bits of each half from its top bit.
__device__ __forceinline__ u32 spread(u32 word) { return permute_bytes<0xBB99>(word, 0); }

__device__ __forceinline__ u32 choose(u32 mask, u32 yes, u32 no) { return (yes & mask) | (no & ~mask); }

// Which two were chosen: bits of idx0 and idx1, each in all bits of a half.
struct Two {
  u32 low0, high0, low1, high1;

  // Four bits of each half, from bit `at` on.
  __device__ __forceinline__ u32 codes(int at) const {
    const u32 one = 0x00010001u << at;
    return (low0 & one) | (high0 & one << 1) | (low1 & one << 2) | (high1 & one << 3);
  }
  __device__ __forceinline__ u32 first(u32 v0, u32 v1, u32 v2) const { return choose(high0, v2, choose(low0, v1, v0)); }
  __device__ __forceinline__ u32 second(u32 v1, u32 v2, u32 v3) const { return choose(high1, choose(low1, v3, v2), v1); }
};

__device__ __forceinline__ Two two_of_four(u32 k0, u32 k1, u32 k2, u32 k3) {
  const u32 max01 = __vmaxu2(k0, k1), min01 = __vminu2(k0, k1), max23 = __vmaxu2(k2, k3), min23 = __vminu2(k2, k3);
  const u32 both01 = at_least(min01, max23), not23 = at_least(max01, min23);
  const u32 first0 = at_least(k0, k1), first2 = at_least(k2, k3);
  return {spread(~first0 & ~both01 & not23), ~spread(not23), spread(both01 | ~first2 | ~not23), ~spread(both01)};
}

struct Kept {
  u32 first, second;  // squared
  u32 codes;          // 4 bits of each half, from bit `at` on
};

__device__ __forceinline__ Kept keep_two_of_four(u32 k0, u32 k1, u32 k2, u32 k3, int at = 0) {
  const Two two = two_of_four(k0, k1, k2, k3);
  return {square(two.first(k0, k1, k2)), square(two.second(k1, k2, k3)), two.codes(at)};
}
