// out[T, D'] = relu(x[T, D] @ up[H, D]^T + up_bias[H])^2 @ down[H, D'] + down_bias[D'] for few tokens, exactly: bound by reading weights,
// of which a row of `down` is read only where its neuron fires for one token at least.
//
// Two kernels. The first reads all of `up`, and leaves y and a bit for each neuron. Of the second each block counts the bits before
// it, so that the neurons that fire are numbered in their order, and takes those of its number: a sum's parts do not depend on the
// neurons that do not fire, nor on when a block runs. Blocks of a cluster take an eighth of them each, and add up what they have.
//
// Compile-time: ELEMENT ("bf16" or "f16"), EIGHTS of tokens: 1, 2 or 4.
//
// mma's operands are loaded as they lie in memory, 16 bytes a thread, and its indices taken in another order, the same in both.

#include "ptx.cuh"

constexpr int WARPS = 8, TILES = (EIGHTS + 1) / 2, PADDED = 16 * TILES;  // sixteens of tokens; tokens
// Of a block of the first kernel, sixteens of neurons: a warp reads x once for all of them, which with many tokens is as much as
// their weights. RESIDENT: blocks on a multiprocessor, at least.
constexpr int SIXTEENS = EIGHTS, RESIDENT = EIGHTS == 4 ? 1 : 2;

// d (16 x 8) += a (16 x 16) * b (16 x 8).
__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT "." ELEMENT ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

struct Words {
  u32 words[8];  // eight neighbours, and the eight that lie 32 further on: four threads load whole sectors at a time
};

__device__ __forceinline__ Words load_weights(const u16* from, bool there) {
  uint4 left = {}, right = {};
  if (there) left = load_past_l1(from), right = load_past_l1(from + 32);  // that x may stay there
  return {left.x, left.y, left.z, left.w, right.x, right.y, right.z, right.w};
}

__device__ __forceinline__ Words load_x(const u16* from, bool there) {
  uint4 left = {}, right = {};
  if (there) left = __ldg((const uint4*)from), right = __ldg((const uint4*)(from + 32));
  return {left.x, left.y, left.z, left.w, right.x, right.y, right.z, right.w};
}

// y [H, PADDED], zeros beyond the last token; bit n of active[i]: does neuron 16 i + n fire? A block's warps take a part of the columns
// each: 64 of them at a time, of which thread q of a quad has 16.
extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT)
    active_relu2(const u16* __restrict__ x, const u16* __restrict__ up, const u16* __restrict__ bias, u16* __restrict__ y,
                 u16* __restrict__ active, i64 tokens, i64 model_dim) {
  constexpr int AHEAD = 4 / SIXTEENS;
  __shared__ float parts[WARPS][16][PADDED + 1];
  __shared__ u32 fires;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const i64 first_neuron = (i64)blockIdx.x * 16 * SIXTEENS, chunks = model_dim / 64;
  const u16* mine = up + (first_neuron + g) * model_dim + 8 * q;
  float d[SIXTEENS][EIGHTS][4] = {};
  for (i64 first = warp; first < chunks; first += AHEAD * WARPS) {
    Words upper[AHEAD][SIXTEENS], lower[AHEAD][SIXTEENS];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const i64 chunk = first + i * WARPS;
#pragma unroll
      for (int m = 0; m < SIXTEENS; ++m) {
        const u16* from = mine + 16 * m * model_dim + 64 * chunk;
        upper[i][m] = load_weights(from, chunk < chunks);
        lower[i][m] = load_weights(from + 8 * model_dim, chunk < chunks);
      }
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const i64 chunk = first + i * WARPS;
#pragma unroll
      for (int eight = 0; eight < EIGHTS; ++eight) {
        const i64 token = 8 * eight + g;
        const Words of_x = load_x(x + token * model_dim + 64 * chunk + 8 * q, chunk < chunks && token < tokens);
        const u32(&v)[8] = of_x.words;
#pragma unroll
        for (int m = 0; m < SIXTEENS; ++m) {
          const u32(&u)[8] = upper[i][m].words, (&l)[8] = lower[i][m].words;
#pragma unroll
          for (int step = 0; step < 8; step += 2) {
            mma(d[m][eight], u[step], l[step], u[step + 1], l[step + 1], v[step], v[step + 1]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < SIXTEENS; ++m) {
    const i64 neuron = first_neuron + 16 * m;
    if (threadIdx.x == 0) fires = 0;
#pragma unroll
    for (int eight = 0; eight < EIGHTS; ++eight) {
#pragma unroll
      for (int i = 0; i < 4; ++i) parts[warp][g + 8 * (i / 2)][8 * eight + 2 * q + i % 2] = d[m][eight][i];
    }
    __syncthreads();
    u32 seen = 0;
    for (int at = threadIdx.x; at < 16 * PADDED; at += 32 * WARPS) {
      const int of_neuron = at / PADDED, token = at % PADDED;
      u32 value = 0;
      if (token < tokens) {
        float sum = bias == nullptr ? 0 : to_float(bias[neuron + of_neuron]);
#pragma unroll
        for (int from = 0; from < WARPS; ++from) sum += parts[from][of_neuron][token];
        value = square(relu(pack_floats(sum, 0))) & 0xFFFF;
      }
      y[neuron * PADDED + at] = (u16)value;
      if (value != 0) seen |= 1u << of_neuron;
    }
    seen = __reduce_or_sync(~0u, seen);
    if (threadIdx.x % 32 == 0) atomicOr(&fires, seen);
    __syncthreads();
    if (threadIdx.x == 0) active[blockIdx.x * SIXTEENS + m] = (u16)fires;
  }
}

// Of a block of the second kernel: columns, and neurons at a time. PITCH: of sums, in which column 64 w + 8 n + i lies at
// 64 w + 8 i + n, so that a warp's stores meet all banks.
constexpr int CLUSTER = 8, COLUMNS = 256, ROWS = 256, PITCH = COLUMNS + 8;

// A block has COLUMNS columns, a warp 64 of them and every other 16 neurons, of which thread q of a quad has 4; g: 8 columns.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(32 * WARPS, RESIDENT)
    active_mm(const u16* __restrict__ y, const u32* __restrict__ active, const u16* __restrict__ down,
              const u16* __restrict__ bias, u16* __restrict__ out, i64 tokens, i64 hidden_dim, i64 out_dim) {
  constexpr int AHEAD = TILES == 1 ? 4 : 2;
  extern __shared__ __align__(16) u8 shared[];
  u16* y_here = (u16*)shared;                             // [ROWS][PADDED]
  float* sums = (float*)(shared + ROWS * PADDED * 2);     // [PADDED][PITCH]
  int* list = (int*)(shared + ROWS * PADDED * 2 + PADDED * PITCH * 4);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int words = (int)(hidden_dim / 32), each = (words + blockDim.x - 1) / blockDim.x;
  const int begin = min((int)threadIdx.x * each, words), end = min(begin + each, words);
  int total = 0;
  for (int i = begin; i < end; ++i) total += __popc(active[i]);
  int number = block_before(total);  // of this thread's first one that fires
  const int part = (total + CLUSTER * 16 - 1) / (CLUSTER * 16) * 16, rank = cluster_rank();
  const int low = min(rank * part, total), count = min(part, total - low);
  for (int i = begin; i < end; ++i) {
    for (u32 bits = active[i]; bits != 0; bits &= bits - 1, ++number) {
      if (number >= low && number < low + count) list[number - low] = 32 * i + __ffs(bits) - 1;
    }
  }
  __syncthreads();

  const int columns = warp / 2 * 64 + 8 * g, turn = warp % 2;
  const i64 first_column = (i64)(blockIdx.x / CLUSTER) * COLUMNS;
  const bool there = first_column + columns < out_dim;
  float d[TILES][8][4] = {};
  for (int start = 0; start < count; start += ROWS) {
    const int rows = min(ROWS, count - start), padded = (rows + 15) / 16 * 16;
    for (int at = threadIdx.x; at < padded * (PADDED / 8); at += blockDim.x) {
      const int row = at / (PADDED / 8), eight = at % (PADDED / 8);
      uint4 value = {};
      if (row < rows) value = __ldg((const uint4*)(y + (i64)list[start + row] * PADDED) + eight);
      ((uint4*)y_here)[at] = value;
    }
    __syncthreads();
    for (int step = turn; 16 * step < rows; step += 2 * AHEAD) {
      uint4 loaded[AHEAD][4];
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int row = 16 * (step + 2 * i) + 2 * q + k % 2 + k / 2 * 8;
          loaded[i][k] = {};
          if (row < rows && there) {
            loaded[i][k] = load_streaming(down + (i64)list[start + row] * out_dim + first_column + columns);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        if (16 * (step + 2 * i) >= rows) break;
        u32 a[TILES][4];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          // Of four matrices lane 8 m + r points to row r: neurons 8 (m / 2) + r, tokens from 8 (m % 2) on.
          const int row = 16 * (step + 2 * i) + lane / 16 * 8 + lane % 8, token = 16 * tile + lane / 8 % 2 * 8;
          load_transposed(a[tile], shared_address(y_here + row * PADDED + token));
        }
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {  // of columns
          u32 of_row[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const uint4& v = loaded[i][k];
            of_row[k] = pair == 0 ? v.x : pair == 1 ? v.y : pair == 2 ? v.z : v.w;
          }
          const u32 even[2] = {permute_bytes<0x5410>(of_row[0], of_row[1]), permute_bytes<0x5410>(of_row[2], of_row[3])};
          const u32 odd[2] = {permute_bytes<0x7632>(of_row[0], of_row[1]), permute_bytes<0x7632>(of_row[2], of_row[3])};
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile) {
            const u32(&t)[4] = a[tile];
            mma(d[tile][2 * pair], t[0], t[1], t[2], t[3], even[0], even[1]);
            mma(d[tile][2 * pair + 1], t[0], t[1], t[2], t[3], odd[0], odd[1]);
          }
        }
      }
    }
    __syncthreads();
  }

  // Result i of a thread's quarter q is column 8 n + i, n = 2 q and 2 q + 1 of the warp's eights.
  for (int of_turn = 0; of_turn < 2; ++of_turn) {
    if (turn == of_turn) {
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int token = 16 * tile + g + 8 * half;
            if (token >= tokens) continue;
            float2& two = *(float2*)(sums + token * PITCH + warp / 2 * 64 + 8 * i + 2 * q);
            float2 sum = make_float2(d[tile][i][2 * half], d[tile][i][2 * half + 1]);
            if (of_turn == 1) sum.x += two.x, sum.y += two.y;
            two = sum;
          }
        }
      }
    }
    __syncthreads();
  }
  cluster_sync();
  const int column = rank * (COLUMNS / CLUSTER) + lane, lies_at = column / 64 * 64 + column % 8 * 8 + column / 8 % 8;
  for (int token = warp; token < tokens; token += WARPS) {
    float sum = 0;
#pragma unroll
    for (int from = 0; from < CLUSTER; ++from) sum += load_remote(shared_address(sums + token * PITCH + lies_at), from);
    const i64 at = first_column + column;
    if (at >= out_dim) continue;
    if (bias != nullptr) sum += to_float(bias[at]);
    out[token * out_dim + at] = (u16)pack_floats(sum, 0);
  }
  cluster_sync();  // the other blocks may still read our sums
}
