"""The work of ``sparse_mm``, shared out: every group of every tile once, in equal pieces; nobody waits in a circle."""

import collections

import pytest

from ao_act24.kernels import schedule
from ao_act24.kernels.schedule import CLUSTER, COSTS, TILE_COLUMNS, TILE_ROWS

SIZES = [
    (tokens, model_dim, hidden_dim, clusters)
    for tokens in (1, 64, 129, 300, 385, 1000, 8191, 8192, 32768)
    for model_dim, hidden_dim in ((8, 64), (520, 1088), (2048, 8192), (4096, 16384))
    for clusters in (1, 7, 66, 132)
]


def segments(shape, cluster, clusters):
    """As ``segment_at`` in the kernel: tile, first group, last group."""
    for position in range(shape.rounds):
        yield position * clusters + cluster, 0, shape.groups
    begin, end = shape.cuts[cluster], shape.cuts[cluster + 1]
    for tile in range(end[0] - (end[1] == 0), begin[0] - 1, -1):
        first, last = begin[1] if tile == begin[0] else 0, end[1] if tile == end[0] else shape.groups
        if first < last:
            yield tile, first, last


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_group_of_every_tile_once(sizes):
    tokens, *_, clusters = sizes
    shape, at_work = schedule.share_out(*sizes)
    rows = shape.row_clusters * CLUSTER * TILE_ROWS
    assert rows + shape.last_height * CLUSTER * 64 >= tokens and shape.last_height < 3
    assert tokens > rows - CLUSTER * TILE_ROWS and (not shape.last_height or tokens > rows)
    parts, work = collections.defaultdict(list), []
    for cluster in range(clusters):
        own = list(segments(shape, cluster, clusters))
        assert bool(own) <= (cluster < at_work)
        whole = shape.row_clusters * shape.column_tiles
        work.append(sum((last - first) * COSTS[3 if tile < whole else shape.last_height] for tile, first, last in own))
        for number, (tile, first, last) in enumerate(own):
            parts[tile].append((first, last))
            # what others wait for comes before what waits for others, and there is one of each, and one place for it
            assert last == shape.groups or number == shape.rounds
            assert first == 0 or number == len(own) - 1
    assert len(parts) == (shape.row_clusters + (shape.last_height > 0)) * shape.column_tiles
    for pieces in parts.values():  # in the order of clusters: each goes on where the one before stopped
        assert [0, *(last for _, last in pieces)] == [*(first for first, _ in pieces), shape.groups]
    if at_work == clusters:
        assert max(work) - min(work) <= 2 * COSTS[3]
    assert schedule.is_cut(shape) == any(len(pieces) > 1 for pieces in parts.values())


def test_rows_that_are_left_over_cost_no_whole_tile():
    shape, _ = schedule.share_out(8192, 4096, 16384, 66)
    assert (shape.row_clusters, shape.last_height) == (21, 1)
    assert shape.column_tiles * TILE_COLUMNS == 4096
