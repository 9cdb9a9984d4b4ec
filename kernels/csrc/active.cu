// out[T, D'] = relu(x[T, D] @ up[H, D]^T + up_bias[H])^2 @ down[H, D'] + down_bias[D'] for few tokens, exactly: bound by reading weights,
// of which a row of `down` is read only where its neuron fires for one token at least.
//
// Two kernels. The first reads all of `up`, and leaves y and a bit for each neuron. Of the second each block counts the bits before
// it, so that the neurons that fire are numbered in their order, and takes those of its number: a sum's parts do not depend on the
// neurons that do not fire, nor on when a block runs. Blocks of a cluster take as many each, and add up what they have.
//
// In both each warp has a ring of stages in shared memory to itself, of 16 rows of 64 columns, into which it copies ahead: it waits for
// no other warp, and enough is under way for the memory's latency. Of row r eight columns c lie where c ^ r % 8 would, so that eight
// rows meet no bank twice. (Rows 16 bytes longer meet none either, but copies into them take longer: 4.0 TB/s, not 4.27.)
//
// FP8: x, up and down are e4m3 with scales, two of them in the place of an element, D and D' half as many. Of `up` products are of
// e4m3. Between the kernels relu(h) is kept in 16 bits; its square becomes e4m3 in the second, which then knows the largest of a
// token; `down` is widened to f16, which holds both exactly, so that neurons, which lie in rows, can be multiplied in pairs.
//
// Compile-time: ELEMENT ("bf16" or "f16"); FP8 (0 or 1); EIGHTS of tokens; UP_STAGES, DOWN_STAGES: of a ring; COLUMN_WARPS: of a block
// of the second kernel, side by side.
//
// Each kernel may start before the one before it has ended. Until it has waited for that nothing is read, and nothing is told to be
// constant (no __restrict__): what it reads may be being written.

#include "fp8.cuh"

constexpr int WARPS = 8, PADDED = 8 * EIGHTS, ROWS = 16, RUN = 64, WEIGHTS = ROWS * RUN * 2;  // tokens; of a stage, in bytes too

__device__ __forceinline__ u32 lies_at(int row, int eight) { return row * RUN * 2 + (eight ^ row % 8) * 16; }

// y [H, PADDED], zeros beyond the last token; bit n of active[i]: does neuron 8 i + n fire? FP8: relu(h) instead of y, and each block's
// largest by token. A block has neighbouring sixteens of neurons, one after the other, of which a warp has every eighth 64 columns.
// With the first one it brings in what it needs of x, which stays.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    active_relu2(const u16* x, const u16* up, const u16* bias, const float* x_scale, const float* up_scale, u16* y, u8* active,
                 u32* largest, int tokens, int model_dim, int sixteens) {
  constexpr int STEP = RUN * WARPS;
  extern __shared__ __align__(128) u8 shared[];  // rings, and x [T, D], its rows 16 bytes longer
  __shared__ float parts[2][WARPS][ROWS][PADDED];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int begin = (int)((i64)sixteens * blockIdx.x / gridDim.x), end = (int)((i64)sixteens * (blockIdx.x + 1) / gridDim.x);
  const int first_column = warp * RUN, x_pitch = 2 * model_dim + 16;
  const u32 ring = shared_address(shared) + warp * UP_STAGES * WEIGHTS, of_x = shared_address(shared) + WARPS * UP_STAGES * WEIGHTS;
  u32 of_token[EIGHTS];  // one that is there: the others are multiplied for nothing
#pragma unroll
  for (int eight = 0; eight < EIGHTS; ++eight) of_token[eight] = of_x + min(8 * eight + lane % 8, tokens - 1) * x_pitch + lane / 8 * 16;
  launch_next();
  wait_for_previous();

  int copied = begin, column = first_column, to = 0;  // what is next
  const auto copy = [&] {
    if (copied < end && column < model_dim) {
      const u16* from = up + (i64)(ROWS * copied + lane / 8) * model_dim + column + lane % 8 * 8;
#pragma unroll
      for (int i = 0; i < 4; ++i) copy_16(ring + to * WEIGHTS + lies_at(4 * i + lane / 8, lane % 8), from + 4 * i * model_dim, true);
      if (copied == begin) {
#pragma unroll 1
        for (int token = lane / 8; token < tokens; token += 4) {
          copy_16(of_x + token * x_pitch + 2 * column + lane % 8 * 16, x + (i64)token * model_dim + column + lane % 8 * 8, true);
        }
      }
    }
    copies_commit();
    column += STEP;
    if (column - first_column >= model_dim) column = first_column, ++copied;
    if (++to == UP_STAGES) to = 0;
  };
#pragma unroll 1
  for (int i = 0; i < UP_STAGES - 1; ++i) copy();

  u32 most[EIGHTS] = {};
  for (int sixteen = begin, stage = 0; sixteen < end; ++sixteen) {
    float d[EIGHTS][4] = {};
    for (int start = 0; start < model_dim; start += STEP) {
      copies_wait<UP_STAGES - 2>();
      __syncwarp();
      copy();
      if (start + first_column < model_dim) {
        const u32 here = ring + stage * WEIGHTS;
#pragma unroll
        for (int step = 0; step < 4; step += 2) {
          u32 a[2][4];
          load_matrices(a[0], here + lies_at(lane % 16, 2 * step + lane / 16));
          load_matrices(a[1], here + lies_at(lane % 16, 2 * step + 2 + lane / 16));
#pragma unroll
          for (int eight = 0; eight < EIGHTS; ++eight) {
            u32 b[4];
            load_matrices(b, of_token[eight] + 2 * (start + first_column) + 32 * step);
            FP8 ? mma_e4m3(d[eight], a[0], b[0], b[1]) : mma(d[eight], a[0], b[0], b[1]);
            FP8 ? mma_e4m3(d[eight], a[1], b[2], b[3]) : mma(d[eight], a[1], b[2], b[3]);
          }
        }
      }
      if (++stage == UP_STAGES) stage = 0;
    }
    auto& here = parts[sixteen % 2];  // of the other one sums may still be made
#pragma unroll
    for (int eight = 0; eight < EIGHTS; ++eight) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *(float2*)&here[warp][8 * half + g][8 * eight + 2 * q] = make_float2(d[eight][2 * half], d[eight][2 * half + 1]);
      }
    }
    __syncthreads();
    if ((warp + 2 * sixteen) % WARPS > 1) continue;  // two warps' work, each time others'
    const int row = 8 * (warp % 2) + g, neuron = ROWS * sixteen + row;
    const float more = bias == nullptr ? 0 : to_float(bias[neuron]);
    u32 fires = 0;
#pragma unroll
    for (int eight = 0; eight < EIGHTS; ++eight) {
      const int token = 8 * eight + 2 * q;
      float2 sum = make_float2(FP8 ? 0 : more, FP8 ? 0 : more);
#pragma unroll
      for (int from = 0; from < WARPS; ++from) {
        const float2 part = *(const float2*)&here[from][row][token];
        sum.x += part.x, sum.y += part.y;
      }
      if (FP8) {
        const float scale = up_scale[neuron];
        sum.x = sum.x * x_scale[min(token, tokens - 1)] * scale + more;
        sum.y = sum.y * x_scale[min(token + 1, tokens - 1)] * scale + more;
      }
      u32 value = relu(pack_floats(sum.x, sum.y));
      if (!FP8) value = square(value);
      if (token + 1 >= tokens) value = token < tokens ? value & 0xFFFF : 0;
      most[eight] = __vmaxu2(most[eight], value);
      *(u32*)(y + (i64)neuron * PADDED + token) = value;
      fires |= value;
    }
    const u32 bits = __reduce_or_sync(~0u, (u32)(fires != 0) << g);
    if (lane == 0) active[2 * sixteen + warp % 2] = (u8)bits;
  }
  if (!FP8) return;
  __shared__ u32 of_warps[WARPS][PADDED / 2];
#pragma unroll
  for (int eight = 0; eight < EIGHTS; ++eight) {
    for (int step = 4; step < 32; step *= 2) most[eight] = __vmaxu2(most[eight], __shfl_xor_sync(~0u, most[eight], step));
    if (g == 0) of_warps[warp][4 * eight + q] = most[eight];
  }
  __syncthreads();
  if (threadIdx.x < PADDED / 2) {
    u32 of_block = 0;
    for (int from = 0; from < WARPS; ++from) of_block = __vmaxu2(of_block, of_warps[from][threadIdx.x]);
    largest[blockIdx.x * (PADDED / 2) + threadIdx.x] = of_block;
  }
}

constexpr int MOST_WORDS = (1 << 16) / 32 / (32 * WARPS);  // of bits, that a thread has: of 65536 neurons

// A cluster has 64 COLUMN_WARPS elements of a row, a warp 64 of them and every TURNS-th sixteen of its block's neurons.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    active_mm(const u16* y, const u32* active, const u16* largest, const u16* down, const float* down_scale, const u16* bias, u16* out,
              int tokens, int hidden_dim, int out_dim, int first_blocks) {
  constexpr int EACH = FP8 ? 2 : 1, COLUMNS = RUN * COLUMN_WARPS * EACH, TILES = RUN / 16 * EACH;
  constexpr int TURNS = WARPS / COLUMN_WARPS, SUMS = COLUMNS + 4;
  constexpr int STAGE = WEIGHTS + ROWS * 2 * PADDED, RINGS = WARPS * DOWN_STAGES * STAGE;
  static_assert(TURNS * PADDED * SUMS * 4 <= RINGS);
  extern __shared__ __align__(128) u8 shared[];
  float* sums = (float*)shared;  // [TURNS][PADDED][SUMS], when the rings are done with
  u16* list = (u16*)(shared + RINGS);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = cluster_rank(), blocks = cluster_size();
  launch_next();
  wait_for_previous();
  const int words = hidden_dim / 32, each = (words + 32 * WARPS - 1) / (32 * WARPS), begin = (int)threadIdx.x * each;
  u32 fire[MOST_WORDS];
  int total = 0;
#pragma unroll
  for (int i = 0; i < MOST_WORDS; ++i) {
    fire[i] = i < each && begin + i < words ? active[begin + i] : 0;
    total += __popc(fire[i]);
  }
  int number = block_before(total);  // of this thread's first one that fires
  const int part = (total + blocks * ROWS - 1) / (blocks * ROWS) * ROWS;
  const int low = min(rank * part, total), count = min(part, total - low);
#pragma unroll
  for (int i = 0; i < MOST_WORDS; ++i) {
    for (u32 bits = fire[i]; bits != 0; bits &= bits - 1, ++number) {
      if (number >= low && number < low + count) list[number - low] = (u16)(32 * (begin + i) + __ffs(bits) - 1);
    }
  }
  __shared__ float scales[PADDED];
  if (FP8) {
    for (int token = warp; token < PADDED; token += WARPS) {
      u32 most = 0;
      for (int i = lane; i < first_blocks; i += 32) most = max(most, (u32)largest[i * PADDED + token]);
      most = __reduce_max_sync(~0u, most);
      if (lane == 0) scales[token] = scale_of(most);
    }
  }
  __syncthreads();
  float inverse[EIGHTS];  // of the tokens whose products a thread makes
#pragma unroll
  for (int eight = 0; eight < EIGHTS; ++eight) inverse[eight] = FP8 ? 1 / scales[8 * eight + lane / 4] : 0;

  const int first = blockIdx.x / blocks * RUN * COLUMN_WARPS, turn = warp / COLUMN_WARPS, mine = warp % COLUMN_WARPS * RUN;
  const u32 ring = shared_address(shared) + warp * DOWN_STAGES * STAGE;
  const bool elements_there = first + mine < out_dim;
  const u16* from = down + (elements_there ? first + mine + lane % 8 * 8 : 0);
  int copied = ROWS * turn, to = 0;
  const auto copy = [&] {
    if (copied < count) {
      const u32 here = ring + to * STAGE;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 4 * i + lane / 8;
        const bool there = copied + row < count;
        const i64 neuron = there ? list[copied + row] : 0;
        copy_16(here + lies_at(row, lane % 8), from + neuron * out_dim, there && elements_there);
      }
#pragma unroll
      for (int at = lane; at < ROWS * EIGHTS; at += 32) {
        const bool there = copied + at / EIGHTS < count;
        const i64 neuron = there ? list[copied + at / EIGHTS] : 0;
        copy_16(here + WEIGHTS + at * 16, y + neuron * PADDED + at % EIGHTS * 8, there);
      }
    }
    copies_commit();
    copied += ROWS * TURNS;
    if (++to == DOWN_STAGES) to = 0;
  };
#pragma unroll 1
  for (int i = 0; i < DOWN_STAGES - 1; ++i) copy();

  float d[TILES][EIGHTS][4] = {};
  int stage = 0;
  for (int start = ROWS * turn; start < count; start += ROWS * TURNS) {
    copies_wait<DOWN_STAGES - 2>();
    __syncwarp();
    copy();
    const u32 here = ring + stage * STAGE, y_here = here + WEIGHTS + lane % 16 * 2 * PADDED + (EIGHTS > 1 ? lane / 16 * 16 : 0);
    u32 b[(EIGHTS + 1) / 2][4];
#pragma unroll
    for (int pair = 0; pair < (EIGHTS + 1) / 2; ++pair) load_transposed(b[pair], y_here + 32 * pair);
    if (FP8) {
#pragma unroll
      for (int i = 0; i < 2 * EIGHTS; ++i) {
        u32& two = b[i / 4][i % 4];
        two = widen_e4m3(scaled_squares(low_float(two), high_float(two), inverse[i / 2]));
      }
    }
#pragma unroll
    for (int sixteen = 0; sixteen < 4; ++sixteen) {  // elements of neurons 0-7, the eight next to them, both of neurons 8-15
      u32 loaded[4];
      load_transposed(loaded, here + lies_at(lane % 8 + lane / 16 * 8, 2 * sixteen + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        u32 a[4] = {loaded[0], loaded[1], loaded[2], loaded[3]};
        if (FP8) {  // columns 2 g, and 2 g + 1 in the place of those of g + 8
          const u32 low = loaded[i], high = loaded[i + 2];
          a[0] = widen_e4m3(permute_bytes<0x20>(low, 0)), a[1] = widen_e4m3(permute_bytes<0x31>(low, 0));
          a[2] = widen_e4m3(permute_bytes<0x20>(high, 0)), a[3] = widen_e4m3(permute_bytes<0x31>(high, 0));
        }
#pragma unroll
        for (int eight = 0; eight < EIGHTS; ++eight) {
          const u32 first_half = b[eight / 2][eight % 2 * 2], second_half = b[eight / 2][eight % 2 * 2 + 1];
          float(&products)[4] = d[EACH * sixteen + i][eight];
          FP8 ? mma_f16(products, a, first_half, second_half) : mma(products, a, first_half, second_half);
        }
      }
    }
    if (++stage == DOWN_STAGES) stage = 0;
  }
  copies_wait<0>();
  __syncthreads();
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int eight = 0; eight < EIGHTS; ++eight) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * eight + lane % 4 * 2 + i % 2;
        const int column = EACH * mine + 16 * tile + (FP8 ? lane / 4 * 2 + i / 2 : lane / 4 + i / 2 * 8);
        sums[(turn * PADDED + token) * SUMS + column] = d[tile][eight][i];
      }
    }
  }
  cluster_sync();
  // Of the cluster's sums a block adds up every so-many-th 16 columns.
  for (int at = threadIdx.x; at < tokens * COLUMNS; at += 32 * WARPS) {
    const int token = at / COLUMNS, of_cluster = at % COLUMNS, column = EACH * first + of_cluster;
    if (of_cluster / 16 % blocks != rank || column >= EACH * out_dim) continue;
    float sum = 0;
    for (int block = 0; block < blocks; ++block) {
#pragma unroll
      for (int from = 0; from < TURNS; ++from) {
        sum += load_remote(shared_address(sums + (from * PADDED + token) * SUMS + of_cluster), block);
      }
    }
    if (FP8) sum *= scales[token], sum *= down_scale[column];
    if (bias != nullptr) sum += to_float(bias[column]);
    out[(i64)token * EACH * out_dim + column] = (u16)pack_floats(sum, 0);
  }
  cluster_sync();  // the other blocks may still read our sums
}
