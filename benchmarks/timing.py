"""Things timed in turn on a GPU, so that what disturbs one disturbs all; ``hopper.py`` says how figures come of it."""

import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from machine import Meter
from summary import Row

Runs = dict[str, Callable[[], object]]


def in_turn(
    runs: Runs, seconds: float, rounds: int, meter: Meter | None = None, each: int = 1, turns: int = 1
) -> dict[str, Row]:
    """Each of ``runs`` in bursts of about ``seconds``: ms a call; with ``meter`` the clock, watts and joules a call.

    ``each``: the calls that one of them makes. ``turns``: bursts a round, whose median is the round's.
    """
    calls = {}
    for name, run in runs.items():
        burst(run, 3)
        calls[name] = max(3, round(seconds * 1000 / burst(run, 5)))
    names = list(runs)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    metered: dict[str, list[tuple[int | None, float | None]]] = {name: [] for name in runs}
    for number in range(rounds):
        took: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(number, number + turns):
            first, back = turn % len(names), turn // len(names) % 2  # as often first as any other
            for name in (names[first:] + names[:first])[:: -1 if back else 1]:
                burst(runs[name], calls[name] // 3)
                if meter is None:
                    took[name].append(burst(runs[name], calls[name]))
                    continue
                with meter:
                    took[name].append(burst(runs[name], calls[name]))
                metered[name].append((meter.mhz(), meter.watts()))
        for name in runs:
            samples[name].append(statistics.median(took[name]))
    return {name: row(name, "ms", [ms / each for ms in samples[name]], metered[name]) for name in runs}


def burst(run: Callable[[], object], calls: int) -> float:
    """Milliseconds a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / max(calls, 1)


def host_in_turn(runs: Runs, calls: int = 100, rounds: int = 21) -> dict[str, Row]:
    """Host time of a call, in µs: how long it takes to hand it to the GPU."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            burst(run, 10)
            start = time.perf_counter()
            for _ in range(calls):
                run()
            samples[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: row(name, "µs", samples[name]) for name in runs}


def row(what: str, unit: str, samples: list[float], metered: Sequence[tuple[int | None, float | None]] = ()) -> Row:
    found: Row = {"what": what, "unit": unit, "median": statistics.median(samples)}
    found |= {"min": min(samples), "max": max(samples), "samples": samples}
    if metered:
        joules = [watts * ms / 1000 for ms, (_, watts) in zip(samples, metered) if watts is not None]
        found |= {"mhz": [mhz for mhz, _ in metered], "watts": [watts for _, watts in metered]}
        found["joules"] = statistics.median(joules) if joules else None
    return found


def captured(run: Callable[[], object], calls: int, pool: Any = None) -> Callable[[], None]:
    """``calls`` of it as one CUDA graph. Graphs of one ``pool`` have their results at the same addresses."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for _ in range(calls):
            run()
    return graph.replay


def repeated(run: Callable[[], object], calls: int) -> tuple[Callable[[], object], bool]:
    """``calls`` of it, and whether as one CUDA graph: where it can be captured."""
    run()
    try:
        return captured(run, calls), True
    except RuntimeError as error:
        print(f"not captured: {error}")
        torch.cuda.synchronize()
        return lambda: [run() for _ in range(calls)], False


def middle(what: str, found: list[Row]) -> Row:
    """Of several that do the same, each round's median."""
    return row(what, "ms", [statistics.median(samples) for samples in zip(*(each["samples"] for each in found))])


def in_graphs(runs: Runs, ms: float) -> tuple[int, Runs]:
    """How many calls, which take ``ms`` each, are a millisecond of them; and a CUDA graph of each, of so many."""
    calls = max(1, min(10, round(1 / ms)))
    pool = torch.cuda.graph_pool_handle()  # of their own, one was 4 % slower with the same kernels
    return calls, {name: captured(run, calls, pool) for name, run in runs.items()}


def kernel_times(run: Callable[[], object], calls: int = 5) -> dict[str, float]:
    """µs a call of each kernel, by torch's profiler: of a few calls, at a clock that long bursts do not keep."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profile.key_averages():
        name = re.sub(r"^void |<.*|\(.*", "", event.key).strip()
        times[name] = times.get(name, 0.0) + event.device_time_total / calls
    return {name: round(us, 1) for name, us in sorted(times.items(), key=lambda item: -item[1]) if us >= 1}
