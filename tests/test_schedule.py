"""The work of the matmuls, shared out: every row of every column once, and nobody has much more than others.

The kernels' own ``tile_at`` is compiled for the host.
"""

import collections
import ctypes
import itertools
import subprocess

import pytest

from ao_act24.kernels import compile, schedule
from ao_act24.kernels.schedule import CLUSTER, COSTS, TILE_COLUMNS

SIZES = list(itertools.product((1, 64, 129, 300, 385, 1000, 8191, 8192, 32768), (8, 520, 2048, 4096), (1, 7, 64, 66)))
UNEVEN = [(1168, 4608), (1552, 3584), (1100, 4096), (4352, 2048), (5000, 1024), (2100, 6144), (9000, 3072)]


@pytest.fixture(scope="module")
def tile_at(tmp_path_factory):
    """The tile of a shape, position, clusters, cluster and rank: row, column, height; None beyond the last."""
    path = tmp_path_factory.mktemp("schedule")
    (path / "host.cpp").write_text(
        f"""
        #define __device__
        #define __forceinline__ inline
        #define CLUSTER {CLUSTER}
        #include "{compile.CSRC / "schedule.cuh"}"
        extern "C" bool find(const Shape& shape, int position, int clusters, int cluster, int rank, Tile& tile) {{
          return tile_at(shape, position, clusters, cluster, rank, tile);
        }}
        """
    )
    command = [
        "g++",
        "-O1",
        "-fsanitize=undefined",
        "-fno-sanitize-recover",
        "-shared",
        "-fPIC",
        "host.cpp",
        "-o",
        "host.so",
    ]
    subprocess.run(command, check=True, cwd=path)
    library = ctypes.CDLL(str(path / "host.so"))
    library.find.restype = ctypes.c_bool

    def find(shape, *where):
        tile = (ctypes.c_int * 3)()
        return tuple(tile) if library.find(ctypes.byref(shape), *where, ctypes.byref(tile)) else None

    return find


def tiles(tile_at, shape, clusters, cluster, rank=0):
    return list(itertools.takewhile(bool, (tile_at(shape, at, clusters, cluster, rank) for at in itertools.count())))


@pytest.mark.parametrize(("tokens", "columns", "most"), SIZES + [(*size, 66) for size in UNEVEN])
def test_every_tile_once(tokens, columns, most, tile_at):
    shape, clusters = schedule.share_out(tokens, columns, 12, most)
    assert 0 < clusters <= most and (shape.tokens, shape.columns, shape.stages) == (tokens, columns, 12)
    covered, work = collections.defaultdict(list), []
    for cluster in range(clusters):
        own = tiles(tile_at, shape, clusters, cluster)
        other = tiles(tile_at, shape, clusters, cluster, rank=1)
        assert own and [height for *_, height in own] == sorted((height for *_, height in own), reverse=True)
        assert [(row + 64 * height, column, height) for row, column, height in own] == other
        assert tile_at(shape, len(own) + 1, clusters, cluster, 0) is None
        work.append(sum(COSTS[height] for *_, height in own))
        for row, column, height in own:
            covered[column].append((row, row + 64 * CLUSTER * height))
    assert sorted(covered) == list(range(0, columns, TILE_COLUMNS))
    for rows in covered.values():
        ends = [end for _, end in sorted(rows)]
        assert [start for start, _ in sorted(rows)] == [0, *ends[:-1]]
        assert ends[-1] - 64 * CLUSTER < tokens <= ends[-1]
    rows = shape.whole, shape.lower, shape.lower_height
    assert max(work) == schedule._longest(rows, shape.column_tiles, clusters)
    assert max(work) - min(work) <= COSTS[3]


@pytest.mark.parametrize(
    ("size", "clusters", "rows"),
    [
        ((8192, 2048), 64, (16, 8, 2)),  # 192 + 192 + 128 rows
        ((8192, 4096), 64, (16, 8, 2)),  # twice
        ((1536, 4096), 64, (4, 0, 1)),
        ((1168, 4608), 63, (3, 1, 1)),  # 9 clusters have two tiles of 64 rows instead of one of 192
        ((1, 2048), 8, (0, 1, 1)),
    ],
)
def test_rounds_come_out_even(size, clusters, rows):
    shape, at_work = schedule.share_out(*size, 128, 66)
    assert (shape.whole, shape.lower, shape.lower_height) == rows
    assert at_work == clusters


@pytest.mark.parametrize("tokens", range(1024, 16384, 448))
@pytest.mark.parametrize("columns", [1024, 2048, 3072, 4096, 4608, 8192, 18432])
def test_little_is_lost_to_rounds(tokens, columns):
    """Against work cut into pieces of any size: of less than a round much, of several little."""
    shape, clusters = schedule.share_out(tokens, columns, 128, 66)
    ideal = tokens / 384 * shape.column_tiles / 66
    longest = schedule._longest((shape.whole, shape.lower, shape.lower_height), shape.column_tiles, clusters)
    assert longest / COSTS[3] / ideal < 1.06 + 0.55 / ideal


def test_sharing_out_takes_no_longer_for_more_tokens():
    schedule.share_out.cache_clear()
    ways = [len(list(schedule._ways(-(-tokens // 128), 3 * 17))) for tokens in (1 << 15, 1 << 17, 1 << 22)]
    assert max(ways) <= 90
