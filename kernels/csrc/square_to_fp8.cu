// packed, scale = kept^2, by rows scaled to e4m3: what linear_relu2_sparsify_fp8 kept of relu(h), once the largest of a whole row is
// known. Bound by memory: 2 bytes read and 1 written an element.

#include "fp8.cuh"

// A block for each row of `width` elements, a multiple of 16. `parts`: the largest of each of `tiles` parts of a row.
extern "C" __global__ void __launch_bounds__(512)
    square_to_fp8(const u16* __restrict__ kept, const u16* __restrict__ parts, u8* __restrict__ packed, float* __restrict__ scale,
                  i64 width, i64 tiles) {
  const i64 row = blockIdx.x;
  kept += row * width, parts += row * tiles, packed += row * width;
  i64 column = 16 * (i64)threadIdx.x;
  uint4 left = {}, right = {};
  if (column < width) left = load_streaming(kept + column), right = load_streaming(kept + column + 8);
  u32 largest = 0;
  for (i64 tile = threadIdx.x; tile < tiles; tile += blockDim.x) largest = max(largest, (u32)parts[tile]);
  const float scale_here = scale_of(block_max2(largest)), inverse = 1 / scale_here;
  if (threadIdx.x == 0) scale[row] = scale_here;
  while (column < width) {
    const u32 words[8] = {left.x, left.y, left.z, left.w, right.x, right.y, right.z, right.w};
    u32 squares[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 low = scaled_squares(low_float(words[2 * i]), high_float(words[2 * i]), inverse);
      const u32 high = scaled_squares(low_float(words[2 * i + 1]), high_float(words[2 * i + 1]), inverse);
      squares[i] = low | high << 16;
    }
    store_four(packed + column, make_uint4(squares[0], squares[1], squares[2], squares[3]));
    column += 16 * (i64)blockDim.x;
    if (column < width) left = load_streaming(kept + column), right = load_streaming(kept + column + 8);
  }
}
