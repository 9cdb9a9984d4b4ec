// What the matmuls here have in common: out[T, N] = A[T, K] @ B[N, K]^T, tile by tile.
//
// A tile of 192 rows by 256 columns is computed by three warpgroups, each 64 rows, while one thread of another warpgroup
// keeps bringing in what they multiply next: stages of B's tile, 64 columns of K, and chunks of A, 64 rows by 128 bytes, each
// for one warpgroup and good for SPAN stages. CLUSTER blocks hold neighbouring rows and each brings in a part of B's tile for
// all of them. Below the whole tiles there are ones of 64 or 128 rows, of which one or two warpgroups work.
//
// Blocks are persistent: of as many clusters as there are, each takes every so many-th tile. schedule.py chooses the heights and
// the number of clusters, so that all end together.
//
// wgmma leaves columns 8a + 2q and 8a + 2q + 1 with thread q of a quad. B's rows are brought in in another order, which costs
// nothing, the copy engine taking them as an array of five dimensions: row 16q + 2a + b of every 64 comes to lie at
// 8a + 2q + b. So thread q ends with columns 16q to 16q + 15 of every 64, in rows g and g + 8: d[32 s + 4 a + b] and, of row
// g + 8, d[32 s + 4 a + b + 2] is column 64 s + 16 q + 2 a + b. It stores whole vectors and exchanges nothing. N % 64 == 0.
#pragma once

#include "ptx.cuh"

constexpr int WARPGROUPS = 3;
constexpr int K = 64;  // columns a stage, not counting that A may be stored 2:4
constexpr int TILE_N = 256;
constexpr int TILE_M = 64 * WARPGROUPS;
constexpr int B_BYTES = TILE_N * K * 2;
constexpr int CHUNK = 64;  // columns of A as it is stored, and rows
constexpr int CHUNK_BYTES = CHUNK * CHUNK * 2;
constexpr int PRODUCER_REGISTERS = 32, CONSUMER_REGISTERS = 160;

struct Shape {
  int tokens, columns;  // of the result
  int groups;           // of four stages that a tile takes: the K axis over 256, rounded up (zeros beyond its end)
  int row_clusters;     // clusters of whole row tiles
  int lower_clusters, lower_height;  // and, below them, of tiles in which fewer warpgroups work, which come last
  int column_tiles;     // tiles of TILE_N columns
  int band;             // row clusters that are walked column by column, so that what is read again is still in L2
};

struct Tile {
  int row, column, height;
};

// The tile at `position` among those of this cluster; false beyond the last.
__device__ __forceinline__ bool tile_at(const Shape& shape, int position, Tile& tile) {
  const int index = position * (gridDim.x / CLUSTER) + blockIdx.x / CLUSTER, whole = shape.row_clusters * shape.column_tiles;
  const bool lower = index >= whole;
  const int inside = lower ? index - whole : index, clusters = lower ? shape.lower_clusters : shape.row_clusters;
  const int band = inside / (shape.band * shape.column_tiles), at = inside - band * shape.band * shape.column_tiles;
  const int walked = min(shape.band, clusters - band * shape.band);
  const int row_tile = (band * shape.band + at % walked) * CLUSTER + (int)cluster_rank();
  tile.height = lower ? shape.lower_height : WARPGROUPS;
  tile.row = (lower ? shape.row_clusters * CLUSTER * TILE_M : 0) + row_tile * 64 * tile.height;
  tile.column = at / walked * TILE_N;
  return inside < clusters * shape.column_tiles;
}

// A place in a ring of buffers, each with a barrier that says that it is full and one that says that it is empty.
template <int SIZE, int BYTES>
struct Ring {
  u32 buffers, barriers;  // shared addresses; of the full ones' barriers, then the empty ones'
  u32 at, phase;

  __device__ __forceinline__ u32 buffer() const { return buffers + at * BYTES; }
  __device__ __forceinline__ u32 full() const { return barriers + 8 * at; }
  __device__ __forceinline__ u32 empty() const { return barriers + 8 * (SIZE + at); }

  __device__ __forceinline__ void advance(u32 by) {
    at += by;
    if (at >= SIZE) at -= SIZE, phase ^= 1;
  }
};
using Stages = Ring<STAGES, B_BYTES>;
using Chunks = Ring<CHUNKS, CHUNK_BYTES>;

// What one thread of a warpgroup says when all have read a stage, for each block of the cluster: they all wait for what one brings.
__device__ __forceinline__ void release(const Stages& stage) {
  if (thread_index() % 128 < CLUSTER) barrier_arrive(stage.empty(), thread_index() % 128);
}

__device__ __forceinline__ void release(const Chunks& chunk) {
  if (thread_index() % 128 == 0) barrier_arrive(chunk.empty());
}

// 64 x 256 accumulators need some 150 registers a thread, above the 128 with which 512 threads start, and ptxas refuses such
// a kernel unless it is told that it starts with more. It does not: the launch code writes 128 into the cubin, and the roles
// below take and give what they need before they use it.
#define MATMUL extern "C" __global__ void __maxnreg__(CONSUMER_REGISTERS) __cluster_dims__(CLUSTER, 1, 1)

// This block's part of B's tile, into all blocks of the cluster.
__device__ __forceinline__ void bring_b(u32 b, const TensorMap& map, u32 ready, int k, const Tile& tile, u32 rank) {
  const int column = tile.column + rank * (TILE_N / CLUSTER);
  copy_box_to((1 << CLUSTER) - 1, b + rank * (B_BYTES / CLUSTER), map, k * K, 0, 0, 0, column / 64, ready);
}

// Where a thread's results belong: row g (and g + 8), and its first column.
struct Place {
  int row, column;
};

__device__ __forceinline__ Place place_of(const Tile& tile) {
  const u32 thread = thread_index();
  return {tile.row + (int)(thread / 32 * 16 + thread % 32 / 4), tile.column + (int)(thread % 4 * 16)};
}

// A Kernel has `a_map` and `b_map`; SPAN; `multiply(d, stages, chunks, tile)`, which waits for each stage and chunk of a tile,
// releases it when it has been read, and ends when the products are in d; and `store(d, tile)`.
template <class Kernel>
__device__ __forceinline__ void walk(const Kernel& kernel, const Shape& shape) {
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ __align__(8) u64 barriers[2 * (STAGES + CHUNKS)];
  Stages stages = {launder(shared_address(shared)), shared_address(barriers), 0, 0};  // kept, not found again and again
  Chunks chunks = {stages.buffers + STAGES * B_BYTES, stages.barriers + 16 * STAGES, 0, 0};
  const int steps = 4 * shape.groups;

  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(stages.barriers + 8 * i, 1);
      barrier_init(stages.barriers + 8 * (STAGES + i), CLUSTER * WARPGROUPS);  // of all blocks: B goes to all
    }
    for (int i = 0; i < 2 * CHUNKS; ++i) barrier_init(chunks.barriers + 8 * i, 1);
    barrier_init_fence();
  }
  cluster_sync();

  Tile tile;
  if (threadIdx.x >= WARPGROUPS * 128) {
    registers_give<PRODUCER_REGISTERS>();
    if (threadIdx.x == WARPGROUPS * 128) {
      for (int position = 0; tile_at(shape, position, tile); ++position) {
        for (int k = 0; k < steps; ++k) {
          for (int i = 0; k % Kernel::SPAN == 0 && i < tile.height; ++i) {
            barrier_wait(chunks.empty(), chunks.phase ^ 1);  // the first round finds all empty
            barrier_expect_bytes(chunks.full(), CHUNK_BYTES);
            copy_box(chunks.buffer(), kernel.a_map, k / Kernel::SPAN * CHUNK, tile.row + i * CHUNK, chunks.full());
            chunks.advance(1);
          }
          barrier_wait(stages.empty(), stages.phase ^ 1);
          barrier_expect_bytes(stages.full(), B_BYTES);
          bring_b(stages.buffer(), kernel.b_map, stages.full(), k, tile, cluster_rank());
          stages.advance(1);
        }
      }
    }
  } else {
    registers_take<CONSUMER_REGISTERS>();
    chunks.at = thread_index() / 128;  // of every so many, one for each warpgroup
    for (int position = 0; tile_at(shape, position, tile); ++position) {
      if ((int)thread_index() / 128 >= tile.height) {  // nothing to do but to keep pace
        for (int k = 0; k < steps; ++k) {
          // All four warps have seen the stage before it may be filled again: one that looks a whole ring too late would wait
          // for ever. Where they multiply, wgmma keeps them together.
          barrier_wait(stages.full(), stages.phase);
          sync_threads(1 + thread_index() / 128, 128);
          release(stages);
          stages.advance(1);
          if (k % Kernel::SPAN == 0) chunks.advance(tile.height);
        }
        continue;
      }
      float d[TILE_N / 2];
#pragma unroll
      for (int i = 0; i < TILE_N / 2; ++i) d[i] = 0;
      kernel.multiply(d, stages, chunks, tile);
      // Found again rather than kept: the loop has no registers to spare.
      position = launder(position);
      tile_at(shape, position, tile);
      kernel.store(d, tile);
    }
  }
  cluster_sync();  // the other blocks may still arrive at our barriers
}
