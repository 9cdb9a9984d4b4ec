"""How the tiles of a matmul (``tiles.cuh``) are shared out among the blocks of a launch. Needs no GPU.

Tiles come in the order of their rows; all clusters take one each, in rounds, and walk along K together. Tiles are not
cut along K: sums in parts cost more than clusters that end early (``docs/kernels.md``). So the rows are made of heights
whose rounds come out even.
"""

import ctypes
from collections.abc import Iterator

TILE_ROWS, TILE_COLUMNS = 192, 256
CLUSTER = 2  # blocks that share the columns of a tile
COSTS = {1: 15, 2: 23, 3: 32}  # work of a tile by 64 rows of a block: its columns are brought in and read in any case
BANDS = (8, 11)  # row clusters that are walked column by column: of 4 to 22 the best, by 3 % (H200)


class Shape(ctypes.Structure):
    """``Shape`` in ``tiles.cuh``."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "tokens",
            "columns",
            "groups",
            "row_clusters",
            "lower_clusters",
            "lower_height",
            "column_tiles",
            "band",
        )
    ]


def share_out(tokens: int, columns: int, depth: int, clusters: int) -> tuple[Shape, int]:
    """``[tokens, depth] @ [columns, depth].T`` for up to ``clusters`` clusters; and for how many.

    These are as few as take no longer: power is short, and 64 in step are no slower than 66.
    """
    column_tiles = -(-columns // TILE_COLUMNS)

    def cost(whole: int, lower: int, height: int, clusters: int) -> int:
        """Of the first cluster, which has the most: a tile in each round, whole ones first."""
        rounds, first = (-(-tiles * column_tiles // clusters) for tiles in (whole + lower, whole))
        return COSTS[3] * first + COSTS[height] * (rounds - first)

    ways = [(*rows, some) for rows in _heights(-(-tokens // (64 * CLUSTER))) for some in range(1, clusters + 1)]
    *rows, clusters = min(ways, key=lambda way: (cost(*way), way[-1], -way[0]))
    band = min(BANDS, key=lambda band: -clusters % band)
    return Shape(tokens, columns, -(-depth // 256), *rows, column_tiles, band), clusters


def _heights(units: int) -> Iterator[tuple[int, int, int]]:
    """Ways to make that many times 64 rows of a block: clusters of three, of fewer, and of how many."""
    for whole in range(units // 3 + 1):
        for height in (1, 2):
            lower, more = divmod(units - 3 * whole, height)
            if not more:
                yield whole, lower, height
