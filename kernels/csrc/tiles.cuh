// What the matmuls here have in common: out[T, N] = A[T, K] @ B[N, K]^T, tile by tile.
//
// A tile of 192 rows by 256 columns is computed by three warpgroups, each 64 rows, while one thread of another warpgroup
// keeps bringing in the next stages of 64 columns of K. CLUSTER blocks hold neighbouring rows and each brings in a part of
// B's tile for all of them. Below the whole tiles there are ones of 64 or 128 rows, of which one or two warpgroups work.
//
// Blocks are persistent. schedule.py chooses the heights and the number of clusters, so that all end at about the same time.
//
// Compile-time: ELEMENT ("bf16" or "f16"), CLUSTER (a power of 2), STAGES of the ring, A_COLUMNS of a stage, as stored, and, see
// below, RUN, A_MN, B_MN and GROUP.
//
// wgmma leaves columns 8a + 2q and 8a + 2q + 1 with thread q of a quad. B's rows are brought in in another order, which costs
// nothing, the copy engine taking them as an array of five dimensions: of every RUN, 32 or 64, row RUN / 4 q + 2a + b comes to
// lie at 8a + 2q + b. So thread q ends with a quarter of every RUN columns, in rows g and g + 8: d[RUN / 2 s + 4 a + b] and, of
// row g + 8, d[RUN / 2 s + 4 a + b + 2] is column RUN s + RUN / 4 q + 2 a + b. It stores whole vectors and exchanges nothing.
// N % 64 == 0.
//
// That is how it is where B lies in memory as [N, K]. Where it lies as [K, N] (B_MN), rows of N cannot be put in another order, and
// quads exchange what they have to store. With GROUP = 4, K is not in order: rows j, j + s, j + 2 s, j + 3 s, `stride` apart, come one
// after the other, for all j below s, a multiple of 16; then so those from 4 s on, with an s of their own (last_map). A may also lie as
// [K, M] (A_MN).
#pragma once

#include "ptx.cuh"
#include "schedule.cuh"

constexpr int K = 64;  // columns a stage, not counting that A may be stored 2:4
constexpr int A_BYTES = TILE_M * A_COLUMNS * 2, B_BYTES = TILE_N * K * 2, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int STEPS = A_COLUMNS / 16, STEP_K = K / STEPS;  // products a stage
constexpr u64 A_STEP = (A_MN ? 16 * 128 : 32) >> 4, B_STEP = (B_MN ? STEP_K * 128 : STEP_K * 2) >> 4;  // in descriptors
constexpr int PRODUCER_REGISTERS = 32, CONSUMER_REGISTERS = 160;

// The tile at `position` among those of this cluster; of height 0 beyond the last.
__device__ __forceinline__ Tile tile_at(const Shape& shape, int position) {
  Tile tile;
  if (!tile_at(shape, position, gridDim.x / CLUSTER, blockIdx.x / CLUSTER, cluster_rank(), tile)) tile.height = 0;
  return tile;
}

// Shared memory beside the stages: barriers, four tiles, what there is for each column of a tile.
constexpr u32 TILE_DONE = 16 * STAGES, TILES = TILE_DONE + 16, BIASES = TILES + 64, SCALES = BIASES + 2 * TILE_N;
constexpr u32 BESIDE_BYTES = SCALES + 4 * TILE_N;

// A place in the ring of stages, each with a barrier that says that it is full and one that says that it is empty.
struct Ring {
  u32 stages, barriers;  // shared addresses; barriers of the full ones, then of the empty ones, and what is beside them
  u32 at, phase;

  __device__ __forceinline__ u32 full() const { return barriers + 8 * at; }
  __device__ __forceinline__ u32 empty() const { return barriers + 8 * (STAGES + at); }
  __device__ __forceinline__ u32 tile_done() const { return barriers + TILE_DONE; }
  __device__ __forceinline__ u32 biases() const { return barriers + BIASES; }
  __device__ __forceinline__ u32 scales() const { return barriers + SCALES; }

  // The producer finds tiles for all, one ahead of the one that it brings in.
  __device__ __forceinline__ void announce(u32 position, const Tile& tile) const {
    store_shared_four(barriers + TILES + 16 * (position % 4), make_uint4(tile.row, tile.column, tile.height, 0));
  }
  __device__ __forceinline__ Tile announced(u32 position) const {
    const uint4 four = load_shared_four(barriers + TILES + 16 * (position % 4));
    return {(int)four.x, (int)four.y, (int)four.z};
  }
  __device__ __forceinline__ Tile announced_to_warp(u32 position) const {
    const Tile tile = announced(position);
    return {uniform(tile.row), uniform(tile.column), uniform(tile.height)};
  }

  __device__ __forceinline__ void wait() const { barrier_wait(full(), phase); }

  // One thread of each warpgroup for each block of the cluster: they all wait for what one brings in.
  __device__ __forceinline__ void release(u32 which) const {
    const u32 thread = thread_index() % 128;
    if (thread < CLUSTER) barrier_arrive(barriers + 8 * (STAGES + which), thread);
  }

  __device__ __forceinline__ u32 previous() const { return at == 0 ? STAGES - 1 : at - 1; }

  __device__ __forceinline__ void next() {
    if (++at == STAGES) at = 0, phase ^= 1;
  }
};

// 64 x 256 accumulators need some 150 registers a thread, above the 128 with which 512 threads start, and ptxas refuses such
// a kernel unless it is told that it starts with more. It does not: the launch code writes 128 into the cubin, and the roles
// below take and give what they need before they use it.
#define MATMUL extern "C" __global__ void __maxnreg__(CONSUMER_REGISTERS) __cluster_dims__(CLUSTER, 1, 1)

__device__ __forceinline__ void bring_a(u32 a, const TensorMap& map, u32 ready, int k, const Tile& tile) {
  if (A_MN) copy_box(a, map, 0, k * A_COLUMNS, tile.row / 64, ready);
  else copy_box(a, map, k * A_COLUMNS, tile.row, 0, ready);
}

// This block's part of B's tile, into all blocks of the cluster.
template <class Kernel>
__device__ __forceinline__ void bring_b(u32 b, const Kernel& kernel, u32 ready, int k, int stride, const Tile& tile, u32 rank) {
  const int column = tile.column + rank * (TILE_N / CLUSTER);
  const u32 to = b + rank * (B_BYTES / CLUSTER);
  const int row = k * (K / GROUP);
  if constexpr (GROUP > 1) {
    const bool last = row >= stride;
    copy_box_to((1 << CLUSTER) - 1, to, last ? kernel.last_map : kernel.b_map, 0, 0, last ? row - stride : row, column / 64, 0, ready);
  } else if (B_MN) {
    copy_box_to((1 << CLUSTER) - 1, to, kernel.b_map, 0, 0, row, column / 64, 0, ready);
  } else {
    copy_box_to((1 << CLUSTER) - 1, to, kernel.b_map, k * K, 0, 0, 0, column / RUN, ready);
  }
}

// Of the rows of this thread's warpgroup.
__device__ __forceinline__ u64 a_descriptor(const Ring& ring) {
  const u32 rows = ring.stages + ring.at * STAGE_BYTES + thread_index() / 128 * (A_BYTES / WARPGROUPS);
  return A_MN ? mn_major_descriptor<A_BYTES / WARPGROUPS>(rows) : k_major_descriptor<A_COLUMNS * 2>(rows);
}

__device__ __forceinline__ u64 b_descriptor(const Ring& ring) {
  const u32 b = ring.stages + ring.at * STAGE_BYTES + A_BYTES;
  return B_MN ? mn_major_descriptor<K * 128>(b) : k_major_descriptor<K * 2>(b);
}

// All of a tile's products where A is dense. E4M3: two of them for each element.
template <bool E4M3 = false, class Meanwhile>
__device__ __forceinline__ void multiply_dense(float (&d)[TILE_N / 2], Ring& ring, int stages, const Meanwhile& meanwhile) {
#pragma unroll 1
  for (int i = 0; i < stages; ++i) {
    const u64 a = a_descriptor(ring), b = b_descriptor(ring);
    ring.wait();
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      if constexpr (E4M3) wgmma_dense_e4m3(d, a + step * A_STEP, b + step * B_STEP);
      else wgmma_dense<A_MN, B_MN>(d, a + step * A_STEP, b + step * B_STEP);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (i > 0) ring.release(ring.previous());
    ring.next();
  }
  meanwhile();
  wgmma_wait<0>();
  ring.release(ring.previous());
}

// Threads whose indices differ in `thread_bit` swap words whose indices differ in `word_bit`: the one where it is set gets the other's
// words where it is set, for its own where it is not. Afterwards that bit of a word's index says from which of the two it is.
template <int WORDS>
__device__ __forceinline__ void swap_words(u32 (&words)[WORDS], int thread_bit, int word_bit) {
  const bool upper = thread_index() & thread_bit;
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    if (i & word_bit) continue;
    const u32 got = __shfl_xor_sync(~0u, upper ? words[i] : words[i + word_bit], thread_bit);
    if (upper) words[i] = got;
    else words[i + word_bit] = got;
  }
}

// Thread q of a quad gets word q of each of its four threads, in their order.
__device__ __forceinline__ void exchange(u32 (&words)[4]) { swap_words(words, 1, 1), swap_words(words, 2, 2); }

// Where a thread's results belong: row g (and g + 8), and its first column.
struct Place {
  int row, column;
};

__device__ __forceinline__ Place place_of(const Tile& tile) {
  const u32 thread = thread_index();
  return {tile.row + (int)(thread / 32 * 16 + thread % 32 / 4), tile.column + (int)(thread % 4 * (RUN / 4))};
}

// A warp's block of metadata, where a thread has the codes of 16 columns of each 64, of its rows `row` (low halves) and row + 8. Codes
// beyond the last row pad.
__device__ __forceinline__ void store_codes(uint4* metadata, u32 (&codes)[4], const Tile& tile, int row, const Shape& shape) {
  const int block = row / 16;
  if (block * 16 >= shape.tokens) return;
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    if (row >= shape.tokens) codes[s] = 0x44444444u;
    else if (row + 8 >= shape.tokens) codes[s] = (codes[s] & 0xFFFF) | 0x44440000u;
  }
  metadata[((i64)block * shape.column_tiles + tile.column / TILE_N) * 32 + thread_index() % 32] = make_uint4(codes[0], codes[1], codes[2], codes[3]);
}

// What there is for each column; null: nothing (of a bias, zeros).
struct OfColumns {
  const u16* bias;
  const float* scale;
};

// Where there is nothing for a thread's rows.
struct NoRows {};

// A Kernel has `a_map` of whole tiles, `lower_map` of lower ones and `b_map`, with a GROUP `last_map`, too; `of_columns()`, of all of
// them; `of_rows(tile)`, what a thread needs for its rows; `multiply(d, ring, tile, meanwhile)`, which waits for each stage of a tile,
// releases it when it has been read, calls `meanwhile` when the last products have been issued (where A is sparse only when they are
// done: the compiler may use the metadata's registers for it), and ends when all are in d; and `store(d, tile, rows, ring)`.
//
// At the end of a tile nothing multiplies, so as little as possible there waits for memory. The producer finds the tiles, one ahead of the
// one that it brings in, in a place for four. What there is for each column it brings in with a tile's last stage, when all threads are
// done with the tile before. What there is for each row is read while the last products run, if A is dense.
template <class Kernel>
__device__ __forceinline__ void walk(const Kernel& kernel, const Shape& shape) {
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ __align__(16) u8 beside[BESIDE_BYTES];
  Ring ring = {launder(shared_address(shared)), shared_address(beside), 0, 0};  // kept, not found again and again

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(ring.barriers + 8 * stage, 1);
      barrier_init(ring.barriers + 8 * (STAGES + stage), CLUSTER * WARPGROUPS);  // of all blocks: B goes to all
    }
    barrier_init(ring.tile_done(), WARPGROUPS * 128);
    barrier_init_fence();
  }
  const OfColumns all = kernel.of_columns();
  if (all.bias == nullptr && threadIdx.x < TILE_N / 8) store_shared_four(ring.biases() + 16 * threadIdx.x, uint4());
  if (threadIdx.x == 0) ring.announce(0, tile_at(shape, 0));
  cluster_sync();

  if (threadIdx.x >= WARPGROUPS * 128) {
    registers_give<PRODUCER_REGISTERS>();
    if (threadIdx.x == WARPGROUPS * 128) {
      Tile tile;
      for (int position = 0; (tile = ring.announced(position)).height > 0; ++position) {
        ring.announce(position + 1, tile_at(shape, position + 1));
        const TensorMap& a_map = tile.height == WARPGROUPS ? kernel.a_map : kernel.lower_map;
        for (int k = 0; k < shape.stages; ++k) {
          const u32 a = ring.stages + ring.at * STAGE_BYTES, b = a + A_BYTES;
          barrier_wait(ring.empty(), ring.phase ^ 1);  // the first round finds all empty
          const bool last = k == shape.stages - 1;
          const int columns = last ? min(TILE_N, shape.columns - tile.column) : 0;
          const int bias_bytes = all.bias == nullptr ? 0 : 2 * columns, scale_bytes = all.scale == nullptr ? 0 : 4 * columns;
          if (last) barrier_wait(ring.tile_done(), position % 2 ^ 1);  // the first finds that of the one before it done
          barrier_expect_bytes(ring.full(), A_BYTES / WARPGROUPS * tile.height + B_BYTES + bias_bytes + scale_bytes);
          if (bias_bytes > 0) copy_bytes(ring.biases(), all.bias + tile.column, bias_bytes, ring.full());
          if (scale_bytes > 0) copy_bytes(ring.scales(), all.scale + tile.column, scale_bytes, ring.full());
          bring_a(a, a_map, ring.full(), k, tile);
          bring_b(b, kernel, ring.full(), k, shape.stride, tile, cluster_rank());
          ring.next();
        }
      }
    }
  } else {
    registers_take<CONSUMER_REGISTERS>();
    for (int position = 0;; ++position) {
      Tile tile = ring.announced_to_warp(position);
      if (tile.height == 0) break;
      if ((int)thread_index() / 128 >= tile.height) {  // nothing to do but to keep pace
        for (int left = shape.stages; left > 0; --left) {
          // All four warps have seen the stage before it may be filled again: one that looks a whole ring too late would wait
          // for ever. Where they multiply, wgmma keeps them together.
          ring.wait();
          sync_threads(1 + thread_index() / 128, 128);
          ring.release(ring.at);
          ring.next();
        }
      } else {
        float d[TILE_N / 2];
#pragma unroll
        for (int i = 0; i < TILE_N / 2; ++i) d[i] = 0;
        decltype(kernel.of_rows(tile)) rows;
        kernel.multiply(d, ring, tile, [&] {
          tile = ring.announced_to_warp(position);  // again: there are no registers to keep it in
          rows = kernel.of_rows(tile);
        });
        kernel.store(d, tile, rows, ring);
      }
      barrier_arrive(ring.tile_done(), cluster_rank());
    }
  }
  cluster_sync();  // the other blocks may still arrive at our barriers
}
