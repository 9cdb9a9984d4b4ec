// Stands in for ptx.cuh, so that kernels without wgmma run on a CPU: a thread for each of a block's, bf16; the blocks of
// a cluster at a time.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
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
inline thread_local int rank_here;  // of the block in its cluster
inline int blocks_of_cluster;
inline std::barrier<>*block_barriers[8], *cluster_barrier;

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
struct float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }

using std::max;
using std::min;

inline void __trap() { abort(); }
inline void __syncthreads() { block_barriers[rank_here]->arrive_and_wait(); }
template <class Function>
u32 by_halves(u32 a, u32 b, Function function) {
  return function(a & 0xFFFF, b & 0xFFFF) | function(a >> 16, b >> 16) << 16;
}
inline u32 __vmaxu2(u32 a, u32 b) { return by_halves(a, b, [](u32 x, u32 y) { return std::max(x, y); }); }
inline u32 __vminu2(u32 a, u32 b) { return by_halves(a, b, [](u32 x, u32 y) { return std::min(x, y); }); }

inline int of_blocks[8][256];
template <int N>
void block_sums(int (&values)[N]) {
  int* of_block = of_blocks[rank_here];
  for (int& value : values) {
    of_block[threadIdx.x] = value;
    __syncthreads();
    value = std::accumulate(of_block, of_block + 256, 0);
    __syncthreads();
  }
}
inline int block_before(int& value) {
  int* of_block = of_blocks[rank_here];
  of_block[threadIdx.x] = value;
  __syncthreads();
  const int before = std::accumulate(of_block, of_block + threadIdx.x, 0);
  value = std::accumulate(of_block, of_block + 256, 0);
  __syncthreads();
  return before;
}
inline u32 block_max2(u32 value) {
  int(&of_block)[256] = of_blocks[rank_here];
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

// --- warps: what its threads show each other

struct Warp {
  std::barrier<> barrier{32};
  const void* shown[32];
};
inline Warp warps[8][8];

inline Warp& this_warp() { return warps[rank_here][threadIdx.x / 32]; }
inline void __syncwarp() { this_warp().barrier.arrive_and_wait(); }

// What `make` makes of what all of them show.
template <class T, class Make>
auto of_warp(const T& mine, Make make) {
  Warp& warp = this_warp();
  warp.shown[threadIdx.x % 32] = &mine;
  __syncwarp();
  const auto found = make([&](int lane) -> const T& { return *(const T*)warp.shown[lane]; });
  __syncwarp();
  return found;
}
template <class Join>
u32 reduced(u32 value, Join join) {
  return of_warp(value, [=](auto of) {
    u32 all = 0;
    for (int lane = 0; lane < 32; ++lane) all = join(all, of(lane));
    return all;
  });
}
inline u32 __reduce_or_sync(u32, u32 value) { return reduced(value, [](u32 a, u32 b) { return a | b; }); }
inline u32 __reduce_max_sync(u32, u32 value) { return reduced(value, [](u32 a, u32 b) { return std::max(a, b); }); }
inline u32 __shfl_xor_sync(u32, u32 value, int step) {
  return of_warp(value, [=](auto of) { return of(threadIdx.x % 32 ^ step); });
}
inline int __popc(u32 word) { return __builtin_popcount(word); }
inline int __ffs(u32 word) { return __builtin_ffs((int)word); }

// --- shared memory that is addressed; copies that come when they are waited for

alignas(128) inline u8 arenas[8][228 << 10];
#define arena arenas[rank_here]
inline u32 shared_address(const void* pointer) { return (u32)((const u8*)pointer - arena); }
inline float load_remote(u32 shared, u32 block) {
  float value;
  memcpy(&value, arenas[block] + shared, 4);
  return value;
}
inline u32 cluster_rank() { return rank_here; }
inline u32 cluster_size() { return blocks_of_cluster; }
inline void cluster_sync() { cluster_barrier->arrive_and_wait(); }
inline void launch_next() {}
inline void wait_for_previous() {}

struct Copy {
  u32 shared;
  const void* from;
};
inline thread_local std::deque<std::vector<Copy>> groups;
inline thread_local std::vector<Copy> group;
inline void copy_16(u32 shared, const void* from, bool there) { group.push_back({shared, there ? from : nullptr}); }
inline void copies_commit() { groups.push_back(std::move(group)), group.clear(); }
template <int GROUPS>
void copies_wait() {
  for (; groups.size() > GROUPS; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      if (copy.from) memcpy(arena + copy.shared, copy.from, 16);
      else memset(arena + copy.shared, 0, 16);
    }
  }
}

template <bool TRANSPOSED>
void load_four(u32 (&words)[4], u32 shared) {
  of_warp(shared, [&](auto of) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    for (int matrix = 0; matrix < 4; ++matrix) {
      u16 halves[2];
      for (int i = 0; i < 2; ++i) {
        const int row = TRANSPOSED ? 2 * q + i : g, column = TRANSPOSED ? g : 2 * q + i;
        memcpy(halves + i, arena + of(8 * matrix + row) + 2 * column, 2);
      }
      words[matrix] = halves[0] | (u32)halves[1] << 16;
    }
    return 0;
  });
}
inline void load_matrices(u32 (&words)[4], u32 shared) { load_four<false>(words, shared); }
inline void load_transposed(u32 (&words)[4], u32 shared) { load_four<true>(words, shared); }

// --- mma

inline float from_e4m3(u32 bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  const float size = exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9);
  return (bits & 0x7F) == 0x7F ? NAN : bits & 0x80 ? -size : size;
}
inline float from_f16(u32 bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return exponent == 31 ? NAN : bits & 0x8000 ? -size : size;
}
inline u32 widen_e4m3(u32 word) {  // none is subnormal in f16
  return by_halves((word & 0xFF) | (word & 0xFF00) << 8, 0, [](u32 bits, u32) -> u32 {
    const float value = from_e4m3(bits);
    if (value != value) return 0x7FFF;
    if (value == 0) return (bits & 0x80) << 8;
    const int exponent = std::ilogb(value);
    return (bits & 0x80) << 8 | (u32)(exponent + 15) << 10 | ((u32)std::ldexp(std::fabs(value), 10 - exponent) & 1023);
  });
}
struct Operands {
  const u32 (&a)[4];
  u32 b[2];
};
// Of `BYTES` an element; thread 4 g + q has four bytes of rows g and g + 8 of a, and of row g of b, at 4 q and at 16 + 4 q.
template <int BYTES, class Value>
void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, Value value) {
  of_warp(Operands{a, {b0, b1}}, [&](auto of) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    for (int i = 0; i < 4; ++i) {
      for (int byte = 0; byte < 32; byte += BYTES) {
        const int lane = byte % 16 / 4, shift = 8 * (byte % 4);
        const u32 left = of(4 * g + lane).a[i / 2 + byte / 16 * 2], right = of(4 * (2 * q + i % 2) + lane).b[byte / 16];
        d[i] += value(left >> shift & ((1u << 8 * BYTES) - 1)) * value(right >> shift & ((1u << 8 * BYTES) - 1));
      }
    }
    return 0;
  });
}
inline void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  multiply<2>(d, a, b0, b1, [](u32 bits) { return to_float(bits); });
}
inline void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply<2>(d, a, b0, b1, from_f16); }
inline void mma_e4m3(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply<1>(d, a, b0, b1, from_e4m3); }
inline u32 pack_floats(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }

// Clusters one after another, the threads of each at a time.
template <class Kernel, class... Arguments>
void launch_clusters(Kernel kernel, int size, int x, int y, Arguments... arguments) {
  gridDim = {x, y}, blocks_of_cluster = size;
  std::barrier<> all(256 * size);
  cluster_barrier = &all;
  std::deque<std::barrier<>> of_each;
  for (int rank = 0; rank < size; ++rank) block_barriers[rank] = &of_each.emplace_back(256);
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 256 * size; ++thread) {
    threads.emplace_back([=, &all] {
      threadIdx = {thread % 256, 0}, rank_here = thread / 256;
      for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y) {
        for (blockIdx.x = rank_here; blockIdx.x < x; blockIdx.x += size) {
          kernel(arguments...);
          all.arrive_and_wait();
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
}
template <class Kernel, class... Arguments>
void launch(Kernel kernel, int x, int y, Arguments... arguments) {
  launch_clusters(kernel, 1, x, y, arguments...);
}
