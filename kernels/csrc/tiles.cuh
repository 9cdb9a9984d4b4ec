// What the matmuls here have in common: out[T, N] = A[T, K] @ B[N, K]^T, tile by tile.
//
// A tile of 192 rows by 256 columns is computed by three warpgroups, each 64 rows, while one thread of another warpgroup
// keeps bringing in the next stages of 64 columns of K. CLUSTER blocks hold neighbouring rows and each brings in a part of
// B's tile for all of them. The rows that are left over below are shared out among the blocks of one more cluster in tiles of
// 64, 128 or 192 rows, of which one, two or three warpgroups work.
//
// Blocks are persistent and walk over tiles. Tiles that are left after whole rounds are a stream of groups of four stages
// that is cut into pieces of equal work, one for each cluster: a tile that a cut goes through is summed in parts, in a fixed
// order, all but the last of which go through `partial`. schedule.py shares out the work.
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
constexpr int ROWS = 64 * WARPGROUPS;
constexpr int B_BYTES = TILE_N * K * 2;
constexpr int MAX_CLUSTERS = 132;
constexpr int PARTIAL = ROWS * TILE_N / 4;  // of a block, in float4
constexpr int PRODUCER_REGISTERS = 32, CONSUMER_REGISTERS = 160;

// Where a piece of the stream begins: a tile and a group in it.
struct Cut {
  int tile, group;
};

struct Shape {
  int tokens, columns;  // of the result
  int groups;        // of four stages that a tile takes: the K axis over 256, rounded up (zeros beyond its end)
  int row_clusters;  // clusters of whole row tiles
  int last_height;   // warpgroups at work in the tiles of the cluster below them, which come last; 0: there is none
  int column_tiles;  // tiles of TILE_N columns
  int band;          // row clusters that are walked column by column, so that what is read again is still in L2
  int rounds;        // whole tiles that each cluster computes before what is streamed
  Cut cuts[MAX_CLUSTERS + 1];  // each cluster's piece goes from its cut to the next one's
};

struct Tile {
  int row, column, height;
};

__device__ __forceinline__ Tile tile_of(const Shape& shape, int index, u32 rank) {
  const int whole = shape.row_clusters * shape.column_tiles;
  if (index >= whole) {
    const int row = shape.row_clusters * CLUSTER * ROWS + (int)rank * 64 * shape.last_height;
    return {row, (index - whole) * TILE_N, shape.last_height};
  }
  const int band = index / (shape.band * shape.column_tiles), inside = index - band * shape.band * shape.column_tiles;
  const int height = min(shape.band, shape.row_clusters - band * shape.band);
  return {((band * shape.band + inside % height) * CLUSTER + (int)rank) * ROWS, inside / height * TILE_N, WARPGROUPS};
}

// A cluster's work is a sequence of segments: a tile and the groups of it that are to be summed.
struct Segment {
  int tile, first, last;
};

// The segment at `position`; false beyond the end. Whole tiles come first: there all clusters walk along K together, and
// find in L2 what another has just read. A piece of the stream is walked from its end: what another cluster waits for
// comes first, and what waits for others last.
__device__ __forceinline__ bool segment_at(const Shape& shape, int position, Segment& segment) {
  const int clusters = gridDim.x / CLUSTER, cluster = blockIdx.x / CLUSTER;
  segment = {position * clusters + cluster, 0, shape.groups};
  if (position < shape.rounds) return true;
  const Cut begin = shape.cuts[cluster], end = shape.cuts[cluster + 1];
  const int tile = end.tile - (end.group == 0) - (position - shape.rounds);
  segment = {tile, tile == begin.tile ? begin.group : 0, tile == end.tile ? end.group : shape.groups};
  return tile >= begin.tile && segment.first < segment.last;
}

// The consumers' side of the stages, which the producer fills in a ring.
struct Ring {
  u32 base, full, empty;  // shared addresses
  u32 thread;
  int stage;
  u32 turn;  // twice the position in the sequence of segments, plus the phase: one register instead of two

  __device__ __forceinline__ void wait() const { barrier_wait(full + 8 * stage, turn & 1); }

  // One thread of each warpgroup for each block of the cluster: they all wait for what one brings in.
  __device__ __forceinline__ void release(int which) const {
    if (thread % 128 < CLUSTER) barrier_arrive(empty + 8 * which, thread % 128);
  }

  __device__ __forceinline__ int previous() const { return stage == 0 ? STAGES - 1 : stage - 1; }

  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, turn ^= 1;
  }
};

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

// A Kernel has `STAGE_BYTES`, A's part first; `bring(a, b, ready, k, tile, rank)`, which starts the copies of stage k;
// `multiply(d, ring, tile, segment)`, which waits for each stage of a segment, releases it when it has been read, and ends when
// the products are in d; and `store(d, tile)`.
template <class Kernel>
__device__ __forceinline__ void walk(const Kernel& kernel, const Shape& shape, float4* partial, u32* flags) {
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  const u32 base = shared_address(shared);
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, CLUSTER * WARPGROUPS);  // of all blocks: B goes to all
    }
    barrier_init_fence();
  }
  cluster_sync();

  if (threadIdx.x >= WARPGROUPS * 128) {
    registers_give<PRODUCER_REGISTERS>();
    if (threadIdx.x == WARPGROUPS * 128) {
      int stage = 0;
      u32 phase = 1;  // the first round finds every stage empty
      Segment segment;
      for (int position = 0; segment_at(shape, position, segment); ++position) {
        const Tile tile = tile_of(shape, segment.tile, cluster_rank());
        for (int k = 4 * segment.first; k < 4 * segment.last; ++k) {
          const u32 a = base + stage * Kernel::STAGE_BYTES, b = a + Kernel::STAGE_BYTES - B_BYTES, ready = full + 8 * stage;
          barrier_wait(empty + 8 * stage, phase);
          barrier_expect_bytes(ready, Kernel::STAGE_BYTES);
          kernel.bring(a, b, ready, k, tile, cluster_rank());
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
      }
    }
  } else {
    registers_take<CONSUMER_REGISTERS>();
    Ring ring = {base, full, empty, thread_index(), 0, 0};
    Segment segment;
    for (; segment_at(shape, ring.turn / 2, segment); ring.turn += 2) {
      const Tile tile = tile_of(shape, segment.tile, cluster_rank());
      if ((int)ring.thread / 128 >= tile.height) {  // nothing to do but to keep pace
        for (int left = 4 * (segment.last - segment.first); left > 0; --left) {
          // All four warps have seen the stage before it may be filled again: one that looks a whole ring too late would wait
          // for ever. Where they multiply, wgmma keeps them together.
          ring.wait();
          sync_threads(2 + ring.thread / 128, 128);
          ring.release(ring.stage);
          ring.next();
        }
        continue;
      }
      float d[TILE_N / 2];
#pragma unroll
      for (int i = 0; i < TILE_N / 2; ++i) d[i] = 0;
      kernel.multiply(d, ring, tile, segment);

      // Found again rather than kept: the loop has no registers to spare.
      ring.turn = launder(ring.turn);
      segment_at(shape, ring.turn / 2, segment);
      if (segment.last < shape.groups) {
        float4* to = partial + (i64)blockIdx.x * PARTIAL + thread_index();
#pragma unroll
        for (int j = 0; j < TILE_N / 8; ++j) to[j * 128 * WARPGROUPS] = make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
        __threadfence();
        sync_threads(1, 128 * tile_of(shape, segment.tile, 0).height);
        if (thread_index() == 0) flag_raise(flags + blockIdx.x);
        continue;
      }
      for (int first = segment.first, other = blockIdx.x / CLUSTER; first > 0;) {
        const Cut begin = shape.cuts[--other];
        const int before = begin.tile == segment.tile ? begin.group : 0;
        if (before == first) continue;  // an empty piece
        first = before;
        const int block = other * CLUSTER + cluster_rank();
        const float4* from = partial + (i64)block * PARTIAL + thread_index();
        flag_wait(flags + block);
#pragma unroll
        for (int j = 0; j < TILE_N / 8; ++j) {
          const float4 part = __ldcg(from + j * 128 * WARPGROUPS);
          d[4 * j] += part.x, d[4 * j + 1] += part.y, d[4 * j + 2] += part.z, d[4 * j + 3] += part.w;
        }
      }
      kernel.store(d, tile_of(shape, launder(segment.tile), cluster_rank()));
    }
  }
  cluster_sync();  // the other blocks may still arrive at our barriers
}
