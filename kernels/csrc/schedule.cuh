// Which tile a cluster of blocks computes next: plain arithmetic, which tests compile for the host. schedule.py fills in Shape.
#pragma once

constexpr int WARPGROUPS = 3;
constexpr int TILE_M = 64 * WARPGROUPS, TILE_N = 256;

struct Shape {
  int tokens, columns;  // of the result
  int stages;           // of 64 columns of K that a tile takes (zeros beyond its end)
  int whole;            // row tiles of TILE_M rows, counted by the cluster
  int lower, lower_height;  // below them, row tiles of 64 times so many rows
  int column_tiles;
  int band;    // row tiles, by the cluster, that are walked column by column: what is read again is still in L2
  int rounds;  // whole tiles of each cluster; the first `late` of them have one more
  int late;
  int early;  // lower tiles that each of the others takes meanwhile
  int stride;  // where GROUP is 4, rows of K that are brought in together are so far apart, but for the last ones: see tiles.cuh
};

struct Tile {
  int row, column, height;
};

// The tile at `position` among those of `cluster`; false beyond the last.
__device__ __forceinline__ bool tile_at(const Shape& shape, int position, int clusters, int cluster, int rank, Tile& tile) {
  const bool is_late = cluster < shape.late;
  const int left = position - shape.rounds - is_late, meanwhile = shape.early * (clusters - shape.late);
  const bool lower = left >= 0;
  int index = position * clusters + cluster;
  if (lower) {
    if (is_late) index = meanwhile + left * clusters + cluster;
    else if (left < shape.early) index = left * (clusters - shape.late) + cluster - shape.late;
    else index = meanwhile + (left - shape.early) * clusters + cluster;
  }
  const int row_tiles = lower ? shape.lower : shape.whole;
  if (index >= row_tiles * shape.column_tiles) return false;
  const int band = index / (shape.band * shape.column_tiles), inside = index - band * shape.band * shape.column_tiles;
  const int walked = row_tiles - band * shape.band < shape.band ? row_tiles - band * shape.band : shape.band;
  const int row_tile = (band * shape.band + inside % walked) * CLUSTER + rank;
  tile.height = lower ? shape.lower_height : WARPGROUPS;
  tile.row = (lower ? shape.whole * CLUSTER * TILE_M : 0) + row_tile * 64 * tile.height;
  tile.column = inside / walked * TILE_N;
  return true;
}
