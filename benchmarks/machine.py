"""What a result was measured on and by what, how much power the GPU drew meanwhile, and how a result is written."""

import ctypes
import itertools
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

import ao_act24
from ao_act24.fingerprint import source_digest

ROOT = Path(ao_act24.__file__).resolve().parents[1]
Sample = tuple[float, float, int]  # seconds, joules, MHz


def record(command: str) -> dict[str, object]:
    """Machine, versions, commit and sources. ``sources`` tells what ran also where there is no git."""
    import torchao
    import triton

    fields = "driver_version,power.limit,clocks.max.sm"
    found = output("nvidia-smi", "-i", _uuid(), f"--query-gpu={fields}", "--format=csv,noheader")
    return {
        "command": command,
        "gpu": torch.cuda.get_device_name(0),
        **dict(zip(("driver", "power limit", "highest clock"), found.split(", "))),
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "torchao": torchao.__version__,
        "cusparselt": torch.backends.cusparselt.version(),
        "commit": commit(ROOT),
        "sources": source_digest(),
    }


def commit(root: Path) -> str:
    """Of the checkout at ``root``, with "-changed" where its code differs; "unknown" if ``root`` is no checkout.

    A directory inside another repository is none: that one's commit says nothing about it.
    """
    top = output("git", "-C", str(root), "rev-parse", "--show-toplevel")
    if not top or not Path(top).samefile(root):
        return "unknown"
    code = ("ao_act24", "passes", "kernels", "benchmarks/*.py")
    changed = output("git", "-C", str(root), "status", "--porcelain", "--", *code)
    return output("git", "-C", str(root), "rev-parse", "HEAD") + ("-changed" if changed else "")


def output(*command: str) -> str:
    """What ``command`` prints; nothing where it fails or is missing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


class Meter:
    """Clock and power of the GPU while a ``with`` block runs, sampled by a thread."""

    def __init__(self) -> None:
        self._nvml, self._device = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
        self._ask("nvmlInit_v2")
        self._ask("nvmlDeviceGetHandleByUUID", _uuid().encode(), ctypes.byref(self._device))

    def __enter__(self) -> "Meter":
        self.samples: list[Sample] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def mhz(self) -> int | None:
        return round(statistics.median(mhz for *_, mhz in self.samples)) if self.samples else None

    def watts(self) -> float | None:
        return mean_watts(self.samples)

    def _run(self) -> None:
        millijoules, mhz = ctypes.c_ulonglong(), ctypes.c_uint()
        while not self._stop.wait(0.005):
            self._ask("nvmlDeviceGetTotalEnergyConsumption", self._device, ctypes.byref(millijoules))
            self._ask("nvmlDeviceGetClockInfo", self._device, 1, ctypes.byref(mhz))  # 1: the multiprocessors'
            self.samples.append((time.perf_counter(), millijoules.value / 1000, mhz.value))

    def _ask(self, function: str, *arguments: object) -> None:
        if status := getattr(self._nvml, function)(*arguments):
            raise RuntimeError(f"{function} must return 0, got {status}")


def mean_watts(samples: list[Sample], least_s: float = 0.5) -> float | None:
    """Joules over seconds, from the counter's first step to its last; None where those are closer than ``least_s``.

    The counter moves every 20 to 100 ms: its value at the ends of a burst is off by that much, its steps are not.
    """
    steps = [after for before, after in itertools.pairwise(samples) if after[1] != before[1]]
    if len(steps) < 2 or steps[-1][0] - steps[0][0] < least_s:
        return None
    return (steps[-1][1] - steps[0][1]) / (steps[-1][0] - steps[0][0])


def _uuid() -> str:
    """NVML counts all GPUs of a machine, CUDA those it may see: this names one for both."""
    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"


def save(result: dict[str, Any], path: Path) -> None:
    """With each list of numbers on one line, six digits each."""
    text = json.dumps(result, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[\s\d.,e+null-]*\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text)
    text = re.sub(r"(?<![\w.])\d+\.\d{5,}(e-?\d+)?", lambda number: f"{float(number[0]):.6g}", text)
    path.write_text(text + "\n")
