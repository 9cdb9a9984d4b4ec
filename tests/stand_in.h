// Stands in for ptx.cuh, so that kernels without tensor cores run on a CPU: a thread for each of a block's, bf16.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
typedef long long i64;

struct Index {
  int x, y;
};
inline thread_local Index threadIdx, blockIdx;
inline Index gridDim, blockDim{256, 1};
inline std::barrier<>* block_barrier;

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint4 {
  u32 x, y, z, w;
};
struct uint2 {
  u32 x, y;
};
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }

using std::max;
using std::min;

inline void __trap() { abort(); }
inline void __syncthreads() { block_barrier->arrive_and_wait(); }
template <class Function>
u32 by_halves(u32 a, u32 b, Function function) {
  return function(a & 0xFFFF, b & 0xFFFF) | function(a >> 16, b >> 16) << 16;
}
inline u32 __vmaxu2(u32 a, u32 b) { return by_halves(a, b, [](u32 x, u32 y) { return std::max(x, y); }); }
inline u32 __vminu2(u32 a, u32 b) { return by_halves(a, b, [](u32 x, u32 y) { return std::min(x, y); }); }

inline int of_block[256];
template <int N>
void block_sums(int (&values)[N]) {
  for (int& value : values) {
    of_block[threadIdx.x] = value;
    __syncthreads();
    value = std::accumulate(of_block, of_block + 256, 0);
    __syncthreads();
  }
}
inline int block_before(int& value) {
  of_block[threadIdx.x] = value;
  __syncthreads();
  const int before = std::accumulate(of_block, of_block + threadIdx.x, 0);
  value = std::accumulate(of_block, of_block + 256, 0);
  __syncthreads();
  return before;
}
inline u32 block_max2(u32 value) {
  of_block[threadIdx.x] = (int)value;
  __syncthreads();
  value = 0;
  for (int other : of_block) value = __vmaxu2(value, (u32)other);
  __syncthreads();
  return value;
}
inline int __syncthreads_or(u32 value) {
  int any[1] = {value != 0};
  block_sums(any);
  return any[0];
}
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}

inline float to_float(u32 half) {
  const u32 bits = half << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float low_float(u32 word) { return to_float(word & 0xFFFF); }
inline float high_float(u32 word) { return to_float(word >> 16); }
inline u32 to_bf16(float value) {
  u32 bits;
  memcpy(&bits, &value, 4);
  return value != value ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline u32 to_e4m3(float value) {
  const u32 sign = std::signbit(value) ? 0x80 : 0;
  const float size = std::fabs(value);
  if (size != size) return sign | 0x7F;
  if (size >= 448) return sign | 0x7E;
  if (size < 0x1p-6f) return sign | (u32)std::nearbyint(size * 0x1p9f);
  const int exponent = std::ilogb(size);
  return sign | ((u32)std::nearbyint(std::ldexp(size, 3 - exponent)) + 8 * (exponent + 6));
}
inline u32 pack_e4m3(float low, float high) { return to_e4m3(low) | to_e4m3(high) << 8; }
constexpr u32 MOST = 0x7F817F81u;
inline u32 relu(u32 word) {
  return by_halves(word, 0, [](u32 half, u32) { return (half & 0x7FFF) > 0x7F80 ? 0x7FFFu : half & 0x8000 ? 0u : half; });
}
inline u32 square(u32 word) {
  return by_halves(word, 0, [](u32 half, u32) { return to_bf16(to_float(half) * to_float(half)); });
}

template <u32 SELECTOR>
u32 permute_bytes(u32 a, u32 b) {
  const u64 bytes = (u64)b << 32 | a;
  u32 word = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 which = SELECTOR >> (4 * i) & 0xF;
    const u8 byte = (u8)(bytes >> (8 * (which & 7)));
    word |= (u32)(which & 8 ? (byte & 0x80 ? 0xFF : 0) : byte) << (8 * i);
  }
  return word;
}
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
  const u64 bytes = (u64)b << 32 | a;
  u32 word = 0;
  for (int i = 0; i < 4; ++i) word |= (u32)(u8)(bytes >> (8 * (selector >> (4 * i) & 7))) << (8 * i);
  return word;
}
inline uint4 load_streaming(const void* pointer) {
  uint4 value;
  memcpy(&value, pointer, sizeof(value));
  return value;
}
inline void store_two(void* pointer, uint2 value) { memcpy(pointer, &value, sizeof(value)); }
inline void store_four(void* pointer, uint4 value) { memcpy(pointer, &value, sizeof(value)); }

// Blocks one after another, the threads of each at a time.
template <class Kernel, class... Arguments>
void launch(Kernel kernel, int x, int y, Arguments... arguments) {
  gridDim = {x, y};
  std::barrier<> barrier(256);
  block_barrier = &barrier;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 256; ++thread) {
    threads.emplace_back([=, &barrier] {
      threadIdx = {thread, 0};
      for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x) {
          kernel(arguments...);
          barrier.arrive_and_wait();
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
}
