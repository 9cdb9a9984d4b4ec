"""How the tiles of a matmul (``tiles.cuh``) are shared out among the blocks of a launch. Needs no GPU.

Tiles come in the order of their rows; all clusters take one each, in rounds, and walk along K together. What is left
after whole rounds, and the tiles of fewer rows at the end, are a stream that is cut into pieces of equal work.
"""

import bisect
import ctypes
import itertools

TILE_ROWS, TILE_COLUMNS = 192, 256
CLUSTER = 2  # blocks that share the columns of a tile
MAX_CLUSTERS = 132
BAND = 11  # row clusters that are walked column by column: of 4 to 22 the best, by 3 % (H200)
COSTS = {1: 15, 2: 23, 3: 32}  # work of a stage by 64 rows of a tile: its columns are brought in and read in any case
MAX_PIECES = 8  # that a tile is cut into, or few more: each costs a pass through memory


class Shape(ctypes.Structure):
    """``Shape`` in ``tiles.cuh``."""

    _fields_ = [
        *((name, ctypes.c_int) for name in (
            "tokens", "columns", "groups", "row_clusters", "last_height", "column_tiles", "band", "rounds",
        )),
        ("cuts", ctypes.c_int * 2 * (MAX_CLUSTERS + 1)),
    ]  # fmt: skip


def share_out(tokens: int, columns: int, depth: int, clusters: int) -> tuple[Shape, int]:
    """``[tokens, depth] @ [columns, depth].T`` for up to ``clusters`` clusters; and how many of them have any work."""
    row_clusters, rows_left = divmod(tokens, TILE_ROWS * CLUSTER)
    last_height = -(-rows_left // (64 * CLUSTER))
    if last_height == 3:
        row_clusters, last_height = row_clusters + 1, 0
    column_tiles, groups = -(-columns // TILE_COLUMNS), -(-depth // 256)
    rounds, streamed = divmod(row_clusters * column_tiles, clusters)
    costs = [COSTS[3]] * streamed + [COSTS[last_height]] * column_tiles if last_height else [COSTS[3]] * streamed
    pieces = max(1, min(clusters, MAX_PIECES * len(costs), groups * len(costs)))
    starts = [0, *itertools.accumulate(cost * groups for cost in costs)]  # of each tile of the stream, in work
    shape = Shape(tokens, columns, groups, row_clusters, last_height, column_tiles, BAND, rounds)
    for piece in range(clusters + 1):
        at = starts[-1] * min(piece, pieces) // pieces
        tile = bisect.bisect_right(starts, at) - 1
        group = (at - starts[tile]) // costs[tile] if tile < len(costs) else 0
        shape.cuts[piece][:] = rounds * clusters + tile, group
    return shape, clusters if rounds else pieces


def is_cut(shape: Shape) -> bool:
    """Whether a tile is summed in parts."""
    return any(group for _, group in shape.cuts)
