// out[T, D] = unpack(packed[T, H/2], metadata[T, H/8]) @ weight[D, H]^T + bias[D], 16-bit floats, fp32 accumulation.
//
// A tile of WARPGROUPS*64 rows by TILE_N columns is computed by WARPGROUPS warpgroups, each 64 rows, while one thread of
// another warpgroup keeps bringing in the next stages of 64 logical columns of K: `packed` by 32 stored columns,
// `weight` by 64. CLUSTER blocks hold neighbouring rows and each brings in a part of the weight's tile for all of them.
// Blocks are persistent and walk over tiles. Tiles that are left after whole rounds are a stream of groups of four stages
// that is cut into equal pieces, one for each cluster: a tile that a cut goes through is summed in parts, in a fixed order,
// all but the last of which go through `partial`.
//
// Compile-time: ELEMENT ("bf16" or "f16"), WARPGROUPS (2 or 3), CLUSTER (a power of 2), STAGES.

#include "ptx.cuh"

constexpr int K = 64;  // logical columns a stage
constexpr int TILE_N = 256;
constexpr int ROWS = 64 * WARPGROUPS;
constexpr int A_BYTES = ROWS * K;  // half of K stored, two bytes each
constexpr int B_BYTES = TILE_N * K * 2;
constexpr int STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int PRODUCER_REGISTERS = WARPGROUPS == 2 ? 40 : 32, CONSUMER_REGISTERS = WARPGROUPS == 2 ? 232 : 160;

struct Shape {
  int tokens, model_dim;
  int groups;           // of four stages that a tile takes: the K axis over 256, rounded up (zeros beyond its end)
  int row_clusters;     // clusters of row tiles
  int column_tiles;     // tiles of TILE_N columns
  int band;             // row clusters that are walked column by column, so that what is read again is still in L2
  int metadata_stride;  // bytes a row
  int rounds;           // tiles that each cluster computes as a whole, before what is streamed
  int streamed;         // tiles after them that are streamed, fewer than there are clusters
  int streamers;        // clusters that take part in that, at least 1
};

struct Tile {
  int row, column;
};

__device__ __forceinline__ Tile tile_of(const Shape& shape, int index, u32 rank) {
  const int band = index / (shape.band * shape.column_tiles), inside = index - band * shape.band * shape.column_tiles;
  const int height = min(shape.band, shape.row_clusters - band * shape.band);
  return {((band * shape.band + inside % height) * CLUSTER + (int)rank) * ROWS, inside / height * TILE_N};
}

// A cluster's work is a sequence of segments: a tile and the groups of it that are to be summed.
struct Segment {
  int tile, first, last;
};

// Where the piece of the stream begins that belongs to `cluster`, in groups.
__device__ __forceinline__ int piece_begin(const Shape& shape, int cluster) {
  return (int)((i64)shape.streamed * shape.groups * min(cluster, shape.streamers) / shape.streamers);
}

// The segment at `position`; false beyond the end. Whole tiles come first: there all clusters walk along K together, and
// find in L2 what another has just read. Of a piece of the stream, what another cluster waits for comes first.
__device__ __forceinline__ bool segment_at(const Shape& shape, int position, Segment& segment) {
  const int clusters = gridDim.x / CLUSTER, cluster = blockIdx.x / CLUSTER;
  segment = {position * clusters + cluster, 0, shape.groups};
  if (position < shape.rounds) return true;
  const int begin = piece_begin(shape, cluster), end = piece_begin(shape, cluster + 1);
  if (begin == end) return false;
  const int tile = (end - 1) / shape.groups, start = tile * shape.groups;
  segment = {shape.rounds * clusters + tile, max(begin - start, 0), end - start};
  if (position == shape.rounds) return true;
  segment = {segment.tile - 1, begin - start + shape.groups, shape.groups};
  return position == shape.rounds + 1 && begin < start;
}

// The metadata of 256 columns for this thread's two rows (g and g + 8 of its warp's 16), in the order of the K axis:
// thread q of the quad reads the 8 bytes of stage q. Beyond the K axis: any valid code.
struct RawMetadata {
  uint2 low, high;
};

__device__ __forceinline__ RawMetadata load_metadata(const u8* low, int to_high, bool inside) {
  RawMetadata raw = {{0x44444444u, 0x44444444u}, {0x44444444u, 0x44444444u}};
  if (inside) raw.low = __ldg((const uint2*)low), raw.high = __ldg((const uint2*)(low + to_high));
  return raw;
}

// wgmma.sp takes, from thread 2p of a quad, the codes of columns 0-15 of rows g and g + 8, and from thread 2p + 1 those of
// columns 16-31, p being the selector. So neighbours swap halves: afterwards `even[s]` and `odd[s]` hold step s of the stage
// that an even or an odd thread has read: for selector 0 in the quad's first two threads, for selector 1 in the others.
struct Metadata {
  u32 even[2], odd[2];
};

__device__ __forceinline__ Metadata distribute(const RawMetadata& raw, bool is_odd) {
  Metadata metadata;
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const u32 low = step ? raw.low.y : raw.low.x, high = step ? raw.high.y : raw.high.x;
    const u32 first = permute_bytes<0x5410>(low, high);   // columns 0-15 of both rows
    const u32 second = permute_bytes<0x7632>(low, high);  // columns 16-31
    const u32 received = __shfl_xor_sync(0xFFFFFFFFu, is_odd ? first : second, 1);
    metadata.even[step] = is_odd ? received : first;
    metadata.odd[step] = is_odd ? second : received;
  }
  return metadata;
}

// Three warpgroups of 64 x 256 need 155 registers a thread, above the 128 with which 512 threads start, and ptxas refuses
// such a kernel unless it is told that it starts with more. It does not: the launch code writes 128 into the cubin, and the
// roles below take and give what they need before they use it.
#if WARPGROUPS == 2
#define BOUNDS __launch_bounds__(128 * (WARPGROUPS + 1), 1)
#else
#define BOUNDS __maxnreg__(CONSUMER_REGISTERS)
#endif

extern "C" __global__ void BOUNDS __cluster_dims__(CLUSTER, 1, 1)
    sparse_mm(const __grid_constant__ TensorMap packed_map, const __grid_constant__ TensorMap weight_map,
              const u8* __restrict__ metadata, const u16* __restrict__ bias, u16* __restrict__ out,
              float4* __restrict__ partial, u32* __restrict__ flags, const Shape shape) {
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  const u32 base = shared_address(shared);
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  const int warpgroup = threadIdx.x / 128;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, CLUSTER * WARPGROUPS);  // of all blocks: the weight goes to all
    }
    barrier_init_fence();
  }
  cluster_sync();

  if (warpgroup == WARPGROUPS) {
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
    const int lane = threadIdx.x % 32, q = lane % 4;
    const int row_inside = warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;
    const bool is_odd = q & 1;
    const bool arrives = threadIdx.x % 128 < CLUSTER;  // one thread for each block of the cluster
    int stage = 0;
    u32 turn = 0;  // twice the position in the sequence of segments, plus the phase: one register instead of two
    Segment segment;
    for (; segment_at(shape, turn / 2, segment); turn += 2) {
      const Tile tile = tile_of(shape, segment.tile, cluster_rank());
      // Rows beyond the last one repeat it; what is computed of them is not stored.
      const int low = min(tile.row + row_inside, shape.tokens - 1), high = min(tile.row + row_inside + 8, shape.tokens - 1);
      const int to_high = (high - low) * shape.metadata_stride;
      int at = 32 * segment.first + 8 * q;  // of this thread in a row of metadata
      u32 offset_codes = (u32)low * shape.metadata_stride + at;  // 32 bits: metadata stays below 4 GB

      float d[TILE_N / 2];
      u32 accumulate = 0;
      RawMetadata raw = load_metadata(metadata + offset_codes, to_high, at < shape.metadata_stride);
      Metadata next = distribute(raw, is_odd);
      for (int left = segment.last - segment.first; left > 0; --left) {
        const Metadata current = next;
        at += 32, offset_codes += 32;
        raw = load_metadata(metadata + offset_codes, to_high, at < shape.metadata_stride);
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const u32 a = base + stage * STAGE_BYTES;
          const u64 a_tile = matrix_descriptor<64>(a + warpgroup * (64 * K)), b_tile = matrix_descriptor<128>(a + A_BYTES);
          barrier_wait(full + 8 * stage, turn & 1);
          wgmma_fence();
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            const u32 codes_of_step = part & 1 ? current.odd[step] : current.even[step];
            const u64 a_step = a_tile + step * (32 >> 4), b_step = b_tile + step * (64 >> 4);
            if (part < 2) wgmma_sparse<0>(d, a_step, b_step, codes_of_step, accumulate);
            else wgmma_sparse<1>(d, a_step, b_step, codes_of_step, accumulate);
            accumulate = 1;
          }
          wgmma_commit();
          if (part == 3) next = distribute(raw, is_odd);
          // A stage may be filled again once it has been read. The metadata's registers may be written again only when all
          // is done: wgmma reads them while it runs, and the compiler does not know.
          if (part == 3) wgmma_wait<0>();
          else if (part > 0) wgmma_wait<1>();
          if (part > 0 && arrives) barrier_arrive(empty + 8 * (stage == 0 ? STAGES - 1 : stage - 1), threadIdx.x % 128);
          if (part == 3 && arrives) barrier_arrive(empty + 8 * stage, threadIdx.x % 128);
          if (++stage == STAGES) stage = 0, turn ^= 1;
        }
      }

      // Found again rather than kept: the loop above has no registers to spare.
      turn = launder(turn);
      segment_at(shape, turn / 2, segment);
      const Tile done = tile_of(shape, segment.tile, cluster_rank());
      const int out_row = done.row + row_inside, block_threads = 128 * WARPGROUPS;
      if (segment.last < shape.groups) {
        float4* to = partial + (i64)blockIdx.x * (TILE_N / 8) * block_threads + threadIdx.x;
#pragma unroll
        for (int j = 0; j < TILE_N / 8; ++j) to[j * block_threads] = make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
        __threadfence();
        sync_threads(block_threads);
        if (threadIdx.x == 0) flag_raise(flags + blockIdx.x);
        continue;
      }
      int other = blockIdx.x / CLUSTER;
      for (int summed = segment.first; summed > 0;) {
        const int begin = piece_begin(shape, other);
        summed -= begin - piece_begin(shape, --other);
        const int block = other * CLUSTER + cluster_rank();
        const float4* from = partial + (i64)block * (TILE_N / 8) * block_threads + threadIdx.x;
        flag_wait(flags + block);
#pragma unroll
        for (int j = 0; j < TILE_N / 8; ++j) {
          const float4 other = __ldcg(from + j * block_threads);
          d[4 * j] += other.x, d[4 * j + 1] += other.y, d[4 * j + 2] += other.z, d[4 * j + 3] += other.w;
        }
      }

      // Thread q holds columns 2q, 2q + 1 of every eight, in rows g and g + 8. Neighbours swap, so that each writes four
      // columns at once and a row's 32 bytes go out together.
      u16* line = out + (i64)out_row * shape.model_dim + done.column + 8 * is_odd + 4 * (q / 2);
      const u16* offset = bias + done.column + 2 * q;
      const int columns = shape.model_dim - done.column;  // a multiple of 8
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < TILE_N / 8; j += 2) {
          u32 pair[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const u32 two = bias != nullptr && 8 * (j + i) < columns ? __ldg((const u32*)(offset + 8 * (j + i))) : 0;
            const float* v = d + 4 * (j + i) + 2 * half;
            pair[i] = pack_floats(v[0] + to_float((u16)two), v[1] + to_float((u16)(two >> 16)));
          }
          const u32 received = __shfl_xor_sync(0xFFFFFFFFu, is_odd ? pair[0] : pair[1], 1);
          const uint2 four = is_odd ? make_uint2(received, pair[1]) : make_uint2(pair[0], received);
          if (out_row + 8 * half < shape.tokens && 8 * (j + is_odd) < columns) *(uint2*)(line + 8 * j) = four;
        }
        line += 8 * (i64)shape.model_dim;
      }
    }
  }
  cluster_sync();  // the other blocks may still arrive at our barriers
}
