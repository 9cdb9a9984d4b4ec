// The dense form of packed and metadata, all of it or some columns: 16-bit types. Bound by memory.
#include "layout.cuh"

// Rows of whole sixteens: a thread unpacks 16 columns of a row.
extern "C" __global__ void __launch_bounds__(256)
    unpack(const u16* __restrict__ packed, const u16* __restrict__ metadata, u16* __restrict__ dense, i64 rows, i64 columns) {
  const i64 column = 16 * ((i64)blockIdx.x * 256 + threadIdx.x), padded_columns = (columns + 255) / 256 * 256;
  if (column >= columns) return;
  for (i64 row = blockIdx.y; row < rows; row += gridDim.y) {
    const uint4 four = load_streaming(packed + row * (columns / 2) + column / 2);
    const u32 twos[4] = {four.x, four.y, four.z, four.w}, codes = __ldg(metadata + metadata_half(row, padded_columns, column));
    u64 groups[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 code = codes >> (4 * i);
      groups[i] = (u64)(twos[i] & 0xFFFF) << (16 * (code & 3)) | (u64)(twos[i] >> 16) << (16 * (code >> 2 & 3));
    }
    u16* to = dense + row * columns + column;
    store_four(to, make_uint4((u32)groups[0], (u32)(groups[0] >> 32), (u32)groups[1], (u32)(groups[1] >> 32)));
    store_four(to + 8, make_uint4((u32)groups[2], (u32)(groups[2] >> 32), (u32)groups[3], (u32)(groups[3] >> 32)));
  }
}

// Some columns: a thread finds the entries of one in a block of 16 rows, which share their lines of metadata.
extern "C" __global__ void __launch_bounds__(256)
    columns(const u16* __restrict__ packed, const u32* __restrict__ metadata, const i64* __restrict__ index,
            u16* __restrict__ dense, i64 rows, i64 columns, i64 chosen) {
  const i64 place = (i64)blockIdx.x * 256 + threadIdx.x, padded_columns = (columns + 255) / 256 * 256;
  if (place >= chosen) return;
  const i64 column = index[place];
  if ((u64)column >= (u64)columns) __trap();
  const u32 at = column % 4;
  for (i64 block = blockIdx.y; block < (rows + 15) / 16; block += gridDim.y) {
    u32 twos[16], codes[8];
#pragma unroll
    for (int row = 0; row < 16; ++row) {
      const i64 line = block * 16 + row;
      twos[row] = line < rows ? __ldg((const u32*)(packed + line * (columns / 2) + column / 4 * 2)) : 0;
      if (row < 8) codes[row] = __ldg(metadata + metadata_word(block, padded_columns, row, column)) >> (column / 4 % 4 * 4);
    }
#pragma unroll
    for (int row = 0; row < 16; ++row) {
      const u32 code = codes[row % 8] >> (row / 8 * 16);
      const u16 entry = at == (code & 3) ? (u16)twos[row] : at == (code >> 2 & 3) ? (u16)(twos[row] >> 16) : 0;
      if (block * 16 + row < rows) dense[(block * 16 + row) * chosen + place] = entry;
    }
  }
}
