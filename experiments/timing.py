"""Measuring times fairly: ways in turn, medians, the machine's own peaks, children for memory.

In       functions to be timed
Out      Bench: .seconds(), .row(), and .rows, what bench.py prints and keeps; in_child();
         Operations: what torch calls inside a with, how often, and for how long; flops_of()
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
from torch.utils.flop_counter import (
    FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count)

from plumbing.flags import need
from plumbing.processes import Processes

GIB = 2 ** 30
aten = torch.ops.aten
ATTENTION = {  # that of a CPU, which torch's counter does not know; it hands over shapes
    aten._scaled_dot_product_flash_attention_for_cpu:
        lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
}


class Bench:
    """The measured rows, and how to measure: .device, .threads, .repeats, the machine's peaks.

    flops   operations of each way that seconds() has measured last
    """

    def __init__(self, args):
        self.repeats, self.threads = args.repeats, args.threads
        self.device = Processes(args.device).device
        if args.threads:
            torch.set_num_threads(args.threads)
        self.rows = []

    def seconds(self, *ways: Callable[[], object], repeats: int | None = None,
                spend: float = 0) -> list[float]:
        """Median seconds of each way, measured in turn; a first round warms up, and counts.

        repeats   rounds, and more until `spend` seconds are over: short ways differ most
        """
        times, self.flops = [[] for _ in ways], [flops_of(way) for way in ways]
        until = time.perf_counter() + spend
        while len(times[0]) < (repeats or self.repeats) or time.perf_counter() < until:
            for way, times_of_way in zip(ways, times):
                began = time.perf_counter()
                way()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                times_of_way.append(time.perf_counter() - began)
        return [statistics.median(times_of_way) for times_of_way in times]

    def row(self, name: str, value: float, unit: str, target: float | None = None,
            least: bool = True, floor: float | None = None, note: str = "") -> None:
        """Print and keep a row.

        least    the value must be at least the target; else at most
        target   without one, a tenth from the floor, the best that can be hoped for
        """
        met, wanted = None, None
        if target is None and floor is not None:
            target = float(f"{floor / 1.1 if least else floor * 1.1:.3g}")
        if target is not None:
            met = bool(value >= target if least else value <= target)
            wanted = f"{'>=' if least else '<='} {target:g}"
        self.rows.append({"name": name, "value": round(value, 4), "unit": unit,
                          "floor": floor and round(floor, 4), "target": wanted, "met": met,
                          "note": note})
        verdict = {None: "", True: "met", False: "NOT MET"}[met]
        best = "-" if floor is None else f"{floor:.3g}"
        print(f"{name:62}{value:>8.3g} {unit:3}{best:>8}{wanted or '-':>9}  {verdict:8}{note}",
              flush=True)

    @functools.cached_property
    def peak(self) -> dict[torch.dtype, float]:
        """Operations per second of a 2048 x 2048 product, by dtype: 2 of each multiply-add."""
        rates = {}
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.randn(2048, 2048, device=self.device, dtype=dtype)
            rates[dtype] = 2 * 2048 ** 3 / self.seconds(partial(torch.matmul, a, a), repeats=5)[0]
        return rates

    def of_peak(self, flops: float, seconds: float) -> str:
        """How near these float32 operations came to what the machine can do, in percent."""
        return f"{flops / seconds / self.peak[torch.float32]:.0%} of peak"

    @functools.cached_property
    def bandwidth(self) -> float:
        """Bytes per second at which a matrix-vector product reads a matrix larger than a cache."""
        a = torch.randn(8192, 8192, device=self.device)
        x = torch.randn(8192, device=self.device)
        return a.numel() * 4 / self.seconds(partial(torch.mv, a, x), repeats=7)[0]


def flops_of(way: Callable[[], object]) -> int:
    """Call it once -> the floating-point operations of its products, gradients included."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        way()
    return counter.get_total_flops()


class Operations(TorchDispatchMode):
    """with Operations() as done: .calls and .seconds of each operation, gradients included.

    Seconds are those of the calling thread's clock on a CPU; a GPU works on after a call.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.seconds = Counter(), Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        began = time.perf_counter()
        result = operation(*args, **(kwargs or {}))
        self.seconds[operation] += time.perf_counter() - began
        self.calls[operation] += 1
        return result

    @property
    def kernels(self) -> int:
        """Calls that compute or move something: a view of a tensor is none."""
        return sum(n for operation, n in self.calls.items() if not is_view(operation))


def is_view(operation) -> bool:
    """Does it only say where numbers lie? So its schema tells: it returns what it was given."""
    parts = [part.alias_info for part in operation._schema.returns]
    name = operation.overloadpacket.__name__
    return any(info is not None and not info.is_write for info in parts) or name in (
        "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty")


def in_child(bench: Bench, module: str, *what) -> list[float]:
    """-> the numbers that `module --child what` prints: a peak of memory is that of a process."""
    command = [sys.executable, "-m", module, "--device", bench.device.type]
    if bench.threads:
        command += ["--threads", str(bench.threads)]
    command += ["--child", *map(str, what)]
    done = subprocess.run(command, capture_output=True, text=True)
    last_words = done.stderr.strip().splitlines()[-1:]
    need(done.returncode == 0, f"{' '.join(map(str, what))} failed: {' '.join(last_words)}")
    return json.loads(done.stdout.strip().splitlines()[-1])
