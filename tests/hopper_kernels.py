"""What the tests of the kernels on a Hopper GPU share."""

import threading

import pytest
import torch

from ao_act24.kernels import cuda, plans, schedule

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
DTYPES = list(plans.ELEMENTS)


def in_threads(run, every, times):
    """``run(*each)`` so many times, each of ``every`` in a thread and on a stream of its own; the results of each."""
    torch.cuda.synchronize()
    got = [[] for _ in every]

    def on_a_stream(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            got[number] += [run(*every[number]) for _ in range(times)]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=on_a_stream, args=(number,)) for number in range(len(every))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(results) == times for results in got)
    return got


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda").to(dtype)


def poison(monkeypatch):
    """From now on outputs come poisoned, with a guard behind each; returns the guards, which grow in number."""
    guards = []

    def poisoned(shape, strides, dtype):
        count = torch.Size(shape).numel()
        value = float("nan") if dtype.is_floating_point else 0x5A
        buffer = torch.full((count + 64,), value, dtype=dtype, device="cuda")
        guards.append(buffer[count:])
        return buffer[:count].view(shape)

    monkeypatch.setattr(cuda, "_empty", poisoned)
    return guards


def untouched(guards):
    return all(bool((g.isnan() if g.is_floating_point() else g == 0x5A).all()) for g in guards)


ROWS = [(0, 1, 1), (0, 2, 2), (1, 0, 1), (1, 1, 1), (1, 2, 2), (3, 1, 2), (2, 3, 1)]  # whole, lower ones, their height


def made_of(rows, monkeypatch, clusters=66):
    """Tokens for which the tiles are of these rows, done by so many clusters at most."""
    whole, lower, height = rows
    share_out = schedule.share_out
    monkeypatch.setattr(schedule, "_ways", lambda units, most: [rows])

    def fewer(rows, columns, stages, most, *stride):
        return share_out.__wrapped__(rows, columns, stages, min(clusters, most), *stride)

    monkeypatch.setattr(schedule, "share_out", fewer)
    monkeypatch.setattr(cuda, "PLANS", plans.Plans())
    return (3 * whole + height * lower) * 64 * schedule.CLUSTER - 5
