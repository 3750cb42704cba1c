"""Measuring times fairly: ways in turn, medians, the machine's own peaks, children for memory.

In       functions to be timed
Out      Bench: .seconds(), .row(), and .rows, what bench.py prints and keeps; in_child();
         Operations: what torch calls inside a with, how often, and for how long
"""
import functools
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from plumbing.flags import need
from plumbing.processes import Processes


class Bench:
    """The measured rows, and how to measure: .device, .threads, .repeats, the machine's peaks."""

    def __init__(self, args):
        self.repeats, self.threads = args.repeats, args.threads
        self.device = Processes(args.device).device
        if args.threads:
            torch.set_num_threads(args.threads)
        self.rows = []

    def seconds(self, *ways: Callable[[], object], repeats: int | None = None) -> list[float]:
        """Median seconds of each way, measured in turn after one round to warm up."""
        times = [[] for _ in ways]
        for turn in range(1 + (repeats or self.repeats)):
            for way, times_of_way in zip(ways, times):
                began = time.perf_counter()
                way()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                if turn > 0:
                    times_of_way.append(time.perf_counter() - began)
        return [statistics.median(times_of_way) for times_of_way in times]

    def row(self, name: str, value: float, unit: str, target: float | None = None,
            least: bool = True, note: str = "") -> None:
        """Print and keep a row. least: the value must be at least the target; else at most."""
        met, wanted = None, None
        if target is not None:
            met = bool(value >= target if least else value <= target)
            wanted = f"{'>=' if least else '<='} {target:g}"
        self.rows.append({"name": name, "value": round(value, 4), "unit": unit, "target": wanted,
                          "met": met, "note": note})
        verdict = {None: "", True: "met", False: "NOT MET"}[met]
        print(f"{name:58}{value:>9.3g} {unit:9}{wanted or '-':>9}  {verdict:8}{note}", flush=True)

    @functools.cached_property
    def peak(self) -> dict[torch.dtype, float]:
        """Multiply-adds per second of a 2048 x 2048 product, by dtype."""
        rates = {}
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.randn(2048, 2048, device=self.device, dtype=dtype)
            rates[dtype] = 2048 ** 3 / self.seconds(partial(torch.matmul, a, a), repeats=5)[0]
        return rates

    def of_peak(self, multiply_adds: float, seconds: float) -> str:
        """How near these float32 products came to what the machine can do, in percent."""
        return f"{multiply_adds / seconds / self.peak[torch.float32]:.0%} of peak"

    @functools.cached_property
    def bandwidth(self) -> float:
        """Bytes per second at which a matrix-vector product reads a matrix larger than a cache."""
        a = torch.randn(8192, 8192, device=self.device)
        x = torch.randn(8192, device=self.device)
        return a.numel() * 4 / self.seconds(partial(torch.mv, a, x), repeats=7)[0]


class Operations(TorchDispatchMode):
    """with Operations() as done: .calls and .seconds of each operation by name, gradients included.

    Seconds are those of the calling thread's clock on a CPU; a GPU works on after a call.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.seconds = Counter(), Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        began = time.perf_counter()
        result = operation(*args, **(kwargs or {}))
        self.seconds[str(operation)] += time.perf_counter() - began
        self.calls[str(operation)] += 1
        return result


def in_child(bench: Bench, module: str, *what) -> list[float]:
    """-> seconds, GiB that `module --child what` prints: a peak of memory is that of a process."""
    command = [sys.executable, "-m", module, "--device", bench.device.type]
    if bench.threads:
        command += ["--threads", str(bench.threads)]
    command += ["--child", *map(str, what)]
    done = subprocess.run(command, capture_output=True, text=True)
    last_words = done.stderr.strip().splitlines()[-1:]
    need(done.returncode == 0, f"{' '.join(map(str, what))} failed: {' '.join(last_words)}")
    return json.loads(done.stdout.strip().splitlines()[-1])
