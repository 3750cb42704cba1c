"""Where does the time of a sampling step go? A table of milliseconds by kind of operation.

Measured is AR sampling at the size of imagenet-128 with guidance: one sample in float32, sixteen in
bfloat16. The whole is timed as it is; a second run, in which every operation is timed as torch
calls it, says how the time divides. What lies between the operations (Python, modules, torch's own
calls) is the rest of the whole.

Run      python -m experiments.sampler                                  2 minutes on 2 cores
         python -m experiments.sampler --before old.json --json new.json
             old.json: the same of another commit, shown beside it
         python -m experiments.sampler --show new.json --out sampler.svg
Makes    the table; --json FILE: its numbers, and those of --before, each with its commit; --out
         FILE: a bar for each case; --show FILE: of what --json wrote, nothing is measured
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import argparse
import os
import shlex
import sys

import torch

from experiments.bench_sampling import generator_of, zeros
from experiments.timing import Bench, Operations
from generator import ARGenerator
from plumbing import checkpoint
from plumbing.flags import DEVICES, Parser, need, number
from plumbing.outputs import JSON, SVG, need_places
from plumbing.plot import COLORS
from plumbing.processes import need_one_process, provenance

# kind: words in the names of its operations; the first that fits counts
KINDS = {
    "matrix products": ("aten.mm", "aten.addmm"),
    "attention": ("attention", "aten.bmm", "aten.baddbmm", "softmax"),
    "new caches": ("aten.zeros",),
    "moving numbers": ("copy", "cat", "stack", "clone", "embedding", "index", "scatter"),
    "views": ("view", "aten.t.", "slice", "select", "unbind", "permute", "transpose", "expand",
              "unsqueeze", "squeeze", "split", "alias", "detach"),
    "norms, rotary, SwiGLU, drawing": ("",),
}
PYTHON = "between the operations"
CASES = {"1 sample, float32": (1, torch.float32), "16 samples, bfloat16": (16, torch.bfloat16)}


def profile(model: ARGenerator, batch: int, bench: Bench) -> dict:
    """-> ms a step: "whole", and by kind; and calls a step by kind."""
    labels, L = zeros(bench, batch), model.num_tokens
    (whole,) = bench.seconds(lambda: model.sample(labels, cfg_scale=2.0))
    with Operations() as timed:
        model.sample(labels, cfg_scale=2.0)
    ms, calls = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0)
    for operation, seconds in timed.seconds.items():
        name = str(operation)
        kind = next(kind for kind, words in KINDS.items() if any(word in name for word in words))
        ms[kind] += seconds / L * 1e3
        calls[kind] += timed.calls[operation]
    # A clock around each operation makes them a little slower than they are without it.
    ms[PYTHON] = max(0.0, whole / L * 1e3 - sum(ms.values()))
    return {"whole": round(whole / L * 1e3, 2), "ms": {k: round(v, 2) for k, v in ms.items()},
            "calls": {kind: round(n / L, 1) for kind, n in calls.items()}}


def table(now: dict, before: dict | None) -> str:
    """A table of Markdown: ms a step, and calls in brackets, of each case; before -> now."""
    def cell(made, kind):
        if kind == "whole":
            return f"{made['whole']:.1f}"
        calls = f" ({made['calls'][kind]:.0f})" if kind in made["calls"] else ""
        return f"{made['ms'][kind]:.1f}{calls}"
    lines = ["| ms a step (calls) | " + " | ".join(now) + " |", "|---" * (1 + len(now)) + "|"]
    for kind in ("whole", *KINDS, PYTHON):
        cells = [" → ".join(cell(made[case], kind) for made in (before, now) if made)
                 for case in now]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def drawing(now: dict, before: dict | None) -> str:
    """A bar for each case, before and now, cut into the milliseconds of each kind: SVG."""
    bars = [(f"{case}, {when}", made[case]["ms"]) for case in now
            for when, made in (("before", before), ("now", now)) if made]
    scale = 560 / max(sum(ms.values()) for _, ms in bars)
    parts = []
    for row, (label, ms) in enumerate(bars):
        x, y = 230.0, 8 + 30 * row
        parts.append(f'<text x="222" y="{y + 15}" text-anchor="end">{label}</text>')
        for kind, color in zip(ms, COLORS):
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{ms[kind] * scale:.1f}" height="22" '
                         f'fill="{color}"/>')
            x += ms[kind] * scale
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 15}">{sum(ms.values()):.0f} ms</text>')
    below = 8 + 30 * len(bars)
    for i, (kind, color) in enumerate(zip(bars[0][1], COLORS)):
        x, y = 230 + 310 * (i % 2), below + 12 + 20 * (i // 2)
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{color}"/>'
                     f'<text x="{x + 18}" y="{y + 11}">{kind}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="860" height="{below + 100}" '
            f'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" '
            f'fill="white"/>{"".join(parts)}</svg>\n')


def parse(argv=None) -> argparse.Namespace:
    parser = Parser(prog="sampler.py", description=__doc__)
    parser.add_argument("--repeats", type=number(int, 1), default=3,
                        help="of each measurement (default: 3)")
    parser.add_argument("--threads", type=number(int, 0, 4096), default=0,
                        help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to compute")
    parser.add_argument("--before", metavar="FILE", help="what --json wrote at another commit")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    parser.add_argument("--show", metavar="FILE", help="what --json wrote: measure nothing")
    parser.add_argument("--out", metavar="FILE", help="write the bars there, as SVG")
    args = parser.parse_args(argv)
    for flag in ("before", "show"):
        path = getattr(args, flag)
        need(not path or os.path.isfile(path), f"--{flag} {path}: no such file")
    need(not (args.show and (args.before or args.json)), "--show measures nothing; leave out "
         "--before and --json")
    need_places({"--json": (args.json, JSON), "--out": (args.out, SVG)},
                reads={"--before": args.before, "--show": args.show})
    return args


def measure(args, words: list[str]) -> dict:
    """-> what --json writes."""
    bench, before, made = Bench(args), None, {}
    if args.before:
        before = checkpoint.read_json(args.before)["now"]
    for case, (batch, dtype) in CASES.items():
        made[case] = profile(generator_of(ARGenerator, bench).to(dtype), batch, bench)
    now = provenance(shlex.join(["python", "-m", "experiments.sampler", *words]), bench.device)
    return {**now, "seed": 0, "now": {**now, "cases": made}, "before": before}


def main(argv=None) -> None:
    args = parse(argv)
    need_one_process("experiments.sampler")
    found = checkpoint.read_json(args.show) if args.show else measure(
        args, sys.argv[1:] if argv is None else argv)
    cases = found["now"]["cases"], found["before"] and found["before"]["cases"]
    print(table(*cases))
    if args.json:
        checkpoint.write_json(args.json, found)
    if args.out:
        with checkpoint.replacing(args.out) as file:
            file.write(drawing(*cases).encode())


if __name__ == "__main__":
    main_with_user_errors(main)
