// Where metadata keeps codes. See layout.py.
#pragma once

#include "ptx.cuh"

// The 32-bit word that has the codes of 16 columns of rows g (low half) and g + 8 (high half) of a block of 16 rows.
__device__ __forceinline__ i64 metadata_word(i64 block, i64 padded_columns, int g, i64 column) {
  const int q = column / 16 % 4, word = column / 64 % 4;
  return (block * (padded_columns / 256) + column / 256) * 128 + (g * 4 + q) * 4 + word;
}

// The 16-bit half of it that has the codes of 16 columns of one row.
__device__ __forceinline__ i64 metadata_half(i64 row, i64 padded_columns, i64 column) {
  return 2 * metadata_word(row / 16, padded_columns, row % 8, column) + row % 16 / 8;
}
