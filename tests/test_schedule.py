"""The work of the matmuls, shared out: every row of every column once, and nobody has much more than others."""

import collections
import itertools

import pytest

from ao_act24.kernels import schedule
from ao_act24.kernels.schedule import CLUSTER, COSTS, TILE_COLUMNS, TILE_ROWS

SIZES = list(itertools.product((1, 64, 129, 300, 385, 1000, 8191, 8192, 32768), (8, 520, 2048, 4096), (1, 7, 64, 66)))


def tile_at(shape, index):
    """As in the kernel, of a block of rank 0: row, column, height; None beyond the last."""
    whole = shape.row_clusters * shape.column_tiles
    lower = index >= whole
    inside, clusters = (index - whole, shape.lower_clusters) if lower else (index, shape.row_clusters)
    if inside >= clusters * shape.column_tiles:
        return None
    band, at = divmod(inside, shape.band * shape.column_tiles)
    walked = min(shape.band, clusters - band * shape.band)
    height = shape.lower_height if lower else 3
    row = lower * shape.row_clusters * CLUSTER * TILE_ROWS + (band * shape.band + at % walked) * CLUSTER * 64 * height
    return row, at // walked * TILE_COLUMNS, height


@pytest.mark.parametrize(("tokens", "columns", "most"), SIZES)
def test_every_tile_once(tokens, columns, most):
    shape, clusters = schedule.share_out(tokens, columns, 704, most)
    assert 0 < clusters <= most and (shape.tokens, shape.columns, shape.groups) == (tokens, columns, 3)
    covered, work = collections.defaultdict(list), []
    for cluster in range(clusters):
        own = list(itertools.takewhile(bool, (tile_at(shape, index) for index in itertools.count(cluster, clusters))))
        assert own and [height for *_, height in own] == sorted((height for *_, height in own), reverse=True)
        work.append(sum(COSTS[height] for *_, height in own))
        for row, column, height in own:
            covered[column].append((row, row + 64 * CLUSTER * height))
    assert sorted(covered) == list(range(0, columns, TILE_COLUMNS))
    for rows in covered.values():
        ends = [end for _, end in sorted(rows)]
        assert [start for start, _ in sorted(rows)] == [0, *ends[:-1]]
        assert ends[-1] - 64 * CLUSTER < tokens <= ends[-1]
    assert max(work) == work[0]
    assert max(work) - min(work) <= COSTS[3]


@pytest.mark.parametrize(
    ("size", "clusters", "rows"),
    [
        ((8192, 2048), 64, (16, 8, 2)),  # 192 + 192 + 128 rows
        ((8192, 4096), 64, (16, 8, 2)),  # twice
        ((32768, 4096), 66, (85, 1, 1)),
        ((1536, 4096), 64, (4, 0, 1)),
        ((1, 2048), 8, (0, 1, 1)),
    ],
)
def test_rounds_come_out_even(size, clusters, rows):
    shape, at_work = schedule.share_out(*size, 8192, 66)
    assert (shape.row_clusters, shape.lower_clusters, shape.lower_height) == rows
    assert at_work == clusters and clusters % shape.band == 0


@pytest.mark.parametrize("tokens", range(1024, 16384, 448))
@pytest.mark.parametrize("columns", [1024, 2048, 4096, 8192])
def test_little_is_lost_to_rounds(tokens, columns):
    """Against work cut into pieces of any size."""
    shape, clusters = schedule.share_out(tokens, columns, 8192, 66)
    first = [tile_at(shape, index) for index in range(0, 10000, clusters)]
    cost = sum(COSTS[tile[2]] for tile in first if tile)
    ideal = tokens / 384 * COSTS[3] * shape.column_tiles / 66
    units = -(-tokens // 128) * shape.column_tiles / 66
    assert cost / ideal < 1.1 + 1.7 / units
