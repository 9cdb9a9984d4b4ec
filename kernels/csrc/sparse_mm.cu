// out[T, D] = unpack(packed[T, H/2], metadata) @ weight[D, H]^T + bias[D], 16-bit floats, fp32 accumulation.
//
// A tile of 192 rows by 256 columns is computed by three warpgroups, each 64 rows, while one thread of another warpgroup
// keeps bringing in the next stages of 64 logical columns of K: `packed` by 32 stored columns, `weight` by 64. CLUSTER
// blocks hold neighbouring rows and each brings in a part of the weight's tile for all of them. The rows that are left
// over below are shared out among the blocks of one more cluster in tiles of 64, 128 or 192 rows, of which one, two or
// three warpgroups work.
//
// Blocks are persistent and walk over tiles. Tiles that are left after whole rounds are a stream of groups of four stages
// that is cut into pieces of equal work, one for each cluster: a tile that a cut goes through is summed in parts, in a fixed
// order, all but the last of which go through `partial`.
//
// Compile-time: ELEMENT ("bf16" or "f16"), CLUSTER (a power of 2), STAGES.

#include "ptx.cuh"

constexpr int WARPGROUPS = 3;
constexpr int K = 64;  // logical columns a stage
constexpr int TILE_N = 256;
constexpr int ROWS = 64 * WARPGROUPS;
constexpr int A_BYTES = ROWS * K;  // half of K stored, two bytes each
constexpr int B_BYTES = TILE_N * K * 2;
constexpr int STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int MAX_CLUSTERS = 132;
constexpr int PARTIAL = ROWS * TILE_N / 4;  // of a block, in float4
constexpr int PRODUCER_REGISTERS = 32, CONSUMER_REGISTERS = 160;

// Where a piece of the stream begins: a tile and a group in it.
struct Cut {
  int tile, group;
};

struct Shape {
  int tokens, model_dim;
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

// 64 x 256 accumulators need some 150 registers a thread, above the 128 with which 512 threads start, and ptxas refuses such
// a kernel unless it is told that it starts with more. It does not: the launch code writes 128 into the cubin, and the roles
// below take and give what they need before they use it.
extern "C" __global__ void __maxnreg__(CONSUMER_REGISTERS) __cluster_dims__(CLUSTER, 1, 1)
    sparse_mm(const __grid_constant__ TensorMap packed_map, const __grid_constant__ TensorMap weight_map,
              const uint4* __restrict__ metadata, const u16* __restrict__ bias, u16* __restrict__ out,
              float4* __restrict__ partial, u32* __restrict__ flags, const Shape shape) {
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  const u32 base = shared_address(shared);
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, CLUSTER * WARPGROUPS);  // of all blocks: the weight goes to all
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
          const u32 rank = cluster_rank();
          const u32 a = base + stage * STAGE_BYTES, b = a + A_BYTES + rank * (B_BYTES / CLUSTER), ready = full + 8 * stage;
          barrier_wait(empty + 8 * stage, phase);
          barrier_expect_bytes(ready, STAGE_BYTES);
          copy_box(a, packed_map, k * (K / 2), tile.row, ready);
          copy_box_to((1 << CLUSTER) - 1, b, weight_map, k * K, tile.column + rank * (TILE_N / CLUSTER), ready);
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
      }
    }
  } else {
    registers_take<CONSUMER_REGISTERS>();
    const u32 thread = thread_index(), warpgroup = thread / 128;
    const bool arrives = thread % 128 < CLUSTER;  // one thread for each block of the cluster
    int stage = 0;
    u32 turn = 0;  // twice the position in the sequence of segments, plus the phase: one register instead of two
    Segment segment;
    for (; segment_at(shape, turn / 2, segment); turn += 2) {
      const Tile tile = tile_of(shape, segment.tile, cluster_rank());
      if ((int)warpgroup >= tile.height) {  // nothing to do but to keep pace
        for (int left = 4 * (segment.last - segment.first); left > 0; --left) {
          barrier_wait(full + 8 * stage, turn & 1);
          if (arrives) barrier_arrive(empty + 8 * stage, thread % 128);
          if (++stage == STAGES) stage = 0, turn ^= 1;
        }
        continue;
      }
      // A warp's block of metadata, 16 rows by a group; beyond the last row the last one: it is not stored what comes of it.
      const int block = min(tile.row / 16 + (int)thread / 32, (shape.tokens - 1) / 16);
      u32 at = (block * shape.groups + segment.first) * 32 + thread % 32;  // 32 bits count 64 GB

      float d[TILE_N / 2];
#pragma unroll
      for (int i = 0; i < TILE_N / 2; ++i) d[i] = 0;
      uint4 next = load_metadata(metadata + at);
      for (int left = segment.last - segment.first; left > 0; --left) {
        const u32 codes[4] = {next.x, next.y, next.z, next.w};
        if (left > 1) at += 32;
        next = load_metadata(metadata + at);
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const u32 a = base + stage * STAGE_BYTES;
          const u64 a_tile = matrix_descriptor<64>(a + warpgroup * (64 * K)), b_tile = matrix_descriptor<128>(a + A_BYTES);
          barrier_wait(full + 8 * stage, turn & 1);
          wgmma_fence();
          // Of the first step's codes threads 0 and 1 of a quad hold those of columns 0-15 and 16-31, threads 2 and 3 of the second's.
          wgmma_sparse<0>(d, a_tile, b_tile, codes[part]);
          wgmma_sparse<1>(d, a_tile + (32 >> 4), b_tile + (64 >> 4), codes[part]);
          wgmma_commit();
          // A stage may be filled again once it has been read. The metadata's registers may be written again only when all
          // is done: wgmma reads them while it runs, and the compiler does not know.
          if (part == 3) wgmma_wait<0>();
          else if (part > 0) wgmma_wait<1>();
          if (part > 0 && arrives) barrier_arrive(empty + 8 * (stage == 0 ? STAGES - 1 : stage - 1), thread % 128);
          if (part == 3 && arrives) barrier_arrive(empty + 8 * stage, thread % 128);
          if (++stage == STAGES) stage = 0, turn ^= 1;
        }
      }

      // Found again rather than kept: the loop above has no registers to spare.
      turn = launder(turn);
      segment_at(shape, turn / 2, segment);
      if (segment.last < shape.groups) {
        float4* to = partial + (i64)blockIdx.x * PARTIAL + thread;
#pragma unroll
        for (int j = 0; j < TILE_N / 8; ++j) to[j * 128 * WARPGROUPS] = make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
        __threadfence();
        sync_threads(128 * tile_of(shape, segment.tile, 0).height);
        if (thread == 0) flag_raise(flags + blockIdx.x);
        continue;
      }
      for (int first = segment.first, other = blockIdx.x / CLUSTER; first > 0;) {
        const Cut begin = shape.cuts[--other];
        const int before = begin.tile == segment.tile ? begin.group : 0;
        if (before == first) continue;  // an empty piece
        first = before;
        const int block = other * CLUSTER + cluster_rank();
        const float4* from = partial + (i64)block * PARTIAL + thread;
        flag_wait(flags + block);
#pragma unroll
        for (int j = 0; j < TILE_N / 8; ++j) {
          const float4 part = __ldcg(from + j * 128 * WARPGROUPS);
          d[4 * j] += part.x, d[4 * j + 1] += part.y, d[4 * j + 2] += part.z, d[4 * j + 3] += part.w;
        }
      }

      const Tile done = tile_of(shape, launder(segment.tile), cluster_rank());
      const u32 lane = thread_index() % 32, q = lane % 4;
      const int out_row = done.row + (int)(thread_index() / 32 * 16 + lane / 4);
      // Thread q holds columns 2q, 2q + 1 of every eight, in rows g and g + 8. Neighbours swap, so that each writes four
      // columns at once and a row's 32 bytes go out together.
      const bool is_odd = q & 1;
      u16* line = out + (i64)out_row * shape.model_dim + done.column + 8 * is_odd + 4 * (q / 2);
      const u16* offset = bias + done.column + 2 * q;
      const int columns = shape.model_dim - done.column;  // a multiple of 8
#pragma unroll
      for (int j = 0; j < TILE_N / 8; j += 2) {
        u32 two[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) two[i] = bias != nullptr && 8 * (j + i) < columns ? __ldg((const u32*)(offset + 8 * (j + i))) : 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          u32 pair[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float* v = d + 4 * (j + i) + 2 * half;
            pair[i] = pack_floats(v[0] + to_float((u16)two[i]), v[1] + to_float((u16)(two[i] >> 16)));
          }
          const u32 received = __shfl_xor_sync(0xFFFFFFFFu, is_odd ? pair[0] : pair[1], 1);
          const uint2 four = is_odd ? make_uint2(received, pair[1]) : make_uint2(pair[0], received);
          if (out_row + 8 * half < shape.tokens && 8 * (j + is_odd) < columns) {
            *(uint2*)(line + 8 * half * (i64)shape.model_dim + 8 * j) = four;
          }
        }
      }
    }
  }
  cluster_sync();  // the other blocks may still arrive at our barriers
}
