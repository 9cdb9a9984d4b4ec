"""How the tiles of a matmul (``tiles.cuh``) are shared out among the blocks of a launch. Needs no GPU.

Whole tiles come first, in rounds in which all clusters walk along K together; then lower ones, of fewer rows. Tiles are
not cut along K: sums in parts cost more than clusters that end early (``docs/kernels.md``). So the rows are made of
heights with which all clusters end at about the same time.
"""

import ctypes
import functools
from collections.abc import Iterator

TILE_ROWS, TILE_COLUMNS = 192, 256
CLUSTER = 2  # blocks that share the columns of a tile
COSTS = {1: 15, 2: 23, 3: 32}  # work of a tile by 64 rows of a block: its columns are brought in and read in any case
BANDS = (8, 11)  # clusters' row tiles that are walked column by column: 4 to 22 are within 3 % (H200)

Rows = tuple[int, int, int]  # whole row tiles and lower ones, by the cluster, and how many times 64 rows these have


class Shape(ctypes.Structure):
    """``Shape`` in ``schedule.cuh``."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            *("tokens", "columns", "stages", "whole", "lower", "lower_height", "column_tiles", "band"),
            *("rounds", "late", "early", "stride"),
        )
    ]


@functools.lru_cache(maxsize=1024)
def share_out(tokens: int, columns: int, stages: int, clusters: int, stride: int = 0) -> tuple[Shape, int]:
    """``[tokens, K] @ [columns, K].T``, K in so many stages, for up to ``clusters`` clusters; and for how many.

    These are as few as take no longer: power is short, and 64 in step are no slower than 66.
    """
    column_tiles, ways, least = _choices(tokens, columns, clusters)
    best = [(_fewest(rows, column_tiles, clusters, least), rows) for rows in ways]
    clusters, (whole, lower, height) = min(best, key=lambda way: (way[0], -way[1][0]))
    band = min(BANDS, key=lambda band: -clusters % band)
    rounds, late = divmod(whole * column_tiles, clusters)
    last = band, rounds, late, _early(height, late), stride
    return Shape(tokens, columns, stages, whole, lower, height, column_tiles, *last), clusters


def waste(tokens: int, columns: int, clusters: int) -> float:
    """The work of the cluster that has the most, over what each had if all worked alike, in whole tiles only."""
    whole_tiles = tokens / (TILE_ROWS * CLUSTER) * columns / TILE_COLUMNS
    return _choices(tokens, columns, clusters)[2] * clusters / (COSTS[3] * whole_tiles)


def _choices(tokens: int, columns: int, clusters: int) -> tuple[int, list[Rows], int]:
    """Column tiles, the best ways to make the rows, and the longest work in them."""
    column_tiles = -(-columns // TILE_COLUMNS)
    ways = _ways(-(-tokens // (64 * CLUSTER)), 3 * -(-clusters // column_tiles))
    works = {rows: _longest(rows, column_tiles, clusters) for rows in ways}
    least = min(works.values())
    return column_tiles, [rows for rows, work in works.items() if work == least], least


def _fewest(rows: Rows, column_tiles: int, clusters: int, most: int) -> int:
    """With how many clusters at least none has more work than ``most``; with all of them it is so."""
    whole, lower, height = rows
    alike = -(-column_tiles * (whole * COSTS[3] + lower * COSTS[height]) // most)
    return next(fewer for fewer in range(max(alike, 1), clusters + 1) if _longest(rows, column_tiles, fewer) <= most)


def _ways(units: int, most: int) -> Iterator[Rows]:
    """Ways to make ``units`` times 64 rows of a block, with up to about ``most`` lower row tiles."""
    for height in (1, 2):
        for whole in range(max(0, units - most * height) // 3, units // 3 + 1):
            lower, more = divmod(units - 3 * whole, height)
            if not more:
                yield whole, lower, height


def _early(height: int, late: int) -> int:
    """Lower tiles that take no longer than a whole one, if some clusters have one whole tile more than the others."""
    return COSTS[3] // COSTS[height] if late else 0


def _longest(rows: Rows, column_tiles: int, clusters: int) -> int:
    """The work of the cluster that has the most."""
    whole, lower, height = rows
    rounds, late = divmod(whole * column_tiles, clusters)
    early = _early(height, late)
    left = max(0, lower * column_tiles - early * (clusters - late))
    of_late = COSTS[3] * (rounds + 1) + COSTS[height] * -(-left // clusters) if late else 0
    meanwhile = min(early, -(-lower * column_tiles // (clusters - late)))
    of_others = COSTS[3] * rounds + COSTS[height] * (meanwhile - (-max(0, left - late) // clusters))
    return max(of_late, of_others)
